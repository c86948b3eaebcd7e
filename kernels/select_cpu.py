"""Attentive patch selection with torch operators.

Blocks of samples, whose similarities stay in the cache. Only valid tokens are multiplied: they come first in a block's
table, and shorter captions are filled up with their first one, which changes no maximum. A list is what passes the
score of its last member; only where others tie with that score is the whole order formed.
"""

import torch
from torch import Tensor

# similarities of a block, or features where they are converted: fp32 values that the last-level cache holds
BLOCK_VALUES = 1024 * 1024


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
    scores = _scores(patches, tokens, valid, eps)
    first, rest = _split(scores, num_masked, block, columns)
    if num_masked + num_dropped == scores.shape[1]:
        return scores, first, rest, rest.clone(), first.clone()
    kept, dropped = _split(scores, scores.shape[1] - num_dropped, block, columns)
    return scores, first, rest, dropped, kept


def _scores(patches: Tensor, tokens: Tensor, valid: Tensor, eps: float) -> Tensor:
    B, P, D = patches.shape
    T = tokens.shape[1]
    dtype = torch.float64 if patches.dtype == torch.float64 else torch.float32
    count = valid.sum(1)
    counts = count.tolist()
    best = torch.zeros(B, P, dtype=dtype)
    if P == 0 or max(counts, default=0) == 0:
        return best
    if min(counts) < T:
        order = (~valid).to(torch.uint8).sort(dim=1, stable=True).indices
        order = torch.where(torch.arange(T) < count[:, None], order, order[:, :1])
    norm = torch.ones(B, P, dtype=dtype)
    step = max(1, BLOCK_VALUES // (P * max(T, D if patches.dtype != dtype else 0)))
    for start in range(0, B, step):
        samples = slice(start, start + step)
        shortest, longest = min(counts[samples]), max(counts[samples])
        if longest == 0:
            continue
        v, t = patches[samples].to(dtype), tokens[samples]
        if shortest < T:
            rows = order[samples, :longest] + torch.arange(len(t))[:, None] * T
            t = t.reshape(-1, D).index_select(0, rows.view(-1)).view(-1, longest, D)
        t = t.to(dtype)
        similarity = torch.bmm(t, v.mT)
        similarity /= torch.linalg.vector_norm(t, dim=2, keepdim=True).clamp_min_(eps)
        torch.amax(similarity, 1, out=best[samples])
        torch.linalg.vector_norm(v, dim=2, out=norm[samples])
    # -0.0 becomes 0.0
    return best.div_(norm.clamp_min_(eps)).masked_fill_(count[:, None] == 0, 0.0).add_(0.0)


def _split(scores: Tensor, count: int, block: int, columns: int) -> tuple[Tensor, Tensor]:
    """The first `count` patches of the order (B, count) and the others (B, P - count), both ascending."""
    B, P = scores.shape
    if block == 1:
        chosen = _first(scores, count)
    else:
        squares = scores.view(B, -1, block, columns // block, block)
        # the sum of a square's scores, added row by row
        total = squares[:, :, 0, :, 0].clone()
        for member in range(1, block * block):
            total += squares[:, :, member // block, :, member % block]
        chosen = _first(total.flatten(1), count // block**2).view(B, -1, 1, columns // block, 1)
        chosen = chosen.expand(-1, -1, block, -1, block).reshape(B, P)
    parts = (chosen, count), (~chosen, P - count)
    return tuple(part.nonzero()[:, 1].reshape(B, length).contiguous() for part, length in parts)


def _first(scores: Tensor, count: int) -> Tensor:
    """Which of the scores (B, N) are the first `count` of their row, score descending, index ascending."""
    B, N = scores.shape
    if B == 0 or count in (0, N):
        return torch.full((B, N), count == N)
    chosen = scores >= scores.kthvalue(N - count + 1, dim=1, keepdim=True).values
    if bool((chosen.sum(1) == count).all()):
        return chosen
    # ties, or scores that are no numbers
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(chosen).scatter_(1, order[:, :count], True)
