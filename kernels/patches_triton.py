"""Gathering and scattering of patches: every row moved once.

A scatter finds, for each place, the row that goes there by comparing the index list with the place; so all writes are
plain stores. Sums over samples go through fp32 partial buffers, one per split of the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tuning


@triton.jit
def _gather_kernel(
    x_ptr,
    index_ptr,
    pos_ptr,
    prefix_ptr,
    y_ptr,
    K,
    D,
    stride_xb,
    stride_xp,
    stride_xd,
    stride_ib,
    stride_ik,
    stride_pp,
    stride_pd,
    stride_fb,
    stride_fd,
    HAS_POS: tl.constexpr,
    LEAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = K + LEAD
    tiles = tl.cdiv(rows, BLOCK_K)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = row - LEAD
    chosen = (k >= 0) & (row < rows)
    i = tl.load(index_ptr + b * stride_ib + k * stride_ik, mask=chosen, other=0)
    mask = chosen[:, None] & (d < D)[None, :]
    y = tl.load(x_ptr + b * stride_xb + i[:, None] * stride_xp + d[None, :] * stride_xd, mask=mask, other=0.0)
    if HAS_POS:
        pos = tl.load(pos_ptr + i[:, None] * stride_pp + d[None, :] * stride_pd, mask=mask, other=0.0)
        y = y.to(tl.float32) + pos.to(tl.float32)
    if LEAD:
        prefix = tl.load(prefix_ptr + b * stride_fb + d * stride_fd, mask=d < D, other=0.0)
        y = tl.where((row == 0)[:, None], prefix.to(tl.float32)[None, :], y.to(tl.float32))
    y_ptr += (b * rows + row[:, None]) * D + d[None, :]
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (d < D)[None, :])


@triton.jit
def _row_of_place(index_ptr, p, K, stride_ik, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr):
    """The k with index[k] = p for each place (BLOCK_P,), or -1."""
    k_tile = tl.arange(0, BLOCK_K)
    row = tl.full((BLOCK_P,), -1, tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + k_tile
        i = tl.load(index_ptr + k * stride_ik, mask=k < K, other=-1)
        row = tl.maximum(row, tl.max(tl.where(i[:, None] == p[None, :], k[:, None], -1), 0))
    return row


@triton.jit
def _scatter_kernel(
    x_ptr,
    index_ptr,
    fill_ptr,
    pos_ptr,
    y_ptr,
    sum_ptr,
    B,
    K,
    P,
    D,
    samples,
    stride_xb,
    stride_xk,
    stride_xd,
    stride_ib,
    stride_ik,
    stride_fd,
    stride_pp,
    stride_pd,
    HAS_FILL: tl.constexpr,
    HAS_POS: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_SUM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = tl.cdiv(P, BLOCK_P)
    split = (tl.program_id(0) // tiles).to(tl.int64)
    p = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (p < P)[:, None] & (d < D)[None, :]
    other = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    if HAS_FILL:
        other += tl.load(fill_ptr + d * stride_fd, mask=d < D, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for b in range(split * samples, tl.minimum((split + 1) * samples, B)):
        k = _row_of_place(index_ptr + b * stride_ib, p, K, stride_ik, BLOCK_P, BLOCK_K)
        present = (k >= 0)[:, None] & inside
        x = tl.load(x_ptr + b * stride_xb + k[:, None] * stride_xk + d[None, :] * stride_xd, mask=present, other=0.0)
        x = x.to(tl.float32)
        if HAS_SUM:
            total += x
        if HAS_Y:
            y = tl.where((k >= 0)[:, None], x, other)
            if HAS_POS:
                pos = tl.load(pos_ptr + p[:, None] * stride_pp + d[None, :] * stride_pd, mask=inside, other=0.0)
                y += pos.to(tl.float32)
            tl.store(y_ptr + (b * P + p[:, None]) * D + d[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
    if HAS_SUM:
        tl.store(sum_ptr + (split * P + p[:, None]) * D + d[None, :], total, mask=inside)


@triton.jit
def _scatter_backward_kernel(
    dy_ptr,
    index_ptr,
    dx_ptr,
    dfill_ptr,
    dpos_ptr,
    B,
    K,
    P,
    D,
    samples,
    stride_yb,
    stride_yp,
    stride_yd,
    stride_ib,
    stride_ik,
    HAS_X: tl.constexpr,
    HAS_FILL: tl.constexpr,
    HAS_POS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = tl.cdiv(P, BLOCK_P)
    tile = tl.program_id(0) % tiles
    split = (tl.program_id(0) // tiles).to(tl.int64)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (p < P)[:, None] & (d < D)[None, :]
    absent = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for b in range(split * samples, tl.minimum((split + 1) * samples, B)):
        k = _row_of_place(index_ptr + b * stride_ib, p, K, stride_ik, BLOCK_P, BLOCK_K)
        present = (k >= 0)[:, None]
        dy = tl.load(dy_ptr + b * stride_yb + p[:, None] * stride_yp + d[None, :] * stride_yd, mask=inside, other=0.0)
        if HAS_X:
            tl.store(dx_ptr + (b * K + k[:, None]) * D + d[None, :], dy, mask=present & inside)
        if HAS_POS:
            total += dy.to(tl.float32)
        if HAS_FILL:
            absent += tl.where(present, 0.0, dy.to(tl.float32))
    if HAS_POS:
        tl.store(dpos_ptr + (split * P + p[:, None]) * D + d[None, :], total, mask=inside)
    if HAS_FILL:
        tl.store(dfill_ptr + (split * tiles + tile) * D + d, tl.sum(absent, 0), mask=d < D)


def gather(x: Tensor, index: Tensor, pos: Tensor | None, prefix: Tensor | None) -> Tensor:
    """Rows of x (B, P, D) at index (B, K), plus pos (P, D), behind prefix (D,) or (B, D)."""
    B, _, D = x.shape
    K = index.shape[1]
    rows = K + (prefix is not None)
    y = x.new_empty(B, rows, D)
    if y.numel() == 0:
        return y
    tile = tuning.rows_tile(D)
    prefix_strides = (0, 0) if prefix is None else (prefix.stride(0) if prefix.ndim == 2 else 0, prefix.stride(-1))
    with torch.cuda.device_of(x):
        _gather_kernel[(B * triton.cdiv(rows, tile.block_rows), triton.cdiv(D, tile.block_d))](
            x, index, pos, prefix, y, K, D, *x.stride(), *index.stride(), *_strides(pos, 2), *prefix_strides,
            HAS_POS=pos is not None, LEAD=rows - K,
            BLOCK_K=tile.block_rows, BLOCK_D=tile.block_d, num_warps=tile.warps,
        )  # fmt: skip
    return y


def scatter(x: Tensor, index: Tensor, fill: Tensor | None, num_patches: int, pos: Tensor | None) -> Tensor:
    """Rows of x (B, K, D) at index (B, K) among P, fill (D,) elsewhere, plus pos (P, D)."""
    return _scatter(x, index, fill, num_patches, pos, True, False)[0]


def gather_backward(dy: Tensor, index: Tensor, num_patches: int, need_x: bool, need_pos: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x (B, P, D) and pos (P, D) for dy (B, K, D); empty where not needed."""
    return _scatter(dy, index, None, num_patches, None, need_x, need_pos)


