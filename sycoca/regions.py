"""Boxes of images: batches of texts with boxes, the patches that a box touches, and boxes as (cx, cy, w, h) or corners.

    col0 = min(floor((cx - w/2) C), C - 1);  col1 = max(col0 + 1, min(ceil((cx + w/2) C), C));  rows alike

A box counts every patch that it touches, and at least one. It travels as four integers; the places of its patches in
an image's sequence are worked out where they are needed.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Shares of a patch by which fp32 corners may miss a boundary without touching what lies behind it.
_SLACK = 1e-4


class RegionBatch(NamedTuple):
    """E texts, each with a box of one of N images, as a rank trains on them in one step.

    Attributes:
        images: (N, 3, S, S) fp32, normalised; each belongs to a text.
        tokens: (E, T) int64, as `Tokenizer.encode` gives them.
        boxes: (E, 4) fp32, (cx, cy, w, h) in 0..1 of the picture that the model sees.
        rects: (E, 4) int32, cells [col0, row0, col1, row1) of the patch grid.
        image_index: (E,) int64, ascending.
        has_box: (E,) bool; False for the caption of a whole image, whose rect is the whole grid.
        ids: (E,) int64, equal where the same text matches: at least for one phrase of one image.
        seeds: (E,) int64, randomness of each text.
    """

    images: Tensor
    tokens: Tensor
    boxes: Tensor
    rects: Tensor
    image_index: Tensor
    has_box: Tensor
    ids: Tensor
    seeds: Tensor


def cells(boxes: Tensor | np.ndarray, grid: tuple[int, int]) -> Tensor | np.ndarray:
    """The patches that boxes touch.

    Args:
        boxes: (E, 4) floating, (cx, cy, w, h) in 0..1.
        grid: patches per column and per row.

    Returns:
        (E, 4) int32 [col0, row0, col1, row1), at least one patch each; an array for an array.
    """
    if isinstance(boxes, np.ndarray):
        return cells(torch.from_numpy(np.ascontiguousarray(boxes)), grid).numpy()
    corners = to_corners(boxes.double())
    size = corners.new_tensor([grid[1], grid[0]])
    first = (corners[:, :2] * size + _SLACK).floor().clamp(min=0).minimum(size - 1)
    last = (corners[:, 2:] * size - _SLACK).ceil().minimum(size).maximum(first + 1)
    return torch.cat([first, last], dim=1).int()


def whole(count: int, grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Rects (count, 4) int32 of whole images."""
    return torch.tensor([[0, 0, grid[1], grid[0]]], dtype=torch.int32, device=device).expand(count, 4)


def areas(rects: Tensor) -> Tensor:
    """Patches (E,) int64 of each rect."""
    rects = rects.long()
    return (rects[:, 2] - rects[:, 0]) * (rects[:, 3] - rects[:, 1])


def places(rects: Tensor, cols: int, most: int) -> tuple[Tensor, Tensor]:
    """Where the patches of rects lie in the row-major grid.

    Args:
        rects: (E, 4) int32.
        cols: patches per row of the grid.
        most: K, at least the largest rect's patches.

    Returns:
        (E, K) int64, row by row from the left, 0 behind the end; (E, K) bool, which count.
    """
    col0, row0, col1, _ = rects.long()[:, :, None].unbind(1)
    k = torch.arange(most, device=rects.device)
    valid = k < areas(rects)[:, None]
    width = col1 - col0
    place = (row0 + k // width) * cols + col0 + k % width
    return place.masked_fill(~valid, 0), valid


def to_corners(boxes: Tensor) -> Tensor:
    """(x0, y0, x1, y1) of boxes (..., 4) given as (cx, cy, w, h)."""
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def from_corners(corners: Tensor) -> Tensor:
    """(cx, cy, w, h) of boxes (..., 4) given as (x0, y0, x1, y1)."""
    low, high = corners.split(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union, 0..1, of boxes (..., 4) given as (cx, cy, w, h); 0 where both are empty."""
    a, b = to_corners(first.double()), to_corners(second.double())
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    area = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1)
    return overlap / (area - overlap).clamp(min=1e-12)
