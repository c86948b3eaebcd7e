"""Pooling of rectangles with torch operators.

An image's rectangles are one small product with its features: rows of zeros and ones. Its transpose is the gradient.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def pool(x: Tensor, rects: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """Means (E, D) of the rectangles order[starts[n]:starts[n + 1]] of each image n of x (N, R, C, D)."""
    _, R, C, D = x.shape
    dtype = _sum_dtype(x)
    inside = _inside(rects[order], R, C, dtype)
    total = torch.empty(len(rects), D, dtype=dtype)
    for n, members in _images(starts):
        if members.start < members.stop:
            torch.mm(inside[members], x[n].reshape(R * C, D).to(dtype), out=total[members])
    total /= _area(inside)
    pooled = torch.empty(len(rects), D, dtype=x.dtype)
    pooled[order] = total.to(x.dtype)
    return pooled


def pool_backward(dy: Tensor, rects: Tensor, order: Tensor, starts: Tensor, rows: int, columns: int) -> Tensor:
    """Gradient of x (N, rows, columns, D) for dy (E, D)."""
    D = dy.shape[1]
    dtype = _sum_dtype(dy)
    inside = _inside(rects[order], rows, columns, dtype)
    shares = dy[order].to(dtype).div_(_area(inside))
    dx = torch.empty(len(starts) - 1, rows, columns, D, dtype=dy.dtype)
    for n, members in _images(starts):
        cells = dx[n].view(rows * columns, D)
        if members.start == members.stop:
            cells.zero_()
        elif dy.dtype == dtype:
            torch.mm(inside[members].T, shares[members], out=cells)
        else:
            cells.copy_(inside[members].T @ shares[members])
    return dx


def _images(starts: Tensor) -> Iterator[tuple[int, slice]]:
    """Each image, and its rectangles in the order of the images."""
    bounds = starts.tolist()
    return ((n, slice(*bounds[n : n + 2])) for n in range(len(bounds) - 1))


def _inside(rects: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """(E, rows * columns): 1 in the rectangle, 0 elsewhere."""
    row, column = torch.arange(rows), torch.arange(columns)
    col0, row0, col1, row1 = rects[:, :, None].unbind(1)
    in_rows, in_columns = (row >= row0) & (row < row1), (column >= col0) & (column < col1)
    return (in_rows[:, :, None] & in_columns[:, None]).flatten(1).to(dtype)


def _area(inside: Tensor) -> Tensor:
    return inside.sum(1, keepdim=True).clamp_min_(1)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
