"""Box losses with torch operators, both axes of all boxes at a time."""

from typing import NamedTuple

import torch
from torch import Tensor


class _Boxes(NamedTuple):
    """Boxes of both kinds by corners (E, 2), what they share, and the error of the coordinates (E, 4)."""

    error: Tensor
    low: Tensor
    high: Tensor
    target_low: Tensor
    target_high: Tensor
    overlap: Tensor
    hull: Tensor
    I: Tensor
    U: Tensor
    C: Tensor


def loss(pred: Tensor, target: Tensor, valid: Tensor, mean: bool, min_area: float) -> tuple[Tensor, Tensor, Tensor]:
    """Both losses, and the share of a valid box in them."""
    b = _boxes(pred, target, valid)
    share = valid.sum(dtype=b.error.dtype).clamp_min_(1).reciprocal_() if mean else b.error.new_ones(())
    giou = _quotient(b.U - b.I, b.U, min_area) + _quotient(b.C - b.U, b.C, min_area)
    return b.error.abs().sum() * share, giou.sum() * share, share


def loss_backward(
    dl1: Tensor, dgiou: Tensor, share: Tensor, pred: Tensor, target: Tensor, valid: Tensor, min_area: float
) -> Tensor:
    """Gradient of `pred`."""
    b = _boxes(pred, target, valid)
    one = torch.ones_like(b.U)
    # g = 2 - I / U - U / C with U = A + B - I
    dA = _quotient(_quotient(b.I, b.U, min_area), b.U, min_area) - _quotient(one, b.C, min_area)
    dI = -_quotient(one, b.U, min_area) - dA
    dC = _quotient(_quotient(b.U, b.C, min_area), b.C, min_area)
    side = (b.high - b.low).flip(1) * dA[:, None]
    common = (b.overlap.clamp_min(0).flip(1) * dI[:, None]).masked_fill_(b.overlap < 0, 0)
    around = b.hull.flip(1) * dC[:, None]
    after, before = _ahead(b.high, b.target_high), _ahead(b.low, b.target_low)
    dhigh = side + common * (1 - after) + around * after
    dlow = -side - common * before - around * (1 - before)
    dsize = ((dhigh - dlow) / 2).masked_fill_(pred[:, 2:] < 0, 0)
    dpred = torch.cat([dhigh + dlow, dsize], 1) * (dgiou * share) + b.error.sign() * (dl1 * share)
    return dpred.masked_fill_(~valid[:, None], 0).to(pred.dtype)


def _boxes(pred: Tensor, target: Tensor, valid: Tensor) -> _Boxes:
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    # a row that is not valid holds one box twice
    skip = ~valid[:, None]
    pred, target = (box.to(dtype).masked_fill(skip, 0.5) for box in (pred, target))
    half, target_half = (box[:, 2:].clamp_min(0) / 2 for box in (pred, target))
    low, high = pred[:, :2] - half, pred[:, :2] + half
    target_low, target_high = target[:, :2] - target_half, target[:, :2] + target_half
    overlap = torch.minimum(high, target_high) - torch.maximum(low, target_low)
    hull = torch.maximum(high, target_high) - torch.minimum(low, target_low)
    I = _area(overlap.clamp_min(0))
    U = _area(high - low) + _area(target_high - target_low) - I
    return _Boxes(pred - target, low, high, target_low, target_high, overlap, hull, I, U, _area(hull))


def _area(side: Tensor) -> Tensor:
    return side[:, 0] * side[:, 1]


def _quotient(part: Tensor, area: Tensor, min_area: float) -> Tensor:
    return (part / area).masked_fill_(area <= min_area, 0)


def _ahead(a: Tensor, b: Tensor) -> Tensor:
    """1 where a > b, 1/2 where they are equal, else 0: the derivative of max(a, b) in a."""
    return torch.heaviside(a - b, a.new_tensor(0.5))
