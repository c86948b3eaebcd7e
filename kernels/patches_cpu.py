"""Gathering and scattering of patches with torch operators.

Operators over the whole batch, as each one wakes every thread: rows are moved once, and positions added while they are
still in the last-level cache. Rows of 16 bits are added in fp32, in blocks of samples. Sums over samples are bags of
rows: each total stays in registers.
"""

import functools
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

# fp32 values of a block of 16-bit rows: scratch that the next operator finds in the cache
BLOCK_VALUES = 512 * 1024
# samples that one bag adds up in turn; their totals are added pairwise
BAG_SAMPLES = 128


def gather(x: Tensor, index: Tensor, pos: Tensor | None, prefix: Tensor | None) -> Tensor:
    """Rows of x (B, P, D) at index (B, K), plus pos (P, D), behind prefix (D,) or (B, D)."""
    B, _, D = x.shape
    K, lead = index.shape[1], int(prefix is not None)
    y = torch.empty(B, lead + K, D, dtype=x.dtype)
    if y.numel() == 0:
        return y
    if K > 0:
        table, places = _table(x, index)
        if lead:
            # the prefix's row is moved like the others, and overwritten
            places = torch.cat([places[:, :1], places], dim=1)
        if pos is None or pos.dtype == x.dtype == _sum_dtype(x):
            torch.index_select(table, 0, places.view(-1), out=y.view(-1, D))
            if pos is not None:
                _add_rows(y, pos, index, lead)
        else:
            _gather_rounded(y[:, lead:], table, places[:, lead:], pos, index)
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
    if fill is None and pos is None:
        return _spread(x, index, P)
    if pos is None:
        y.copy_(fill)
        y.view(B * P, D).index_copy_(0, _places(index, P).view(-1), x.reshape(B * K, D))
        return y
    dtype = _sum_dtype(x)
    # what a place gets where a row is added, and where none is
    base = torch.cat([pos.to(dtype), pos.to(dtype) + (0 if fill is None else fill.to(dtype))])
    source = (torch.arange(P) + P).repeat(B, 1).scatter_(1, index, index)
    if x.dtype == dtype:
        rows = y.view(B * P, D)
        torch.index_select(base, 0, source.view(-1), out=rows)
        rows.index_add_(0, _places(index, P).view(-1), x.reshape(B * K, D))
        return y
    for samples in _blocks(B, P * D):
        rows = base.index_select(0, source[samples].reshape(-1))
        rows.index_add_(0, _places(index[samples], P).view(-1), x[samples].reshape(-1, D).to(dtype))
        y[samples].view(-1, D).copy_(rows)
    return y


