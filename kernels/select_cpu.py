"""Attentive patch selection with torch operators."""

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
    masked, dropped = _first_and_last(scores, num_masked, num_dropped, block, columns)
    return (
        scores,
        _indices(masked, num_masked),
        _indices(~masked, P - num_masked),
        _indices(dropped, num_dropped),
        _indices(~dropped, P - num_dropped),
    )


def _scores(patches: Tensor, tokens: Tensor, valid: Tensor, eps: float) -> Tensor:
    B, P, _ = patches.shape
    dtype = torch.float64 if patches.dtype == torch.float64 else torch.float32
    if tokens.shape[1] == 0:
        return patches.new_zeros(B, P, dtype=dtype)
    v, t = patches.to(dtype), tokens.to(dtype)
    t = t / torch.linalg.vector_norm(t, dim=2, keepdim=True).clamp_min_(eps)
    similarity = torch.bmm(v, t.mT).masked_fill_(~valid[:, None, :], -torch.inf)
    scores = similarity.amax(2).div_(torch.linalg.vector_norm(v, dim=2).clamp_min_(eps))
    return scores.masked_fill_(~valid.any(1, keepdim=True), 0.0)


def _first_and_last(
    scores: Tensor, num_masked: int, num_dropped: int, block: int, columns: int
) -> tuple[Tensor, Tensor]:
    """Which patches (B, P) are among the first and among the last of the order."""
    B, P = scores.shape
    if block > 1:
        units = scores.view(B, -1, block, columns // block, block)
        # the sum of a square's scores, added row by row
        total = units[:, :, 0, :, 0].clone()
        for member in range(1, block * block):
            total += units[:, :, member // block, :, member % block]
        first, last = _first_and_last(total.flatten(1), num_masked // block**2, num_dropped // block**2, 1, 0)
        shape = B, P // columns // block, 1, columns // block, 1
        return tuple(unit.view(shape).expand(-1, -1, block, -1, block).reshape(B, P) for unit in (first, last))
    order = scores.sort(dim=1, descending=True, stable=True).indices
    first, last = torch.zeros(2, B, P, dtype=torch.bool, device=scores.device)
    first.scatter_(1, order[:, :num_masked], True)
    last.scatter_(1, order[:, P - num_dropped :], True)
    return first, last


def _indices(chosen: Tensor, count: int) -> Tensor:
    """The places (B, count) of a mask with `count` of them in each row, ascending."""
    return chosen.nonzero()[:, 1].reshape(chosen.shape[0], count).contiguous()
