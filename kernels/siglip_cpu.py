"""Sigmoid loss and its gradients in cache-sized blocks, with library matrix products.

Products are fp32: those of bf16 and fp16 values are exact there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS = 1024
BLOCK_COLUMNS = 1024


def loss_and_grads(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    need_image: bool,
    need_text: bool,
    need_scalars: bool,
    product: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of the pairs' losses, and its gradients in image, text, and (scale, bias), fp32; empty where not needed."""
    (b, D), n = image.shape, text.shape[0]
    total = torch.zeros(())
    dimage = torch.zeros(b, D) if need_image else torch.empty(0)
    dtext = torch.zeros(n, D) if need_text else torch.empty(0)
    dscalars = torch.zeros(2) if need_scalars else torch.empty(0)
    scale, bias = logit_scale.item(), logit_bias.item()
    scratch = torch.empty(2, min(b, BLOCK_ROWS) * min(n, BLOCK_COLUMNS))
    for start in range(0, b, BLOCK_ROWS):
        I = _load(image[start : start + BLOCK_ROWS], product)
        A = I * scale
        for first in range(0, n, BLOCK_COLUMNS):
            T = _load(text[first : first + BLOCK_COLUMNS], product)
            l, work = (x[: I.shape[0] * T.shape[0]].view(I.shape[0], T.shape[0]) for x in scratch)
            torch.mm(A, T.T, out=l).add_(bias)
            # z l with z = -1 off the diagonal, +1 on it; loss = softplus(-z l)
            diagonal = _diagonal(l, start + offset - first)
            positive = diagonal.clone()
            diagonal.neg_()
            total += _softplus(l, work)
            if not (need_image or need_text or need_scalars):
                continue
            # G = d loss / d l = -z sigmoid(-z l)
            torch.sigmoid(l, out=work)
            G, diagonal = work, _diagonal(work, start + offset - first)
            diagonal.neg_()
            if need_scalars:
                dscalars[1] += G.sum()
            if need_scalars and not (need_image or need_text):
                _diagonal(l, start + offset - first).copy_(positive)
                dscalars[0] += l.sub_(bias).mul_(G).sum() / scale
            if need_image:
                dimage[start : start + BLOCK_ROWS].addmm_(G, T, alpha=scale)
            if need_text:
                dtext[first : first + BLOCK_COLUMNS].addmm_(G.T, A)
    if need_scalars and (need_image or need_text):
        # ds = sum_ij G_ij <I_i, T_j> = 1/s sum_i <dI_i, I_i>
        gradient, features = (dimage, image) if need_image else (dtext, text)
        for g, x in zip(gradient.split(BLOCK_ROWS), features.split(BLOCK_ROWS)):
            dscalars[0] += torch.linalg.vecdot(g, _load(x, product)).sum() / scale
    return total, dimage, dtext, dscalars


def _softplus(x: Tensor, work: Tensor) -> Tensor:
    """Sum of ln(1 + e^x); `work` is overwritten."""
    # ln(1 + e^x) = max(x, 0) + ln(1 + e^-|x|)
    torch.abs(x, out=work).neg_().exp_().log1p_()
    return work.sum() + F.relu(x).sum()


def _load(x: Tensor, product: torch.dtype) -> Tensor:
    """fp32 values of a block as the product sees them."""
    return x.to(product).to(torch.float32)


def _diagonal(x: Tensor, k: int) -> Tensor:
    """View of the elements (i, i + k) that lie in the block."""
    c, w = x.shape
    return x.diagonal(k) if -c < k < w else x.new_empty(0)
