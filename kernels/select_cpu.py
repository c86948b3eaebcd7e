"""Attentive patch selection with torch operators.

Blocks of samples, whose similarities stay in the cache. Only valid tokens are multiplied: they come first in a block's
table, and shorter captions are filled up with their first one, which changes no maximum.
"""

import torch
from torch import Tensor

BLOCK_SAMPLES = 8


def select(
    patches: Tensor,
    tokens: Tensor,
    valid: Tensor,
    num_masked: int,
    num_dropped: int,
    block: int,
    columns: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scores (B, P) and the index lists masked, visible, dropped, kept."""
    P = patches.shape[1]
    scores = _scores(patches, tokens, valid, eps)
    rank = _ranks(scores, block, columns)
    masked = rank < num_masked
    first, rest = _indices(masked, num_masked), _indices(~masked, P - num_masked)
    if num_masked + num_dropped == P:
        return scores, first, rest, rest.clone(), first.clone()
    dropped = rank >= P - num_dropped
    return scores, first, rest, _indices(dropped, num_dropped), _indices(~dropped, P - num_dropped)


def _scores(patches: Tensor, tokens: Tensor, valid: Tensor, eps: float) -> Tensor:
    B, P, D = patches.shape
    T = tokens.shape[1]
    dtype = torch.float64 if patches.dtype == torch.float64 else torch.float32
    count = valid.sum(1)
    counts = count.tolist()
    best = torch.zeros(B, P, dtype=dtype)
    if P == 0 or max(counts, default=0) == 0:
        return best
    order = (~valid).to(torch.uint8).sort(dim=1, stable=True).indices
    order = torch.where(torch.arange(T) < count[:, None], order, order[:, :1])
    norm = torch.ones(B, P, dtype=dtype)
    for start in range(0, B, BLOCK_SAMPLES):
        samples = slice(start, start + BLOCK_SAMPLES)
        shortest, longest = min(counts[samples]), max(counts[samples])
        if longest == 0:
            continue
        v, t = patches[samples].to(dtype), tokens[samples].to(dtype)
        if shortest < T:
            rows = order[samples, :longest] + torch.arange(len(t))[:, None] * T
            t = t.reshape(-1, D).index_select(0, rows.view(-1)).view(-1, longest, D)
        t = t / torch.linalg.vector_norm(t, dim=2, keepdim=True).clamp_min_(eps)
        torch.amax(torch.bmm(v, t.mT), 2, out=best[samples])
        torch.linalg.vector_norm(v, dim=2, out=norm[samples])
    # -0.0 becomes 0.0
    return best.div_(norm.clamp_min_(eps)).masked_fill_(count[:, None] == 0, 0.0).add_(0.0)


def _ranks(scores: Tensor, block: int, columns: int) -> Tensor:
    """Place (B, P) of each patch in the order; patches of a square share the first one's."""
    B, P = scores.shape
    if block > 1:
        squares = scores.view(B, -1, block, columns // block, block)
        # the sum of a square's scores, added row by row
        total = squares[:, :, 0, :, 0].clone()
        for member in range(1, block * block):
            total += squares[:, :, member // block, :, member % block]
        rank = _ranks(total.flatten(1), 1, 0) * block**2
        rank = rank.view(B, -1, 1, columns // block, 1).expand(-1, -1, block, -1, block)
        return rank.reshape(B, P)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(1, order, torch.arange(P).expand(B, P))


def _indices(chosen: Tensor, count: int) -> Tensor:
    """The places (B, count) of a mask with `count` of them in each row, ascending."""
    return chosen.nonzero()[:, 1].reshape(chosen.shape[0], count).contiguous()
