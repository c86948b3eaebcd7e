"""Grad-CAM of image-text matching: where the fusion encoder looks for what makes an image match its text.

    heat_p = mean over heads h and words t of  A_htp relu(d match / d A_htp)
    box    = argmax over boxes of  sum of heat / sqrt(area)

A is the cross-attention of one fusion block. No boxes are learned: every rectangle of patches is tried, or the boxes of
a detector, in the heat as a picture.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sycoca.regions import from_corners

# Of the depth of the fusion encoder: the fourth of six blocks (X-VLM).
BLOCK_SHARE = 0.6


def match_heat(model: Any, text: Any, views: Any, block: int | None = None) -> Tensor:
    """Heat of the patches of B images under their texts.

    Args:
        model: with the objective `itm`.
        text: encoded texts, B.
        views: whole images, one for each text.
        block: of the fusion encoder; None for the one at `BLOCK_SHARE`.

    Returns:
        (B, P) fp32, at least 0.
    """
    blocks = model.fusion.blocks
    cross = blocks[int(BLOCK_SHARE * len(blocks)) if block is None else block].cross
    cross.kept = []
    try:
        with torch.enable_grad():
            # A leaf that asks for a gradient, whether or not the parameters do.
            words = text.words.detach().clone().requires_grad_()
            score = model.match(text._replace(words=words), views)
            (attention,) = cross.kept
            (gradient,) = torch.autograd.grad((score[:, 1] - score[:, 0]).sum(), attention)
    finally:
        del cross.kept
    heat = (attention.detach() * gradient.relu()).float().mean(1)
    if heat.shape[1] == text.valid.shape[1]:
        heat = heat * text.valid[:, :, None]
    return heat.sum(1)[:, 1:]


def best_rectangles(heat: Tensor, grid: tuple[int, int]) -> Tensor:
    """The rectangles that hold most heat for their size.

    Args:
        heat: (B, P) floating, at least 0, row-major.
        grid: patches per column and per row.

    Returns:
        (B, 4) fp32, (cx, cy, w, h) in 0..1; the whole image where there is no heat.
    """
    rows, cols = grid
    sums = _sums(heat.double().view(-1, rows, cols))
    left, right = torch.triu_indices(cols + 1, cols + 1, 1, device=heat.device)
    best = torch.zeros(len(heat), dtype=torch.float64, device=heat.device)
    boxes = _whole(heat)
    for top in range(rows):
        for bottom in range(top + 1, rows + 1):
            strip = sums[:, bottom] - sums[:, top]
            density = (strip[:, right] - strip[:, left]) / ((right - left) * (bottom - top)).double().sqrt()
            value, place = density.max(1)
            x0, x1 = left[place] / cols, right[place] / cols
            y0, y1 = torch.full_like(x0, top / rows), torch.full_like(x0, bottom / rows)
            box = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=1)
            better = value > best * (1 + 1e-9)
            best = torch.where(better, value, best)
            boxes = torch.where(better[:, None], box, boxes)
    return boxes


def best_detections(heat: Tensor, grid: tuple[int, int], listed: Sequence[Tensor], side: int) -> Tensor:
    """The boxes of a detector that hold most heat for their size (X-VLM's weakly supervised grounding).

    Args:
        heat: (B, P) floating, at least 0, row-major.
        grid: patches per column and per row.
        listed: for each row of heat the boxes to choose from, (K, 4) floating x0, y0, x1, y1 in 0..1.
        side: pixels of the square picture that heat is interpolated to, bicubically.

    Returns:
        (B, 4) fp32, (cx, cy, w, h) in 0..1; the whole image where no box holds heat or there is none.
    """
    picture = F.interpolate(heat.double().view(-1, 1, *grid), size=(side, side), mode="bicubic")
    sums, boxes = _sums(picture.squeeze(1)), _whole(heat)
    for row, corners in enumerate(listed):
        if not len(corners):
            continue
        corners = corners.to(heat.device, torch.float64)
        # Whole pixels, at least one each.
        x0, y0 = (corners[:, :2] * side).long().clamp(0, side - 1).unbind(1)
        x1, y1 = (corners[:, 2:] * side).long().clamp(max=side).unbind(1)
        x1, y1 = torch.maximum(x1, x0 + 1), torch.maximum(y1, y0 + 1)
        held = sums[row, y1, x1] - sums[row, y0, x1] - sums[row, y1, x0] + sums[row, y0, x0]
        value, place = (held / ((x1 - x0) * (y1 - y0)).sqrt()).max(0)
        found = from_corners(corners[place]).float()
        boxes[row] = torch.where(value > 0, found, boxes[row])
    return boxes


def _sums(heat: Tensor) -> Tensor:
    """Sums (B, H + 1, W + 1) of heat (B, H, W) above and left of each corner of its cells."""
    return F.pad(heat.cumsum(1).cumsum(2), (1, 0, 1, 0))


def _whole(heat: Tensor) -> Tensor:
    return torch.tensor([0.5, 0.5, 1.0, 1.0], device=heat.device).repeat(len(heat), 1)
