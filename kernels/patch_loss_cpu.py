"""Reconstruction error of chosen patches with torch operators.

Blocks of samples whose pixels fit the cache. Pixels are fetched as runs of p values from a channels-first image
(p C from a channels-last one), and the prediction is read in their order, so that no patch is ever rearranged.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# fp32 values of a block: few enough for the last-level cache, many enough to keep every thread busy
BLOCK_VALUES = 640 * 1024


class _Block(NamedTuple):
    """Samples of a block, their prediction and target (N, R, Q) in R runs of Q values."""

    samples: slice
    pred: Tensor
    target: Tensor


def loss(pred: Tensor, images: Tensor, index: Tensor, patch_size: int, kind: str, scale: float, eps: float) -> Tensor:
    """scale * sum of the error, () fp32."""
    total = pred.new_zeros((), dtype=_error_dtype(pred))
    for _, y, t in _blocks(pred, images, index, patch_size, kind, eps):
        values = torch.sub(y, t, out=t).view(-1)
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
        N, R, Q = t.shape
        rows = dpred[samples].view(N, Q, R)
        error = rows
        if t.dtype != dpred.dtype:
            scratch = torch.empty(N, Q, R, dtype=t.dtype) if scratch is None else scratch
            error = scratch[:N]
        for run in range(R):
            torch.sub(y[:, run], t[:, run], out=error[:, :, run])
        if kind == "l1":
            error.sign_()
        torch.mul(error, factor, out=rows)
    return dpred


def _blocks(pred: Tensor, images: Tensor, index: Tensor, p: int, kind: str, eps: float) -> Iterator[_Block]:
    """Blocks of prediction and target; the target's memory may be written to, and is used again by the next block."""
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
    first = index // columns * (p * columns) + index % columns
    runs = (torch.arange(R)[:, None] * (H * columns) + torch.arange(p) * columns).view(-1)
    step = max(1, min(B, BLOCK_VALUES // (K * N)))
    offset = torch.arange(step)[:, None, None] * (R * H * columns) + runs
    scratch = torch.empty(step * K, R, N // R, dtype=_error_dtype(pred))
    for start in range(0, B, step):
        samples = slice(start, min(start + step, B))
        count = samples.stop - start
        pixels = images[samples].reshape(-1, length)
        rows = (first[samples, :, None] + offset[:count]).reshape(-1)
        target = scratch[: count * K]
        if pixels.dtype == target.dtype:
            torch.index_select(pixels, 0, rows, out=target.view(-1, length))
        else:
            target.view(-1, length).copy_(pixels.index_select(0, rows))
        if kind == "mse_normalised":
            _normalise(target.flatten(1), eps)
        yield _Block(samples, pred[samples].reshape(count * K, N // R, R).mT, target)


def _normalise(target: Tensor, eps: float) -> None:
    """(t - mean) / sqrt(var + eps) over rows, in place."""
    target -= target.mean(1, keepdim=True)
    variance = torch.linalg.vector_norm(target, dim=1, keepdim=True).square_() / target.shape[1]
    target *= (variance + eps).rsqrt_()


def _error_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
