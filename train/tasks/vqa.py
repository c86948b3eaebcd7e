"""Visual question answering: an answer for every question, in one of three ways.

classify   the likeliest of the known answers, by the classifier of a fine-tuned model
generate   what the captioner writes behind the question
rank       the candidate answer that the captioner finds likeliest behind the question
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from sycoca.generate import generate_tokens
from train.data.sample import Skipped
from train.tasks.heads import Head, answer_logits
from train.tasks.likelihood import log_likelihood, prompted
from train.tasks.outcome import Example, Outcome, by_kind, image_batches, require_any, rows_of, share
from train.tasks.vqa_accuracy import normalised, vqa_accuracy

# Least number of tokens that an answer may have.
_ANSWER_ROOM = 4
# Of a source without end, whose answers are soon all known.
_GENERATED_IMAGES = 1_000


def frequent_answers(source: Any, most: int) -> tuple[str, ...]:
    """The most frequent normalised answers of a source, or of the first images of a generated one."""
    counts: Counter = Counter()
    for index in range(min(len(source), _GENERATED_IMAGES) if source.fresh else len(source)):
        for asked in source.asked(index):
            counts.update(filter(None, map(normalised, asked.answers)))
    return tuple(answer for answer, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most])


@torch.no_grad()
def evaluate(
    model: Any,
    tokenizer: Any,
    source: Any,
    *,
    options: Any,
    device: Any,
    skipped: Skipped,
    method: str,
    head: Head | None = None,
    candidates: Sequence[str] = (),
) -> Outcome:
    """Answers the questions of a source.

    Args:
        model: in evaluation mode, with the objective `ic`.
        tokenizer: the model's.
        source: a `QuestionSource`.
        options: `TaskOptions`.
        device: of the model.
        skipped: account of what could not be used; empty answers, and questions whose human answers a classifier does
            not know, are counted there.
        method: classify, generate or rank.
        head: of `classify`.
        candidates: of `rank`.

    Returns:
        The official accuracy, by kind of answer; `answers` in the form that the challenge takes; examples are scored by
        accuracy.

    Raises:
        ValueError: no question can be used.
    """
    kinds, accuracies, examples, answers = [], [], [], []
    known = set(head.names) if head is not None else set()
    for batch in image_batches(
        source,
        limit=options.limit,
        image_size=model.config.vision.image_size,
        batch_size=options.batch_size,
        device=device,
        skipped=skipped,
    ):
        images = model.encode_image(batch.images)
        questions = [(row, asked) for row, index in enumerate(batch.indices) for asked in source.asked(index)]
        rows = torch.tensor([row for row, _ in questions], device=device)
        texts = [asked.question for _, asked in questions]
        given: list[str] = []
        for part in torch.arange(len(questions)).split(options.batch_size):
            seen = rows_of(images, rows[part.to(device)])
            said = [texts[i] for i in part.tolist()]
            if method == "classify":
                given += _classified(model, tokenizer, head, seen, said, device)
            elif method == "generate":
                given += _generated(model, tokenizer, seen, said, options)
            else:
                given += _ranked(model, tokenizer, seen, said, candidates, device)
        for (row, asked), answer in zip(questions, given, strict=True):
            answers.append({"question_id": int(asked.key) if asked.key.isdigit() else asked.key, "answer": answer})
            if not answer.strip():
                skipped.row("empty answer given", f"question {asked.key}")
            if not asked.answers:
                continue
            if known and not any(normalised(a) in known for a in asked.answers):
                skipped.row("human answer is none of the classifier's", f"question {asked.key}: {asked.answers[0]}")
            accuracy = vqa_accuracy(answer, asked.answers)
            kinds.append(asked.kind)
            accuracies.append(accuracy)
            most = ", ".join(f"{text} x {n}" for text, n in Counter(asked.answers).most_common(3))
            worth = f"{accuracy:.2f}"
            lines = (("accuracy", worth), ("asked", asked.question), ("answered", answer), ("people", most))
            examples.append(Example(accuracy, batch.indices[row], batch.keys[row], lines))
    if not accuracies and answers:
        # Test questions have no answers; what is left is the file for the challenge.
        return Outcome("vqa", {"questions": len(answers), "answers": answers}, {}, {}, [])
    require_any(len(accuracies), "vqa", source, skipped)
    table = by_kind(kinds, accuracies)
    figures = {
        "method": method,
        "questions": len(accuracies),
        "accuracy": share(accuracies),
        "by kind": {kind: value for kind, _, value in table},
        "answers": answers,
    }
    tables = {"accuracy by kind of question": (("kind", "questions", "accuracy"), table)}
    return Outcome("vqa", figures, {"accuracy": share(accuracies)}, tables, examples)


def _classified(model: Any, tokenizer: Any, head: Head, images: Any, questions: list[str], device: Any) -> list[str]:
    tokens = tokenizer.encode(questions, model.config.text.context_length).to(device)
    best = answer_logits(model, head.module, images, tokens).argmax(1)
    return [head.names[i] for i in best.tolist()]


def _generated(model: Any, tokenizer: Any, images: Any, questions: list[str], options: Any) -> list[str]:
    length = model.config.text.context_length
    # A question that does not fit loses its end, as in `prompted`.
    prompts = prompted(tokenizer, questions, [""] * len(questions), length - max(_ANSWER_ROOM, length // 8))
    ids = [row[1:start] for row, start in zip(prompts.tokens.tolist(), prompts.starts.tolist())]
    found = generate_tokens(model, images, prompt=ids, num_beams=options.beams, length_penalty=options.length_penalty)
    behind = [row[len(words) + 1 :] for row, words in zip(found.tokens[:, 0].tolist(), ids)]
    return tokenizer.decode(behind)


def _ranked(model: Any, tokenizer: Any, images: Any, questions: list[str], candidates, device: Any) -> list[str]:
    each = len(candidates)
    sequences = prompted(
        tokenizer,
        [question for question in questions for _ in candidates],
        list(candidates) * len(questions),
        model.config.text.context_length,
    )
    sequences = sequences._make(part.to(device) for part in sequences)
    rows = torch.arange(len(questions), device=device).repeat_interleave(each)
    scores, _ = log_likelihood(model, images, rows, sequences)
    return [candidates[i] for i in scores.view(-1, each).argmax(1).tolist()]
