"""Pooling of rectangles: a program takes an image and a part of its width.

Forward, the rectangles of the image are rows of zeros and ones of a product with its cells; backward, every cell adds
up what its rectangles received, and is stored once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tuning


@triton.jit
def _rectangle(rects_ptr, e, exists, stride_re, stride_rc, R, C):
    """First and last column and row, cut off at the grid, and the number of cells, at least 1."""
    rects_ptr += e * stride_re
    col0 = tl.maximum(tl.load(rects_ptr, mask=exists, other=0), 0)
    row0 = tl.maximum(tl.load(rects_ptr + stride_rc, mask=exists, other=0), 0)
    col1 = tl.minimum(tl.load(rects_ptr + 2 * stride_rc, mask=exists, other=0), C)
    row1 = tl.minimum(tl.load(rects_ptr + 3 * stride_rc, mask=exists, other=0), R)
    cells = tl.maximum(col1 - col0, 0) * tl.maximum(row1 - row0, 0)
    return col0, row0, col1, row1, tl.maximum(cells, 1).to(tl.float32)


@triton.jit
def _pool_kernel(
    x_ptr,
    rects_ptr,
    order_ptr,
    starts_ptr,
    y_ptr,
    R,
    C,
    D,
    stride_xn,
    stride_xr,
    stride_xc,
    stride_xd,
    stride_re,
    stride_rc,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x_ptr += n * stride_xn + d[None, :] * stride_xd
    end = tl.load(starts_ptr + n + 1)
    for start in range(tl.load(starts_ptr + n), end, BLOCK_E):
        place = start + tl.arange(0, BLOCK_E)
        e = tl.load(order_ptr + place, mask=place < end, other=0)
        col0, row0, col1, row1, cells = _rectangle(rects_ptr, e, place < end, stride_re, stride_rc, R, C)
        total = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
        for p_start in range(0, R * C, BLOCK_P):
            p = p_start + tl.arange(0, BLOCK_P)
            row, col = p // C, p % C
            x = tl.load(
                x_ptr + row.to(tl.int64)[:, None] * stride_xr + col.to(tl.int64)[:, None] * stride_xc,
                mask=(p < R * C)[:, None] & (d < D)[None, :],
                other=0.0,
            )
            inside = (row[None, :] >= row0[:, None]) & (row[None, :] < row1[:, None])
            inside &= (col[None, :] >= col0[:, None]) & (col[None, :] < col1[:, None])
            total = tl.dot(inside.to(x.dtype), x, total, input_precision="ieee")
        y = total / cells[:, None]
        y_ptrs = y_ptr + e[:, None] * D + d[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(place < end)[:, None] & (d < D)[None, :])


@triton.jit
def _pool_backward_kernel(
    dy_ptr,
    rects_ptr,
    order_ptr,
    starts_ptr,
    dx_ptr,
    R,
    C,
    D,
    stride_ye,
    stride_yd,
    stride_re,
    stride_rc,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(R * C, BLOCK_P)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    p = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row, col = p // C, p % C
    dx = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for place in range(tl.load(starts_ptr + n), tl.load(starts_ptr + n + 1)):
        e = tl.load(order_ptr + place)
        col0, row0, col1, row1, cells = _rectangle(rects_ptr, e, True, stride_re, stride_rc, R, C)
        dy = tl.load(dy_ptr + e * stride_ye + d * stride_yd, mask=d < D, other=0.0).to(tl.float32) / cells
        inside = (row >= row0) & (row < row1) & (col >= col0) & (col < col1)
        dx += tl.where(inside[:, None], dy[None, :], 0.0)
    dx_ptrs = dx_ptr + (n * R * C + p[:, None]) * D + d[None, :]
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=(p < R * C)[:, None] & (d < D)[None, :])


def pool(x: Tensor, rects: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """Means (E, D) of the rectangles order[starts[n]:starts[n + 1]] of each image n of x (N, R, C, D)."""
    N, R, C, D = x.shape
    y = x.new_empty(rects.shape[0], D)
    if y.numel() == 0 or N == 0:
        return y
    tile = tuning.region_tile(D, x.element_size())
    with torch.cuda.device_of(x):
        _pool_kernel[(N, triton.cdiv(D, tile.block_d))](
            x, rects, order, starts, y, R, C, D, *x.stride(), *rects.stride(),
            BLOCK_E=tile.block_index, BLOCK_P=tile.block_rows, BLOCK_D=tile.block_d, num_warps=tile.warps,
        )  # fmt: skip
    return y


def pool_backward(dy: Tensor, rects: Tensor, order: Tensor, starts: Tensor, rows: int, columns: int) -> Tensor:
    """Gradient of x (N, rows, columns, D) for dy (E, D)."""
    N, D = starts.shape[0] - 1, dy.shape[1]
    dx = dy.new_empty(N, rows, columns, D)
    if dx.numel() == 0:
        return dx
    tile = tuning.region_tile(D, dy.element_size(), backward=True)
    with torch.cuda.device_of(dy):
        _pool_backward_kernel[(N * triton.cdiv(rows * columns, tile.block_rows), triton.cdiv(D, tile.block_d))](
            dy, rects, order, starts, dx, rows, columns, D, *dy.stride(), *rects.stride(),
            BLOCK_P=tile.block_rows, BLOCK_D=tile.block_d, num_warps=tile.warps,
        )  # fmt: skip
    return dx
