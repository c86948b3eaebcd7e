"""Gathering and scattering of patches with torch operators, in blocks of samples that stay in the cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

# bytes of a block of rows: what is written is read again before it leaves the last-level cache
BLOCK_BYTES = 2 * 1024 * 1024


def gather(x: Tensor, index: Tensor, pos: Tensor | None, prefix: Tensor | None) -> Tensor:
    """Rows of x (B, P, D) at index (B, K), plus pos (P, D), behind prefix (D,) or (B, D)."""
    B, P, D = x.shape
    if prefix is not None:
        # the row of the prefix is gathered like the others, and overwritten
        index = torch.cat([index.new_zeros(B, 1), index], dim=1)
    K = index.shape[1]
    y = torch.empty(B, K, D, dtype=x.dtype)
    if y.numel() == 0 or P == 0:
        return y if prefix is None else y.copy_(prefix.expand(B, D)[:, None])
    scratch = None
    for samples in _blocks(B, K * D * x.element_size()):
        count = samples.stop - samples.start
        rows = y[samples].view(count * K, D)
        first = torch.arange(count)[:, None] * P
        torch.index_select(x[samples].reshape(count * P, D), 0, (index[samples] + first).reshape(-1), out=rows)
        if pos is not None:
            scratch = torch.empty(count * K, D, dtype=pos.dtype) if scratch is None else scratch
            there = scratch[: count * K]
            torch.index_select(pos, 0, index[samples].reshape(-1), out=there)
            rows += there
    if prefix is not None:
        y[:, 0] = prefix
    return y


def scatter(x: Tensor, index: Tensor, fill: Tensor | None, num_patches: int, pos: Tensor | None) -> Tensor:
    """Rows of x (B, K, D) at index (B, K) among P, fill (D,) elsewhere (None: zeros), plus pos (P, D)."""
    B, K, D = x.shape
    P = num_patches
    y = torch.empty(B, P, D, dtype=x.dtype)
    if y.numel() == 0:
        return y
    dtype = _sum_dtype(x)
    # fill is the last row of a block's table
    table = torch.empty(0)
    last = torch.zeros(D, dtype=dtype) if fill is None else fill
    source = _inverse(index, P)
    for samples in _blocks(B, P * D * x.element_size()):
        count = samples.stop - samples.start
        if table.shape[0] == 0:
            # an fp32 fill is not rounded before pos is added
            table = torch.empty(count * K + 1, D, dtype=x.dtype if pos is None else dtype)
            table[count * K] = last
            end = count * K
        table[: count * K].view(count, K, D).copy_(x[samples])
        first = torch.arange(count)[:, None] * K
        places = torch.where(source[samples] < 0, end, source[samples] + first).reshape(-1)
        rows = y[samples].view(count * P, D)
        if pos is None:
            torch.index_select(table, 0, places, out=rows)
        elif table.dtype == y.dtype:
            torch.index_select(table, 0, places, out=rows)
            y[samples] += pos
        else:
            torch.add(table.index_select(0, places).view(count, P, D), pos, out=y[samples])
    return y


def gather_backward(dy: Tensor, index: Tensor, num_patches: int, need_x: bool, need_pos: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x (B, P, D) and pos (P, D) for dy (B, K, D); empty where not needed."""
    D = dy.shape[2]
    dx = dy.new_empty(0, num_patches, D)
    if need_x:
        dx = scatter(dy, index, None, num_patches, None)
    return dx, _sum_by_place(dy, index, num_patches) if need_pos else dy.new_empty(0, D, dtype=_sum_dtype(dy))


def scatter_backward(
    dy: Tensor, index: Tensor, need_x: bool, need_fill: bool, need_pos: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (B, K, D), fill (D,) and pos (P, D) for dy (B, P, D); empty where not needed."""
    P, D = dy.shape[1:]
    dtype = _sum_dtype(dy)
    dx = gather(dy, index, None, None) if need_x else dy.new_empty(0, index.shape[1], D)
    dpos = dy.sum(0, dtype=dtype) if need_pos else dy.new_empty(0, D, dtype=dtype)
    dfill = dy.new_empty(0, dtype=dtype)
    if need_fill:
        # present rows go to the place that is left out
        present = (_inverse(index, P) >= 0).to(torch.int64)
        dfill = _sum_by_place(dy, present, 1, left_out=1)[0]
    return dx, dfill, dpos


def _sum_by_place(dy: Tensor, index: Tensor, places: int, left_out: int = -1) -> Tensor:
    """Sums (places, D) of the rows of dy (B, K, D) with equal index (B, K)."""
    D = dy.shape[2]
    total = torch.zeros(places, D, dtype=_sum_dtype(dy))
    for samples in _blocks(dy.shape[0], dy.shape[1] * D * total.element_size()):
        rows, there = dy[samples].reshape(-1, D).to(total.dtype), index[samples].reshape(-1)
        total += torch.ops.aten.embedding_dense_backward(rows, there, max(places, left_out + 1), left_out, False)[
            :places
        ]
    return total


def _inverse(index: Tensor, P: int) -> Tensor:
    """The k with index[k] = p for each of P places, (B, P), or -1."""
    B, K = index.shape
    return torch.full((B, P), -1).scatter_(1, index, torch.arange(K).expand(B, K))


def _blocks(B: int, sample_bytes: int) -> Iterator[slice]:
    """Slices of the batch of about BLOCK_BYTES each."""
    step = max(1, BLOCK_BYTES // max(1, sample_bytes))
    for start in range(0, B, step):
        yield slice(start, min(start + step, B))


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
