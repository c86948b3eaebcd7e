"""What an evaluation found: figures, tables and examples, the same for every task."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sycoca.images import eval_transform
from train.data.sample import BadSample, Skipped


class Example(NamedTuple):
    """A sample as a person looks at it: how well the model did, the image's place in its source, lines of text.

    `boxes` are labels with (x0, y0, x1, y1) in 0..1 of the image; those without a label are the true ones.
    """

    score: float
    index: int
    key: str
    lines: tuple[tuple[str, str], ...]
    boxes: tuple[tuple[str, tuple[float, float, float, float]], ...] = ()


class Outcome(NamedTuple):
    """The result of a task.

    Attributes:
        task: its name.
        figures: plain data, ready for JSON.
        headline: the few figures that sum it up, by name.
        tables: header and rows of further tables, by title.
        examples: of every sample, or of as many as were scored.
    """

    task: str
    figures: dict[str, Any]
    headline: dict[str, float]
    tables: dict[str, tuple[tuple[str, ...], list[tuple]]]
    examples: list[Example]


class ImageBatch(NamedTuple):
    """Images (B, 3, H, W) fp32 of a source, with their places and keys."""

    images: Tensor
    indices: list[int]
    keys: list[str]


def image_batches(
    source: Any, *, limit: int | None, image_size: int, batch_size: int, device: Any, skipped: Skipped
) -> Iterator[ImageBatch]:
    """The readable images among the first of a source; the others are counted.

    Args:
        source: has `image(index)`, which gives an image and its key.
        limit: how many images, at most; None for all.
        image_size: side in pixels.
        batch_size: images of a batch, at most.
        device: of the batches.
        skipped: the account.
    """
    images, indices, keys = [], [], []
    for index in range(len(source) if limit is None else min(limit, len(source))):
        try:
            image, key = source.image(index)
        except BadSample as bad:
            skipped.sample(bad.key, bad.cause)
            continue
        images.append(eval_transform(image, image_size))
        indices.append(index)
        keys.append(key)
        if len(images) == batch_size:
            yield ImageBatch(torch.stack(images).to(device), indices, keys)
            images, indices, keys = [], [], []
    if images:
        yield ImageBatch(torch.stack(images).to(device), indices, keys)


class CaptionImages:
    """A caption source in the form that `image_batches` reads; keeps the captions of what was read."""

    def __init__(self, source: Any) -> None:
        self.source, self.skipped = source, source.skipped
        self.captions: dict[int, tuple[str, ...]] = {}

    def __len__(self) -> int:
        return len(self.source)

    def image(self, index: int) -> tuple[Any, str]:
        image, captions, key = self.source.captioned(index)
        if not captions:
            raise BadSample("image without a caption", key)
        self.captions[index] = captions
        return image, key


def require_any(count: int, task: str, source: Any, skipped: Skipped) -> None:
    """Raises ValueError where a source gave nothing to judge."""
    if not count:
        raise ValueError(f"{task}: nothing of '{source.name}' can be used; {skipped.line() or 'it is empty'}")


def rows_of(features: Any, rows: Tensor) -> Any:
    """Some rows of a named tuple of tensors."""
    return features._make(None if field is None else field.index_select(0, rows) for field in features)


def share(values: Sequence[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def by_kind(kinds: Sequence[str], values: Sequence[float]) -> list[tuple[str, int, float]]:
    """Name, count and mean of the values of every kind, and of all."""
    groups: dict[str, list[float]] = {}
    for kind, value in zip(kinds, values, strict=True):
        groups.setdefault(kind, []).append(value)
    rows = [(kind, len(found), share(found)) for kind, found in sorted(groups.items())]
    return [*rows, ("all", len(values), share(values))]
