"""Reconstruction error of chosen patches, pixels addressed in the image.

A program takes a few patches of a sample. What a value's place in the patch adds to its address does not depend on the
patch, and consecutive values of C channels share C runs of pixels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tuning

KINDS = {"l1": 0, "mse": 1, "mse_normalised": 2}


@triton.jit
def _error(
    pred_ptr,
    image_ptr,
    index_ptr,
    b,
    k,
    K,
    columns,
    stride_yb,
    stride_yk,
    stride_yn,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_ib,
    stride_ik,
    eps,
    SIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y - t of the patches k, fp32 and 0 outside, and what lies inside, both (BLOCK_K, BLOCK_N)."""
    N: tl.constexpr = SIDE * SIDE * CHANNELS
    n = tl.arange(0, BLOCK_N)
    inside = (k < K)[:, None] & (n < N)[None, :]
    i = tl.load(index_ptr + b * stride_ib + k * stride_ik, mask=k < K, other=0)
    corner = i // columns * SIDE * stride_xh + i % columns * SIDE * stride_xw
    offset = n // (SIDE * CHANNELS) * stride_xh + n // CHANNELS % SIDE * stride_xw + n % CHANNELS * stride_xc
    t = tl.load(image_ptr + b * stride_xb + corner[:, None] + offset[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(pred_ptr + b * stride_yb + k[:, None] * stride_yk + n[None, :] * stride_yn, mask=inside, other=0.0)
    if KIND == 2:
        t = tl.where(inside, t - (tl.sum(t, 1) / N)[:, None], 0.0)
        t = t / tl.sqrt(tl.sum(t * t, 1) / N + eps)[:, None]
    return y.to(tl.float32) - t, inside


@triton.jit
def _loss_kernel(
    pred_ptr,
    image_ptr,
    index_ptr,
    partial_ptr,
    K,
    columns,
    stride_yb,
    stride_yk,
    stride_yn,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_ib,
    stride_ik,
    eps,
    SIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.cdiv(K, BLOCK_K)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    k = (tl.program_id(0) % tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    error, _ = _error(
        pred_ptr, image_ptr, index_ptr, b, k, K, columns, stride_yb, stride_yk, stride_yn,
        stride_xb, stride_xc, stride_xh, stride_xw, stride_ib, stride_ik, eps, SIDE, CHANNELS, KIND, BLOCK_N,
    )  # fmt: skip
    value = tl.abs(error) if KIND == 0 else error * error
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(value, 1), 0))


@triton.jit
def _loss_backward_kernel(
    dloss_ptr,
    pred_ptr,
    image_ptr,
    index_ptr,
    dpred_ptr,
    K,
    columns,
    stride_yb,
    stride_yk,
    stride_yn,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_ib,
    stride_ik,
    eps,
    scale,
    SIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    N: tl.constexpr = SIDE * SIDE * CHANNELS
    tiles = tl.cdiv(K, BLOCK_K)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    k = (tl.program_id(0) % tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    error, inside = _error(
        pred_ptr, image_ptr, index_ptr, b, k, K, columns, stride_yb, stride_yk, stride_yn,
        stride_xb, stride_xc, stride_xh, stride_xw, stride_ib, stride_ik, eps, SIDE, CHANNELS, KIND, BLOCK_N,
    )  # fmt: skip
    factor = tl.load(dloss_ptr) * scale
    if KIND == 0:
        dy = tl.where(error > 0, factor, tl.where(error < 0, -factor, error * factor))
    else:
        dy = 2.0 * factor * error
    dpred_ptr += (b * K + k[:, None]) * N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(dpred_ptr, dy.to(dpred_ptr.dtype.element_ty), mask=inside)


def loss(pred: Tensor, images: Tensor, index: Tensor, patch_size: int, kind: str, scale: float, eps: float) -> Tensor:
    """scale * sum of the error, () fp32."""
    if pred.numel() == 0:
        return pred.new_zeros((), dtype=torch.float32)
    programs, options = _launch(pred, images, patch_size, kind)
    partial = pred.new_empty(programs, dtype=torch.float32)
    with torch.cuda.device_of(pred):
        _loss_kernel[(programs,)](
            pred, images, index, partial, *_sizes(pred, images, index, patch_size), eps, **options
        )
    return partial.sum() * scale


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
    if pred.numel() == 0:
        return dpred
    programs, options = _launch(pred, images, patch_size, kind)
    sizes = _sizes(pred, images, index, patch_size)
    with torch.cuda.device_of(pred):
        _loss_backward_kernel[(programs,)](dloss, pred, images, index, dpred, *sizes, eps, scale, **options)
    return dpred


def _sizes(pred: Tensor, images: Tensor, index: Tensor, patch_size: int) -> tuple[int, ...]:
    """K, columns of patches, and the strides of prediction, images and index."""
    return pred.shape[1], images.shape[3] // patch_size, *pred.stride(), *images.stride(), *index.stride()


def _launch(pred: Tensor, images: Tensor, patch_size: int, kind: str) -> tuple[int, dict[str, int]]:
    """Number of programs, and the constants of their kernel."""
    B, K, N = pred.shape
    tile = tuning.patch_loss_tile(N)
    options = {"SIDE": patch_size, "CHANNELS": images.shape[1], "KIND": KINDS[kind]}
    options |= {"BLOCK_K": tile.block_rows, "BLOCK_N": tile.block_d, "num_warps": tile.warps}
    return B * triton.cdiv(K, tile.block_rows), options
