"""Attentive patch selection with torch operators.

Only valid tokens are multiplied: they are packed first, so that neither padding nor a mask of similarities costs
anything, and the similarities of one sample at a time stay in the cache.
"""

import torch
from torch import Tensor


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
    B, P, _ = patches.shape
    dtype = torch.float64 if patches.dtype == torch.float64 else torch.float32
    counts = valid.sum(1).tolist()
    packed = tokens[valid].to(dtype)
    packed /= torch.linalg.vector_norm(packed, dim=1, keepdim=True).clamp_min_(eps)
    best = patches.new_zeros(B, P, dtype=dtype)
    if P == 0 or packed.shape[0] == 0:
        return best
    if min(counts) == max(counts):
        torch.amax(torch.bmm(patches.to(dtype), packed.view(B, counts[0], -1).mT), 2, out=best)
        norm = torch.linalg.vector_norm(patches, dim=2, dtype=dtype)
        return best.div_(norm.clamp_min_(eps)).add_(0.0)
    similarity = torch.empty(P * max(counts), dtype=dtype)
    norm = torch.ones(B, P, dtype=dtype)
    # (n, D) tokens of each sample
    for v, t, s, length in zip(patches, packed.split(counts), best, norm):
        if t.shape[0]:
            product = similarity[: P * t.shape[0]].view(P, -1)
            v = v.to(dtype)
            torch.mm(v, t.mT, out=product)
            torch.amax(product, 1, out=s)
            torch.linalg.vector_norm(v, dim=1, out=length)
    # -0.0 becomes 0.0
    return best.div_(norm.clamp_min_(eps)).add_(0.0)


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