def gather_backward(dy: Tensor, index: Tensor, num_patches: int, need_x: bool, need_pos: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x (B, P, D) and pos (P, D) for dy (B, K, D); empty where not needed."""
    D = dy.shape[2]
    dx = _spread(dy, index, num_patches) if need_x else dy.new_empty(0, num_patches, D)
    return dx, _sum_by_key(dy, index, num_patches) if need_pos else dy.new_empty(0, D, dtype=_sum_dtype(dy))


def scatter_backward(
    dy: Tensor, index: Tensor, need_x: bool, need_fill: bool, need_pos: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (B, K, D), fill (D,) and pos (P, D) for dy (B, P, D); empty where not needed."""
    B, P, D = dy.shape
    dtype = _sum_dtype(dy)
    dx = gather(dy, index, None, None) if need_x else dy.new_empty(0, index.shape[1], D)
    dfill, dpos = dy.new_empty(0, dtype=dtype), dy.new_empty(0, D, dtype=dtype)
    if need_fill:
        # one reading: the sums of a place's rows where a row was placed, and where none was
        key = (torch.arange(P) + P).repeat(B, 1).scatter_(1, index, index)
        present, absent = _sum_by_key(dy, key, 2 * P).view(2, P, D)
        dfill, dpos = absent.sum(0), present.add_(absent) if need_pos else dpos
    elif need_pos:
        dpos = dy.sum(0, dtype=dtype)
    return dx, dfill, dpos


def _add_rows(y: Tensor, table: Tensor, index: Tensor, lead: int) -> None:
    """Add the rows of table (P, D) at index (B, K) to y (B, lead + K, D), behind its first `lead` ones."""
    B, K = index.shape
    rows = y.view(-1, y.shape[2])
    if not torch.backends.mkl.is_available():
        y[:, lead:] += table.index_select(0, index.reshape(-1)).view(B, K, -1)
        return
    # y + S table in one pass, with one entry in each row of S: no operator adds while it gathers
    ends = (torch.arange(B)[:, None] * K + torch.arange(1 - lead, K + 1)).view(-1)
    starts = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    entries = index.reshape(-1).to(torch.int32), torch.ones(B * K, dtype=table.dtype)
    _hear_that_csr_is_in_beta()
    with torch.autocast("cpu", enabled=False):
        rows.addmm_(torch.sparse_csr_tensor(starts, *entries, size=(len(rows), len(table))), table.contiguous())


@functools.cache
def _hear_that_csr_is_in_beta() -> None:
    """Torch says so once in a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1))


def _gather_rounded(y: Tensor, table: Tensor, places: Tensor, pos: Tensor, index: Tensor) -> None:
    """y (B, K, D) = table (N, D) at places (B, K) plus pos (P, D) at index (B, K), added in fp32."""
    B, K, D = y.shape
    dtype = _sum_dtype(y)
    for samples in _blocks(B, K * D):
        rows = pos.index_select(0, index[samples].reshape(-1)).to(dtype)
        # 16-bit rows are widened as they are added
        rows += table.index_select(0, places[samples].reshape(-1))
        y[samples] = rows.view(-1, K, D)


def _spread(x: Tensor, index: Tensor, P: int) -> Tensor:
    """Rows of x (B, K, D) at index (B, K) among P, zeros elsewhere: every place a bag of at most one row."""
    B, K, D = x.shape
    if K == 0 or B * P * D == 0:
        return torch.zeros(B, P, D, dtype=x.dtype)
    table, places = _table(x, torch.arange(K).expand(B, K))
    row = torch.full((B, P), -1).scatter_(1, index, places).view(-1)
    present = row >= 0
    ends = present.cumsum(0)
    return embedding_bag(row[present], table, ends - present.long(), mode="sum").view(B, P, D)


def _sum_by_key(dy: Tensor, key: Tensor, keys: int) -> Tensor:
    """Sums (keys, D) of the rows of dy (B, R, D) with equal key (B, R)."""
    B, R, D = dy.shape
    dtype = _sum_dtype(dy)
    total = torch.zeros(keys, D, dtype=dtype)
    if dy.numel() == 0:
        return total
    step = min(BAG_SAMPLES, B if dy.dtype == dtype else max(1, BLOCK_VALUES // (R * D)))
    for start in range(0, B, step):
        block, key_of_row = dy[start : start + step].to(dtype), key[start : start + step]
        table, places = _table(block, torch.arange(R).expand(len(block), R))
        order = key_of_row.reshape(-1).argsort(stable=True)
        counts = torch.bincount(key_of_row.reshape(-1), minlength=keys)
        total += embedding_bag(places.reshape(-1)[order], table, counts.cumsum(0) - counts, mode="sum")
    return total


def _table(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, P, D) as rows (N, D), without a copy where its samples are whole rows apart, and index (B, K) in them."""
    B, P, D = x.shape
    if B == 1 or x.stride(0) % D or x.stride()[1:] != (D, 1):
        return x.reshape(B * P, D), _places(index, P)
    step = x.stride(0) // D
    return x.as_strided(((B - 1) * step + P, D), (D, 1)), _places(index, step)


def _places(index: Tensor, P: int) -> Tensor:
    """index (B, K) in a table of P rows for each sample."""
    return (index + torch.arange(index.shape[0])[:, None] * P).contiguous()


def _blocks(B: int, values: int) -> Iterator[slice]:
    """Slices of the batch of about BLOCK_VALUES each, for so many values of a sample."""
    step = max(1, BLOCK_VALUES // max(1, values))
    for start in range(0, B, step):
        yield slice(start, min(start + step, B))


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
