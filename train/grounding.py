"""Figures of visual grounding, as functions of boxes (cx, cy, w, h) in 0..1.

Acc@0.5          share of the boxes whose intersection over union with the true one is at least 1/2
fixed box        the one box that, given to every text, is right most often
choice           whether the true box is the one, among those listed for its image, that overlaps most
"""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from sycoca.regions import iou

RIGHT_FROM = 0.5
_MOST_TARGETS = 2_000
_ROWS = 256
_CENTRES = torch.linspace(0.125, 0.875, 7, dtype=torch.float64)
_SIDES = torch.linspace(0.15, 1.0, 7, dtype=torch.float64)


def accuracy(overlaps: Tensor) -> float:
    """Acc@0.5 of intersections over union (E,); NaN counts as wrong."""
    return (overlaps >= RIGHT_FROM).double().mean().item()


def best_fixed_box(targets: Tensor) -> tuple[Tensor, float]:
    """The predictor that ignores image and text.

    Tried are the targets themselves and boxes on a grid of centres and sides; the choice sees what it is judged on, so
    that it is a bound on such predictors rather than one of them.

    Args:
        targets: (E, 4) floating, at least one.

    Returns:
        The box (4,) fp64, and its Acc@0.5 over the targets.
    """
    targets = targets.double().cpu()
    few = targets[torch.linspace(0, len(targets) - 1, min(len(targets), _MOST_TARGETS)).round().long()]
    grid = torch.tensor(list(product(_CENTRES, _CENTRES, _SIDES, _SIDES)), dtype=torch.float64)
    tried = torch.cat([few, grid, targets.mean(0, keepdim=True)])
    hits = torch.cat([(iou(part[:, None], few[None]) >= RIGHT_FROM).sum(1) for part in tried.split(_ROWS)])
    best = tried[hits.argmax()]
    return best, accuracy(iou(best[None], targets))


def same_boxes(boxes: Tensor) -> Tensor:
    """Which of the boxes (E, 4) are the same box, (E, E) bool."""
    return iou(boxes[:, None], boxes[None]) > 1 - 1e-6


def right_choices(found: Tensor, targets: Tensor, groups: Sequence[int]) -> Tensor:
    """Whether a box overlaps its target most among all boxes of its image.

    Args:
        found: (E, 4) predictions.
        targets: (E, 4) true boxes.
        groups: the image of each; its distinct targets are what is chosen from.

    Returns:
        (E, 2) fp64: 1 where the choice is right, ties being wrong, and its chance.
    """
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    result = torch.zeros(len(found), 2, dtype=torch.float64)
    for mine in rows.values():
        listed = targets[mine].double()
        overlaps = iou(found[mine][:, None], listed[None])
        same = same_boxes(listed)
        own = overlaps.diagonal()
        beaten = ((overlaps >= own[:, None]) & ~same).any(1) | ~(own > 0)
        result[mine, 0] = (~beaten).double()
        # Boxes that are the same count once.
        result[mine, 1] = 1 / (1 / same.double().sum(1)).sum()
    return result
