"""Specifications of all operators, in plain torch.

Differentiable by autograd, in the dtype of the inputs (statistics at least fp32), quadratic in memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def itc_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    rows: slice | None = None,
    world_size: int = 1,
) -> Tensor:
    """Symmetric contrastive loss of all pairs (B, D), (B, D): the share of the pairs in `rows`, times `world_size`."""
    B = image.shape[0]
    logits = (image @ text.T).to(_at_least_fp32(image.dtype)) * logit_scale.reshape(())
    same = torch.eye(B, dtype=torch.bool, device=image.device) if ids is None else ids[:, None] == ids[None, :]
    # q_ij = (1 - eps) y_ij / n_i + eps / B, symmetric
    targets = same.to(logits.dtype) * ((1.0 - label_smoothing) / same.sum(1, keepdim=True)) + label_smoothing / B
    row = -(targets * logits.log_softmax(1)).sum(1)
    column = -(targets * logits.log_softmax(0)).sum(0)
    terms = (row + column) / 2
    return terms[rows if rows is not None else slice(None)].sum() * (world_size / B)


def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    rows: slice | None = None,
    world_size: int = 1,
) -> Tensor:
    """Pairwise sigmoid loss: the share of the images in `rows`, times `world_size`."""
    B = image.shape[0]
    logits = (image @ text.T).to(_at_least_fp32(image.dtype)) * logit_scale.reshape(()) + logit_bias.reshape(())
    labels = 2 * torch.eye(B, dtype=logits.dtype, device=image.device) - 1
    terms = -F.logsigmoid(labels * logits).sum(1)
    return terms[rows if rows is not None else slice(None)].sum() * (world_size / B)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
