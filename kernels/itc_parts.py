"""What the implementations of the contrastive loss are given, beside features and scale.

Every implementation has the parts

    prologue(image, text, logit_scale, product)
        diagonal logits (b,) in units of ln 2, and the largest norms (2,) of image and text
    sums(image, text, logit_scale, shift, targets, place)
        off-diagonal sums under a common shift, rows (2, b) and columns (2, n); second row: sum of q_ij L_ij
    online(image, text, logit_scale, safe, place)
        off-diagonal maxima and sums relative to them, rows (2, b) and columns (2, n); nothing is done where safe
    grads(image, text, logit_scale, factor, stats, targets, wanted, place)
        factor times (s G T, s G^T I, <G, I T^T>), fp32; an output that is not wanted is empty

for images (b, D) against texts (n, D); all results are fp32.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Targets(NamedTuple):
    """q_ij off the diagonal: weight_i where the ids agree, plus the smoothing."""

    ids: Tensor | None  # (b,) int64
    text_ids: Tensor | None  # (n,) int64
    weight: Tensor | None  # (b,), (1 - eps) / n_i; None where every target is one-hot
    smoothing: float  # eps / B


class Statistics(NamedTuple):
    """What forward leaves to backward."""

    row: Tensor  # (2, b), shift r and reciprocal sum 1/Z
    column: Tensor  # (2, n)
    coefficient: Tensor  # (b,), G on the diagonal
    safe: Tensor  # () bool, whether one shift serves all


class Wanted(NamedTuple):
    """Which gradients are formed."""

    image: bool
    text: bool
    scale: bool


class Place(NamedTuple):
    """Where the diagonal lies, and how products run."""

    offset: int  # the pair of image i is text i + offset
    product: torch.dtype
    scratch_bytes: int  # 0: what is fastest
