"""Gathering and scattering of patches with torch operators."""

import torch
from torch import Tensor


def gather(x: Tensor, index: Tensor, pos: Tensor | None, prefix: Tensor | None) -> Tensor:
    """Rows of x (B, P, D) at index (B, K), plus pos (P, D), behind prefix (D,) or (B, D)."""
    B, _, D = x.shape
    lead = prefix is not None
    out = x.new_empty(B, lead + index.shape[1], D)
    if prefix is not None:
        out[:, 0] = prefix
    for b in range(B):
        rows = out[b, lead:]
        torch.index_select(x[b], 0, index[b], out=rows)
        if pos is not None:
            rows += pos.index_select(0, index[b])
    return out


def scatter(x: Tensor, index: Tensor, fill: Tensor | None, num_patches: int, pos: Tensor | None) -> Tensor:
    """Rows of x (B, K, D) at index (B, K) among P, fill (D,) elsewhere (None: zeros), plus pos (P, D)."""
    B, _, D = x.shape
    out = x.new_empty(B, num_patches, D)
    dtype = _sum_dtype(x)
    base = x.new_zeros(D, dtype=dtype) if fill is None else fill.to(dtype)
    out.copy_(base if pos is None else base + pos)
    for b in range(B):
        out[b].index_copy_(0, index[b], x[b] if pos is None else (x[b] + pos.index_select(0, index[b])).to(x.dtype))
    return out


def gather_backward(dy: Tensor, index: Tensor, num_patches: int, need_x: bool, need_pos: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x (B, P, D) and pos (P, D) for dy (B, K, D); empty where not needed."""
    D = dy.shape[2]
    dx = scatter(dy, index, None, num_patches, None)
    dpos = dx.sum(0, dtype=_sum_dtype(dy)) if need_pos else dy.new_empty(0, D, dtype=_sum_dtype(dy))
    return dx if need_x else dx.new_empty(0, num_patches, D), dpos


def scatter_backward(
    dy: Tensor, index: Tensor, need_x: bool, need_fill: bool, need_pos: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (B, K, D), fill (D,) and pos (P, D) for dy (B, P, D); empty where not needed."""
    B, P, D = dy.shape
    dtype = _sum_dtype(dy)
    dx = gather(dy, index, None, None) if need_x else dy.new_empty(0, index.shape[1], D)
    dpos = dy.sum(0, dtype=dtype) if need_pos else dy.new_empty(0, D, dtype=dtype)
    dfill = dy.new_empty(0, dtype=dtype)
    if need_fill:
        absent = torch.ones(B, P, dtype=torch.bool, device=dy.device).scatter_(1, index, False)
        dfill = dy[absent].sum(0, dtype=dtype)
    return dx, dfill, dpos


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
