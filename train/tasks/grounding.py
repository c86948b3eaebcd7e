"""Visual grounding: the box of what a phrase describes, regressed, or out of Grad-CAM without learned boxes."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sycoca.config import ConfigError
from sycoca.images import as_pil, normalise
from sycoca.locate import shown, whole_image
from sycoca.regions import iou
from train.data.box_augment import View, seen_box
from train.data.regions import asked_of
from train.data.sample import BadSample, Skipped
from train.grounding import accuracy, best_fixed_box, right_choices
from train.tasks.heat import best_rectangles, match_heat
from train.tasks.outcome import Example, Outcome, by_kind, require_any, share

_SMALL, _LARGE = 0.05, 0.25


class _Asked(NamedTuple):
    """Images (B, 3, S, S), and for each phrase its image's row, its text and its box (cx, cy, w, h)."""

    images: Tensor
    indices: list[int]
    keys: list[str]
    rows: list[int]
    phrases: list[str]
    boxes: list[tuple[float, float, float, float]]


def method_of(asked: str, model: Any) -> str:
    """How boxes are found; by default regressed where the model has learned to.

    Raises:
        ConfigError: the model cannot.
    """
    can = [name for name, head in (("regress", "box_head"), ("heat", "itm_head")) if getattr(model, head, None)]
    if not can:
        raise ConfigError("grounding needs a model trained with the objective 'bbox' or 'itm'")
    if asked != "auto" and asked not in can:
        raise ConfigError(f"grounding={asked}: needs the objective '{'bbox' if asked == 'regress' else 'itm'}'")
    return can[0] if asked == "auto" else asked


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, source: Any, *, options: Any, device: Any, skipped: Skipped) -> Outcome:
    """Judges the boxes of all phrases of a source's images, which are seen whole.

    Args:
        model: in evaluation mode, with the objective `bbox` or `itm`.
        tokenizer: the model's.
        source: images with regions.
        options: `TaskOptions`; `grounding` says how boxes are found.
        device: of the model.
        skipped: account of what could not be used.

    Returns:
        Acc@0.5 beside that of the best fixed box, mean overlap, and how often the right one of the image's boxes is
        chosen beside chance; the examples are the images, scored by the mean overlap of their phrases.

    Raises:
        ValueError: no image can be used.
        ConfigError: the model cannot find boxes that way.
    """
    method = method_of(options.grounding, model)
    found, targets, images, phrases = [], [], [], []
    indices, keys = [], []
    for batch in _batches(source, options, model.config.vision.image_size, skipped):
        views = model.view_images(model.encode_image(batch.images.to(device)))
        for start in range(0, len(batch.phrases), options.batch_size):
            part = slice(start, start + options.batch_size)
            tokens = tokenizer.encode(batch.phrases[part], model.config.text.context_length)
            text = model.encode_text(tokens.to(device))
            seen = views._replace(seen=views.seen.of(torch.tensor(batch.rows[part], device=device)))
            if method == "regress":
                boxes = model.locate(text, seen)
            else:
                boxes = best_rectangles(match_heat(model, text, seen), model.config.vision.grid)
            found.append(boxes.float().cpu())
        images += [len(indices) + row for row in batch.rows]
        targets += batch.boxes
        phrases += batch.phrases
        indices += batch.indices
        keys += batch.keys
    require_any(len(phrases), "grounding", source, skipped)
    predicted, true = torch.cat(found), torch.tensor(targets, dtype=torch.float64)
    overlaps, chosen = iou(predicted, true), right_choices(predicted, true, images)
    fixed, fixed_accuracy = best_fixed_box(true)
    headline = {
        "Acc@0.5": accuracy(overlaps),
        "Acc@0.5 of the best fixed box": fixed_accuracy,
        "mean IoU": overlaps.mean().item(),
        "choice among the image's boxes": chosen[:, 0].mean().item(),
        "choice by chance": chosen[:, 1].mean().item(),
    }
    kinds = [_size(target) for target in targets]
    rows = by_kind(kinds, (overlaps >= 0.5).double().tolist())
    figures = {
        "method": method,
        "images": len(indices),
        "phrases": len(phrases),
        "fixed_box": [round(side, 4) for side in fixed.tolist()],
        **headline,
        "by_size": {kind: {"phrases": count, "acc": value} for kind, count, value in rows},
    }
    table = {"by area of the true box": (("size", "phrases", "Acc@0.5"), rows)}
    examples = _examples(images, indices, keys, phrases, predicted, targets, overlaps.tolist())
    return Outcome("grounding", figures, headline, table, examples)


def _batches(source: Any, options: Any, size: int, skipped: Skipped) -> Iterator[_Asked]:
    pictures, batch = [], _Asked(torch.empty(0), [], [], [], [], [])
    for index in range(len(source) if options.limit is None else min(options.limit, len(source))):
        try:
            sample = source[index]
            asked = list(asked_of(sample.regions))
            if not asked:
                raise BadSample("image without a usable region", sample.key)
        except BadSample as bad:
            skipped.sample(bad.key, bad.cause)
            continue
        width, height = as_pil(sample.image).size
        for phrase, region in asked:
            batch.rows.append(len(pictures))
            batch.phrases.append(phrase)
            batch.boxes.append(seen_box(region.box, View((0, 0, width, height)), width, height))
        pictures.append(torch.from_numpy(whole_image(sample.image, size)))
        batch.indices.append(index)
        batch.keys.append(sample.key)
        if len(pictures) == options.batch_size:
            yield batch._replace(images=normalise(torch.stack(pictures)))
            pictures, batch = [], _Asked(torch.empty(0), [], [], [], [], [])
    if pictures:
        yield batch._replace(images=normalise(torch.stack(pictures)))


def _size(box: tuple[float, float, float, float]) -> str:
    area = box[2] * box[3]
    return "small" if area < _SMALL else "large" if area > _LARGE else "medium"


def _examples(
    images: list[int],
    indices: list[int],
    keys: list[str],
    phrases: list[str],
    predicted: Tensor,
    targets: list[tuple[float, float, float, float]],
    overlaps: list[float],
) -> list[Example]:
    rows: dict[int, list[int]] = {}
    for row, image in enumerate(images):
        rows.setdefault(image, []).append(row)
    found = []
    for image, mine in rows.items():
        true, located = _corners(torch.tensor([targets[row] for row in mine])), _corners(predicted[mine])
        lines = [
            (f"{place} {phrases[row]}", f"IoU {overlaps[row]:.2f}, found at {_told(located[place - 1])}")
            for place, row in enumerate(mine, 1)
        ]
        boxes = [*(("", box) for box in true), *((str(place), box) for place, box in enumerate(located, 1))]
        score = share([overlaps[row] for row in mine])
        found.append(Example(score, indices[image], keys[image], tuple(lines), tuple(boxes)))
    return found


def _corners(boxes: Tensor) -> list[tuple[float, ...]]:
    return [tuple(box) for box in shown(boxes).tolist()]


def _told(corners: tuple[float, ...]) -> str:
    """Corners in per cent of the sides."""
    return " ".join(f"{100 * side:.0f}" for side in corners)
