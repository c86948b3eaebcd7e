"""A phrase with a box as a line of JSON gives it: texts, and [x, y, width, height] in pixels."""

from __future__ import annotations

from typing import Any

from train.data.box_augment import Box
from train.data.regions import box_fault
from train.data.sample import Region, caption_fault

LEAST_INSIDE = 0.5
# Pixels; nothing larger is decoded.
LARGEST_SIDE = 1e6
_FARTHEST = 1e12
# Of the image, from its corner to where a box may reach.
_MOST_SIDES = 1e6


def texts_of(value: Any) -> list[str]:
    """A text or a list of them as a list."""
    if isinstance(value, str):
        return [value]
    return [text if isinstance(text, str) else "" for text in value] if isinstance(value, list) else []


def phrases_of(elem: Any) -> tuple[str, ...]:
    """What a region may be called."""
    if not isinstance(elem, dict):
        return ()
    words = [text.strip() for text in texts_of(elem.get("caption")) if not caption_fault(text)]
    attributes = [text.strip() for text in texts_of(elem.get("attributes")) if not caption_fault(text)]
    return tuple(f"{a} {w}" for w in words for a in attributes) if attributes else tuple(words)


def read_elem(elem: Any, width: float, height: float) -> Region:
    """A region as a line gives it.

    Args:
        elem: of the list `elems`.
        width: of the image that `bb` is measured in, in pixels.
        height: likewise.

    Returns:
        The region, its box clipped to the image.

    Raises:
        ValueError: why it cannot be used, in words that many share.
    """
    if not isinstance(elem, dict):
        raise ValueError("region is not an object")
    phrases, caption = phrases_of(elem), elem.get("caption_index", -1)
    if not phrases:
        raise ValueError("region without a phrase")
    box = read_box(elem.get("bb"), width, height)
    said = {"phrases": phrases} if len(phrases) > 1 else None
    return Region(phrases[0], box, caption if type(caption) is int and caption >= 0 else -1, said)


def read_box(box: Any, width: float, height: float) -> Box:
    """A box (x0, y0, x1, y1) in 0..1, clipped to its image of `width` x `height` pixels, out of [x, y, w, h] in pixels.

    Raises:
        ValueError: why it cannot be used, in words that many share.
    """
    if not isinstance(box, list) or len(box) != 4 or not all(_is_pixel(side) for side in box):
        raise ValueError("box of a region is not four numbers")
    x, y, w, h = map(float, box)
    whole = x / width, y / height, (x + w) / width, (y + h) / height
    if not all(abs(side) < _MOST_SIDES for side in whole):
        raise ValueError("box of a region is not four numbers")
    if w < 0 or h < 0:
        raise ValueError("box of a region has swapped corners")
    clipped = tuple(min(1.0, max(0.0, side)) for side in whole)
    if w > 0 and h > 0 and not (clipped[0] < clipped[2] and clipped[1] < clipped[3]):
        raise ValueError("box of a region is outside its image")
    if fault := box_fault(clipped):
        raise ValueError(fault)
    inside = (clipped[2] - clipped[0]) * (clipped[3] - clipped[1])
    if inside < LEAST_INSIDE * (whole[2] - whole[0]) * (whole[3] - whole[1]):
        raise ValueError("box of a region is mostly outside its image")
    return clipped


def _is_pixel(value: Any) -> bool:
    # Whole numbers of JSON may be larger than any float.
    return type(value) in (int, float) and abs(value) < _FARTHEST