def scatter_backward(
    dy: Tensor, index: Tensor, need_x: bool, need_fill: bool, need_pos: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (B, K, D), fill (D,) and pos (P, D) for dy (B, P, D); empty where not needed."""
    B, P, D = dy.shape
    K = index.shape[1]
    dx = dy.new_empty(B if need_x else 0, K, D)
    if dy.numel() == 0 or not (need_x or need_fill or need_pos):
        fill, pos = dy.new_zeros(D if need_fill else 0), dy.new_zeros(P if need_pos else 0, D)
        return dx, fill.float(), pos.float()
    tile = tuning.rows_tile(D, need_fill or need_pos)
    splits, samples = _splits(B, need_fill or need_pos)
    tiles = triton.cdiv(P, tile.block_rows)
    dfill = dy.new_empty(splits * tiles if need_fill else 0, D, dtype=torch.float32)
    dpos = dy.new_empty(splits if need_pos else 0, P, D, dtype=torch.float32)
    with torch.cuda.device_of(dy):
        _scatter_backward_kernel[(splits * tiles, triton.cdiv(D, tile.block_d))](
            dy, index, dx, dfill, dpos, B, K, P, D, samples, *dy.stride(), *index.stride(),
            HAS_X=need_x, HAS_FILL=need_fill, HAS_POS=need_pos,
            BLOCK_P=tile.block_rows, BLOCK_D=tile.block_d, BLOCK_K=tile.block_index, num_warps=tile.warps,
            maxnreg=tuning.REGISTERS,
        )  # fmt: skip
    return dx, dfill.sum(0) if need_fill else dfill.new_empty(0), dpos.sum(0) if need_pos else dpos.new_empty(0, D)


def _scatter(
    x: Tensor,
    index: Tensor,
    fill: Tensor | None,
    num_patches: int,
    pos: Tensor | None,
    need_y: bool,
    need_sum: bool,
) -> tuple[Tensor, Tensor]:
    """The scattered rows (B, P, D) and the sum over samples of those present (P, D) fp32; empty where not needed."""
    B, K, D = x.shape
    P = num_patches
    y = x.new_empty(B if need_y else 0, P, D)
    if B * P * D == 0 or not (need_y or need_sum):
        return y, x.new_zeros(P if need_sum else 0, D, dtype=torch.float32)
    tile = tuning.rows_tile(D, need_sum)
    splits, samples = _splits(B, need_sum)
    total = x.new_empty(splits if need_sum else 0, P, D, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _scatter_kernel[(splits * triton.cdiv(P, tile.block_rows), triton.cdiv(D, tile.block_d))](
            x, index, fill, pos, y, total, B, K, P, D, samples,
            *x.stride(), *index.stride(), *_strides(fill, 1), *_strides(pos, 2),
            HAS_FILL=fill is not None, HAS_POS=pos is not None, HAS_Y=need_y, HAS_SUM=need_sum,
            BLOCK_P=tile.block_rows, BLOCK_D=tile.block_d, BLOCK_K=tile.block_index, num_warps=tile.warps,
        )  # fmt: skip
    return y, total.sum(0) if need_sum else total.new_empty(0, D)


def _splits(B: int, summed: bool) -> tuple[int, int]:
    """Programs along the batch, and samples of each: partial sums stay few, copies stay independent."""
    samples = max(16, triton.cdiv(B, 32)) if summed else 1
    return triton.cdiv(B, samples), samples


def _strides(x: Tensor | None, ndim: int) -> tuple[int, ...]:
    return x.stride() if x is not None else (0,) * ndim
