"""One way to judge a model on any task."""

import time
from typing import Any, NamedTuple

from train.data.sample import Skipped
from train.tasks import captioning, choosing, classification, grounding, nlvr, retrieval, vqa
from train.tasks.class_names import templates
from train.tasks.heads import Head
from train.tasks.options import TaskOptions
from train.tasks.outcome import Outcome


class Judged(NamedTuple):
    """What was found, what could not be used, and how long it took."""

    outcome: Outcome
    skipped: Skipped
    seconds: float


def judge(
    task: str,
    model: Any,
    tokenizer: Any,
    source: Any,
    *,
    options: TaskOptions,
    device: Any,
    head: Head | None = None,
    method: str = "rank",
    train: Any = None,
) -> Judged:
    """Judges a model.

    Args:
        task: one of `EVALUATED`.
        model: in evaluation mode, on the device.
        tokenizer: the model's.
        source: what `open_source` opened for this task.
        options: of the task.
        device: of the model.
        head: the classifier, for classification, nlvr and vqa by classification.
        method: of vqa.
        train: labelled images that a probe is fitted to; questions that candidate answers come from.

    Returns:
        Outcome, account and seconds.

    Raises:
        ValueError: nothing of the source can be used.
    """
    started, skipped = time.perf_counter(), source.skipped
    how = {"options": options, "device": device, "skipped": skipped}
    match task:
        case "retrieval":
            outcome = retrieval.evaluate(model, tokenizer, source, **how)
        case "captioning":
            outcome = captioning.evaluate(model, tokenizer, source, **how)
        case "choice":
            outcome = choosing.evaluate_choice(model, tokenizer, source, **how)
        case "pairs":
            outcome = choosing.evaluate_pairs(model, tokenizer, source, **how)
        case "grounding":
            outcome = grounding.evaluate(model, tokenizer, source, **how)
        case "nlvr":
            outcome = nlvr.evaluate(model, tokenizer, source, head, **how)
        case "zeroshot":
            sentences = templates(options.templates, source.classes)
            outcome = classification.evaluate_zeroshot(model, tokenizer, source, sentences=sentences, **how)
        case "probe":
            outcome = classification.evaluate_probe(model, train, source, **how)
        case "classification":
            outcome = classification.evaluate_classifier(model, source, head, **how)
        case "vqa":
            candidates = ()
            if method == "rank":
                candidates = vqa.frequent_answers(train or source, options.ranked)
                if not candidates:
                    raise ValueError(
                        f"vqa: '{source.name}' has no answers to rank; give vqa=generate, or a model fine-tuned for vqa"
                    )
            how |= {"method": method, "head": head, "candidates": candidates}
            outcome = vqa.evaluate(model, tokenizer, source, **how)
            if method == "rank":
                taken = train or source
                origin = {"candidates from": f"{taken.name}, {taken.split}"}
                outcome = outcome._replace(figures=origin | outcome.figures)
    return Judged(outcome, skipped, time.perf_counter() - started)
