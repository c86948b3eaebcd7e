"""Crops and mirroring that know where the boxes are.

crop     corners uniform between a chosen box and the borders, so that the box stays inside
keep     a box of which at least half the area is inside, clipped to the crop
mirror   never where a text says left or right
target   (cx, cy, w, h) as shares of the crop, which is resized to a square: proportions are not kept

The choice of a view depends on the boxes, the texts and the draws alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

LEAST_INSIDE = 0.5
_SIDES = re.compile(r"\b(?:left|right)(?:most|wards?|-?hand(?:ed)?)?\b", re.IGNORECASE)

Box = tuple[float, float, float, float]


class Draws(Protocol):
    """A source of uniform numbers, such as numpy.random.Generator."""

    def random(self) -> float:
        """The next number in [0, 1)."""
        ...


class View(NamedTuple):
    """What of an image is seen: (left, top, width, height) in pixels, and whether it is mirrored."""

    crop: tuple[int, int, int, int]
    mirrored: bool = False


def speaks_of_sides(texts: Iterable[str]) -> bool:
    """Whether a text says left or right, which a mirrored picture would make wrong."""
    return any(_SIDES.search(text) for text in texts)


def _between(low: int, high: int, draws: Draws) -> int:
    """A whole number, uniform in [low, high]."""
    return low + min(high - low, int(draws.random() * (high - low + 1)))


def crop_around(box: Box, width: int, height: int, draws: Draws) -> tuple[int, int, int, int]:
    """A crop that holds a whole box, its corners uniform where that leaves room.

    Args:
        box: x0, y0, x1, y1 in 0..1 of the image.
        width: of the image in pixels.
        height: of the image in pixels.
        draws: uniform numbers, four of them.

    Returns:
        (left, top, width, height) in pixels, inside the image and at least one pixel wide and high.
    """
    (left, right), (top, bottom) = (
        (_between(0, _inside(low, side, math.floor), draws), _between(_inside(high, side, math.ceil), side, draws))
        for low, high, side in ((box[0], box[2], width), (box[1], box[3], height))
    )
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    return left, top, right - left, bottom - top


def _inside(share: float, side: int, rounded) -> int:
    """A share of a side in whole pixels; floor leaves room for one pixel, ceil holds one."""
    # A share that a division made is a hair off the whole pixel that it stands for.
    pixel = share * side
    whole = round(pixel)
    pixel = whole if abs(pixel - whole) < 1e-6 * side else rounded(pixel)
    return min(side - 1, max(0, pixel)) if rounded is math.floor else min(side, max(1, pixel))


def choose_view(
    boxes: Sequence[Box], texts: Iterable[str], width: int, height: int, draws: Draws, *, crop: bool, flip: float
) -> View:
    """The view of an image in an epoch.

    Args:
        boxes: at least one, x0, y0, x1, y1 in 0..1 of the image; one of them, drawn, stays inside.
        texts: all that will be said of the view.
        width: of the image in pixels.
        height: of the image in pixels.
        draws: uniform numbers, six of them, whatever the answers.
        crop: whether the image is cropped at all.
        flip: share of the views that are mirrored where no text forbids it, 0..1.
    """
    chosen = boxes[min(len(boxes) - 1, int(draws.random() * len(boxes)))]
    around = crop_around(chosen, width, height, draws)
    wanted = draws.random() < flip
    return View(around if crop else (0, 0, width, height), wanted and not speaks_of_sides(texts))


def seen_box(box: Box, view: View, width: int, height: int, *, least: float = LEAST_INSIDE) -> Box | None:
    """Where a box lies in a view.

    Args:
        box: x0, y0, x1, y1 in 0..1 of the image.
        view: of the image.
        width: of the image in pixels.
        height: of the image in pixels.
        least: share of the box's area that has to be inside, 0..1.

    Returns:
        (cx, cy, w, h) in 0..1 of the view, or None where too little of the box is seen, or no area.
    """
    left, top, w, h = view.crop
    x0, x1 = ((x * width - left) / w for x in (box[0], box[2]))
    y0, y1 = ((y * height - top) / h for y in (box[1], box[3]))
    area = (x1 - x0) * (y1 - y0)
    x0, y0, x1, y1 = (min(1.0, max(0.0, side)) for side in (x0, y0, x1, y1))
    if x0 >= x1 or y0 >= y1 or (x1 - x0) * (y1 - y0) < least * area * (1 - 1e-9):
        return None
    if view.mirrored:
        x0, x1 = 1 - x1, 1 - x0
    return (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
