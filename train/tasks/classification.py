"""Image classification: zero-shot by the names of the classes, by a fine-tuned classifier, or by a linear probe."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train.data.sample import Skipped
from train.tasks.heads import Head
from train.tasks.linear_probe import fit_probe
from train.tasks.outcome import Example, Outcome, image_batches, require_any, share
from train.tasks.retrieval import encode_texts

_TOP = 5


@torch.no_grad()
def name_features(
    model: Any, tokenizer: Any, classes: Sequence[str], sentences: Sequence[str], *, batch_size: int, device: Any
) -> Tensor:
    """Unit features (C, E) fp32 of classes, each the mean over the sentences that name it."""
    texts = [sentence.replace("{}", name) for name in classes for sentence in sentences]
    features = encode_texts(model, tokenizer, texts, batch_size, device)
    return F.normalize(features.view(len(classes), len(sentences), -1).mean(1), dim=-1)


def evaluate_zeroshot(
    model: Any,
    tokenizer: Any,
    source: Any,
    *,
    options: Any,
    device: Any,
    skipped: Skipped,
    sentences: Sequence[str],
) -> Outcome:
    """Classifies by the cosine of image and class name.

    Args:
        model: in evaluation mode, with the objective `itc`.
        tokenizer: the model's.
        source: a `LabelSource`.
        options: `TaskOptions`.
        device: of the model.
        skipped: account of what could not be used.
        sentences: with `{}` where the class stands.

    Returns:
        Top-1, top-5, mean accuracy of the classes, the accuracy of each; examples are scored by the probability of the
        right class.

    Raises:
        ValueError: no image can be used.
    """
    weight = name_features(model, tokenizer, source.classes, sentences, batch_size=options.batch_size, device=device)
    scale = model.logit_scale()

    def classify(features: Tensor) -> Tensor:
        return scale * features @ weight.T

    return _evaluate("zeroshot", model, source, classify, options, device, skipped)


def evaluate_classifier(model: Any, source: Any, head: Head, *, options: Any, device: Any, skipped: Skipped) -> Outcome:
    """Classifies by a fine-tuned classifier; otherwise as `evaluate_zeroshot`."""
    return _evaluate("classification", model, source, head.module.to(device), options, device, skipped)


def evaluate_probe(model: Any, train: Any, source: Any, *, options: Any, device: Any, skipped: Skipped) -> Outcome:
    """Fits a linear classifier to frozen image features of `train`, then judges it on `source`.

    Args:
        model: in evaluation mode.
        train: a `LabelSource` with the same classes.
        source: as for `evaluate_zeroshot`.
        options: `TaskOptions`; `probe_limit` bounds the images of `train`.
        device: of the model.
        skipped: account of what could not be used.

    Returns:
        As `evaluate_zeroshot`, with the accuracy on the validation part of `train` by strength of the regularisation.

    Raises:
        ValueError: no image of `train` or of `source` can be used.
    """
    features, labels = [], []
    for batch in _batches(model, train, options, device, skipped, options.probe_limit):
        features.append(_features(model, batch.images))
        labels += [train.label(index) for index in batch.indices]
    require_any(len(labels), "probe", train, skipped)
    probe = fit_probe(torch.cat(features), torch.tensor(labels, device=device), len(train.classes), seed=options.seed)
    outcome = _evaluate("probe", model, source, probe.logits, options, device, skipped)
    chosen = {"regularisation": probe.strength, "validation accuracy by regularisation": probe.tried}
    return outcome._replace(figures=outcome.figures | chosen | {"training images": len(labels)})


@torch.no_grad()
def _features(model: Any, images: Tensor) -> Tensor:
    return model.encode_image(images).features.float()


def _batches(model: Any, source: Any, options: Any, device: Any, skipped: Skipped, limit: int | None):
    return image_batches(
        source,
        limit=limit,
        image_size=model.config.vision.image_size,
        batch_size=options.batch_size,
        device=device,
        skipped=skipped,
    )


@torch.no_grad()
def _evaluate(
    task: str,
    model: Any,
    source: Any,
    classify: Callable[[Tensor], Tensor],
    options: Any,
    device: Any,
    skipped: Skipped,
) -> Outcome:
    classes = source.classes
    top = min(_TOP, len(classes))
    first: list[float] = []
    within: list[float] = []
    per_class: dict[int, list[float]] = {}
    examples = []
    for batch in _batches(model, source, options, device, skipped, options.limit):
        logits = classify(_features(model, batch.images)).float()
        labels = torch.tensor([source.label(index) for index in batch.indices], device=device)
        own = logits.gather(1, labels[:, None])
        others = logits.scatter(1, labels[:, None], -torch.inf)
        # Ties and NaN count against the model.
        ranks = (~(others < own)).sum(1)
        probability = logits.softmax(1)
        best = probability.topk(top, dim=1)
        for row, index in enumerate(batch.indices):
            label, rank = int(labels[row]), int(ranks[row])
            first.append(float(rank < 1))
            within.append(float(rank < top))
            per_class.setdefault(label, []).append(float(rank < 1))
            guesses = [(f"{p:.2f}", classes[i]) for p, i in zip(best.values[row].tolist(), best.indices[row].tolist())]
            lines = (("true", classes[label]), *guesses[:3])
            score = float(probability[row, label])
            examples.append(Example(score, index, batch.keys[row], lines))
    require_any(len(first), task, source, skipped)
    rows = [(classes[label], len(found), share(found)) for label, found in sorted(per_class.items())]
    headline = {
        "top-1": share(first),
        f"top-{top}": share(within),
        "mean of classes": share([accuracy for *_, accuracy in rows]),
    }
    figures = {"images": len(first), "classes": len(classes), **headline, "chance": 1 / len(classes)}
    figures["per class"] = {name: accuracy for name, _, accuracy in rows}
    tables = {"accuracy by class": (("class", "images", "top-1"), rows)}
    return Outcome(task, figures, headline, tables, examples)
