"""Reconstruction error of chosen patches with torch operators.

Blocks of samples whose pixels fit the cache. Pixels are fetched as runs of p values from a channels-first image
(p C from a channels-last one), each a bag of one row, the fetch that reads ahead; the prediction is read in their
order, so that no patch is ever rearranged.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

# fp32 values of a block: few enough for the last-level cache, many enough to keep every thread busy
BLOCK_VALUES = 640 * 1024


class _Block(NamedTuple):
    """Samples of a block, their prediction (N, Q, R), and their target (N, R, Q) in R runs of Q values."""

    samples: slice
    pred: Tensor
    target: Tensor


def loss(pred: Tensor, images: Tensor, index: Tensor, patch_size: int, kind: str, scale: float, eps: float) -> Tensor:
    """scale * sum of the error, () fp32."""
    total = pred.new_zeros((), dtype=_error_dtype(pred))
    scratch = None
    for _, y, t in _blocks(pred, images, index, patch_size, kind, eps):
        scratch = torch.empty_like(t) if scratch is None else scratch
        values = torch.sub(y.mT, t, out=scratch[: len(t)]).view(-1)
        total += values.abs_().sum() if kind == "l1" else torch.dot(values, values)
    return total * scale


def loss_backward(
    dloss: Tensor,
    pred: Tensor,
    images: Tensor,
    index: Tensor,
    patch_size: int,
    kind: str,
    scale: float,
    eps: float,
) -> Tensor:
    """Gradient of `pred`."""
    dpred = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    factor = dloss * (scale if kind == "l1" else 2 * scale)
    scratch = None
    for samples, y, t in _blocks(pred, images, index, patch_size, kind, eps):
        rows = dpred[samples].view(y.shape)
        error = rows
        if t.dtype != dpred.dtype:
            scratch = torch.empty(y.shape, dtype=t.dtype) if scratch is None else scratch
            error = scratch[: len(y)]
        torch.sub(y, t.mT, out=error)
        if kind == "l1":
            error.sign_()
        torch.mul(error, factor, out=rows)
    return dpred


def _blocks(pred: Tensor, images: Tensor, index: Tensor, p: int, kind: str, eps: float) -> Iterator[_Block]:
    """Blocks of prediction and target."""
    B, K, N = pred.shape
    if pred.numel() == 0:
        return
    C, H, W = images.shape[1:]
    interleaved = C > 1 and images.is_contiguous(memory_format=torch.channels_last)
    if interleaved:
        images = images.permute(0, 2, 3, 1)
    R, length = (1, p * C) if interleaved else (C, p)
    columns = W // p
    # in runs of pixels: the first one of each patch, and those of a patch from there
    first = (index // columns * (p * columns) + index % columns).int()
    runs = (torch.arange(R)[:, None] * (H * columns) + torch.arange(p) * columns).view(-1).int()
    step = max(1, min(B, BLOCK_VALUES // (K * N)))
    offset = (torch.arange(step) * (R * H * columns)).int()[:, None, None] + runs
    bags = torch.arange(step * K * R * p, dtype=torch.int32)
    for start in range(0, B, step):
        samples = slice(start, min(start + step, B))
        count = samples.stop - start
        pixels = images[samples].reshape(-1, length)
        rows = (first[samples, :, None] + offset[:count]).reshape(-1)
        target = embedding_bag(rows, pixels, bags[: len(rows)], mode="sum")
        target = target.to(_error_dtype(pred)).view(count * K, R, N // R)
        if kind == "mse_normalised":
            _normalise(target.flatten(1), eps)
        yield _Block(samples, pred[samples].reshape(count * K, N // R, R), target)


def _normalise(target: Tensor, eps: float) -> None:
    """(t - mean) / sqrt(var + eps) over rows, in place."""
    target -= target.mean(1, keepdim=True)
    variance = torch.linalg.vector_norm(target, dim=1, keepdim=True).square_() / target.shape[1]
    target *= (variance + eps).rsqrt_()


def _error_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
