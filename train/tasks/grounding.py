"""Visual grounding: the box of what a phrase describes, regressed, or out of Grad-CAM without learned boxes: any
rectangle, or one of a detector's boxes."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sycoca.config import ConfigError
from sycoca.images import as_pil, normalise
from sycoca.locate import shown, whole_image
from sycoca.regions import from_corners, iou
from train.data.box_augment import View, seen_box
from train.data.regions import asked_of
from train.data.sample import BadSample, Sample, Skipped
from train.grounding import RIGHT_FROM, accuracy, best_fixed_box, right_choices
from train.tasks.heat import best_detections, best_rectangles, match_heat
from train.tasks.outcome import Example, Outcome, by_kind, require_any, share

_SMALL, _LARGE = 0.05, 0.25


class _Asked(NamedTuple):
    """Images (B, 3, S, S), what a detector found in each, (K, 4) corners, and for each phrase its image's row, its text
    and its box (cx, cy, w, h)."""

    images: Tensor
    indices: list[int]
    keys: list[str]
    rows: list[int]
    phrases: list[str]
    boxes: list[tuple[float, float, float, float]]
    detections: list[Tensor]


def method_of(asked: str, model: Any) -> str:
    """How boxes are found; by default regressed where the model has learned to.

    Raises:
        ConfigError: the model cannot.
    """
    needed = {"regress": ("bbox", "box_head"), "heat": ("itm", "itm_head"), "detections": ("itm", "itm_head")}
    can = [name for name, (_, head) in needed.items() if getattr(model, head, None)]
    if not can:
        raise ConfigError("grounding needs a model trained with the objective 'bbox' or 'itm'")
    if asked != "auto" and asked not in can:
        raise ConfigError(f"grounding={asked}: needs the objective '{needed[asked][0]}'")
    return can[0] if asked == "auto" else asked


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, source: Any, *, options: Any, device: Any, skipped: Skipped) -> Outcome:
    """Judges the boxes of all phrases of a source's images, which are seen whole.

    Args:
        model: in evaluation mode, with the objective `bbox` or `itm`.
        tokenizer: the model's.
        source: images with regions; its `file_of(index)`, where it has several files, splits the figures.
        options: `TaskOptions`; `grounding` says how boxes are found.
        device: of the model.
        skipped: account of what could not be used.

    Returns:
        Acc@0.5 beside that of the best fixed box, mean overlap, and how often the right one of the image's boxes is
        chosen beside chance; with `detections` also the share of the phrases that one of the detector's boxes suits.
        The examples are the images, scored by the mean overlap of their phrases.

    Raises:
        ValueError: no image can be used.
        ConfigError: the model cannot find boxes that way.
    """
    method = method_of(options.grounding, model)
    vision = model.config.vision
    found, targets, images, phrases, detections = [], [], [], [], []
    indices, keys = [], []
    for batch in _batches(source, options, vision.image_size, skipped):
        views = model.view_images(model.encode_image(batch.images.to(device)))
        for start in range(0, len(batch.phrases), options.batch_size):
            part = slice(start, start + options.batch_size)
            tokens = tokenizer.encode(batch.phrases[part], model.config.text.context_length)
            text = model.encode_text(tokens.to(device))
            seen = views._replace(seen=views.seen.of(torch.tensor(batch.rows[part], device=device)))
            if method == "regress":
                boxes = model.locate(text, seen)
            elif method == "heat":
                boxes = best_rectangles(match_heat(model, text, seen), vision.grid)
            else:
                listed = [batch.detections[row] for row in batch.rows[part]]
                boxes = best_detections(match_heat(model, text, seen), vision.grid, listed, vision.image_size)
            found.append(boxes.float().cpu())
        images += [len(indices) + row for row in batch.rows]
        targets += batch.boxes
        phrases += batch.phrases
        indices += batch.indices
        keys += batch.keys
        detections += batch.detections
    require_any(len(phrases), "grounding", source, skipped)
    if method == "detections" and not any(map(len, detections)):
        raise ValueError(
            f"grounding=detections: '{source.name}' lists no boxes of a detector; "
            "python -m train.data.convert refcoco --detections dets.json writes them into its lines"
        )
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
    if method == "detections":
        headline["Acc@0.5 of the best detection"] = _suits_any([detections[image] for image in images], true)
    right = (overlaps >= RIGHT_FROM).double().tolist()
    rows = by_kind([_size(target) for target in targets], right)
    figures = {
        "method": method,
        "images": len(indices),
        "phrases": len(phrases),
        **({"without_detections": sum(not len(boxes) for boxes in detections)} if method == "detections" else {}),
        "fixed_box": [round(side, 4) for side in fixed.tolist()],
        **headline,
        "by_size": _plain(rows),
    }
    tables = {"by area of the true box": (("size", "phrases", "Acc@0.5"), rows)}
    if hasattr(source, "file_of"):
        files = [source.file_of(indices[image]) for image in images]
        if len(set(files)) > 1:
            tables["by file"] = (("file", "phrases", "Acc@0.5"), by_kind(files, right))
            figures["by_file"] = _plain(tables["by file"][1])
    examples = _examples(images, indices, keys, phrases, predicted, targets, overlaps.tolist())
    return Outcome("grounding", figures, headline, tables, examples)


def _plain(rows: list[tuple[str, int, float]]) -> dict[str, dict[str, float]]:
    return {kind: {"phrases": count, "acc": value} for kind, count, value in rows}


def _suits_any(listed: list[Tensor], true: Tensor) -> float:
    """Share of the true boxes (E, 4) that some of the boxes listed for each, (K, 4) corners, overlaps enough."""
    suits = [bool((iou(from_corners(boxes), box[None]) >= RIGHT_FROM).any()) for boxes, box in zip(listed, true)]
    return share(suits)


def _batches(source: Any, options: Any, size: int, skipped: Skipped) -> Iterator[_Asked]:
    pictures, batch = [], _none()
    for index in range(len(source) if options.limit is None else min(options.limit, len(source))):
        try:
            sample = source[index]
            asked = _asked(sample, skipped)
        except BadSample as bad:
            skipped.sample(bad.key, bad.cause)
            continue
        for phrase, box in asked:
            batch.rows.append(len(pictures))
            batch.phrases.append(phrase)
            batch.boxes.append(box)
        pictures.append(torch.from_numpy(whole_image(sample.image, size)))
        batch.indices.append(index)
        batch.keys.append(sample.key)
        batch.detections.append(torch.tensor(sample.detections or (), dtype=torch.float64).view(-1, 4))
        if len(pictures) == options.batch_size:
            yield batch._replace(images=normalise(torch.stack(pictures)))
            pictures, batch = [], _none()
    if pictures:
        yield batch._replace(images=normalise(torch.stack(pictures)))


def _none() -> _Asked:
    return _Asked(torch.empty(0), [], [], [], [], [], [])


def _asked(sample: Sample, skipped: Skipped) -> list[tuple[str, tuple[float, float, float, float]]]:
    """The phrases of a sample with their boxes (cx, cy, w, h) in the whole picture.

    Raises:
        BadSample: there is none.
    """
    width, height = as_pil(sample.image).size
    found = []
    for phrase, region in asked_of(sample.regions):
        box = seen_box(region.box, View((0, 0, width, height)), width, height)
        if box is None:
            # Of a hair's breadth, or for the most part in the slack around the image.
            skipped.part(f"{sample.key} phrase {phrase}", "box of a region has no area in its image", sample.key)
        else:
            found.append((phrase, box))
    if not found:
        raise BadSample("image without a usable region", sample.key)
    return found


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
