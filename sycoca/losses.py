"""Losses that no kernel holds: next tokens without all their logits, token-wise contrast, features, global counts.

    caption:  sum_n lse(W x_n) - (W x_n)[y_n]
    local:    s_ab = mean_p max_t <v_ap, w_bt>,  r_ab = mean_t max_p <v_ap, w_bt>,  cross entropy of both over b and a
    features: smooth_l1(prediction_i, (z_i - mean z_i) / deviation z_i) of the masked patches i

Every loss is a sum of this rank over (global count / ranks), so that the mean over ranks is the global loss. Groups of
the local term lie within a rank; they are those of one process where their size divides every rank's pairs.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels import gather_patches

# Logits that are held at once: 64 MiB in fp32.
_CHUNK_LOGITS = 1 << 24


def token_loss(x: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of x W^T, summed over the tokens.

    Gradients are formed chunk by chunk in the forward pass, so that neither pass holds all logits.

    Args:
        x: (N, D) states.
        weight: (V, D).
        labels: (N,) int64; those below 0 are left out.
        label_smoothing: as in `torch.nn.functional.cross_entropy`, 0..1.

    Returns:
        () fp32 (fp64 for fp64 states).
    """
    return _TokenLoss.apply(x.to(_product_dtype(weight)), weight, labels, label_smoothing)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, labels: Tensor, eps: float) -> Tensor:
        N, V = x.shape[0], weight.shape[0]
        with torch.autocast(x.device.type, enabled=False):
            w = weight.to(x.dtype)
            loss = torch.zeros((), dtype=_statistics(x.dtype), device=x.device)
            dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
            dw = torch.zeros_like(weight, dtype=_statistics(x.dtype)) if ctx.needs_input_grad[1] else None
            rows = _chunk_rows(N, V)
            for start in range(0, N, rows):
                part = slice(start, start + rows)
                loss += _chunk(x[part], w, labels[part], eps, None if dx is None else dx[part], dw)
        ctx.save_for_backward(dx, None if dw is None else dw.to(weight.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        return *(None if d is None else (d * dloss).to(d.dtype) for d in (dx, dw)), None, None


def _chunk_rows(N: int, V: int) -> int:
    return max(1, min(max(64, _CHUNK_LOGITS // V), -(-N // 4)))


def _statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunk(x: Tensor, w: Tensor, labels: Tensor, eps: float, dx: Tensor | None, dw: Tensor | None) -> Tensor:
    """Loss of some tokens; dx is filled and dw added to, where given."""
    logits = x @ w.T
    logits = logits.to(_statistics(logits.dtype))
    counted = labels >= 0
    index = labels.clamp(min=0)[:, None]
    lse = logits.logsumexp(1)
    # (1 - eps) (lse - l_y) + eps (lse - mean l)
    loss = lse - (1 - eps) * logits.gather(1, index).squeeze(1)
    if eps > 0:
        loss = loss - eps * logits.mean(1)
    loss = torch.where(counted, loss, 0.0).sum()
    if dx is None and dw is None:
        return loss
    # G = softmax - (1 - eps) onehot - eps / V
    G = logits.sub_(lse[:, None]).exp_()
    if eps > 0:
        G -= eps / w.shape[0]
    G.scatter_add_(1, index, torch.full_like(index, eps - 1, dtype=G.dtype))
    G = G.mul_(counted[:, None]).to(x.dtype)
    if dx is not None:
        torch.mm(G, w, out=dx)
    if dw is not None:
        dw += G.T @ x
    return loss


def local_loss(patches: Tensor, words: Tensor, valid: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """Symmetric token-wise contrastive loss (FILIP, arXiv 2111.07783) within groups, summed over the pairs.

    Args:
        patches: (B, P, D) fp32, unit rows.
        words: (B, T, D) fp32, unit rows.
        valid: (B, T) bool; a caption without a valid token is nobody's positive or negative.
        scale: (1,) fp32, multiplies the similarities.
        group_size: consecutive pairs that are contrasted with one another; the last group may be smaller.

    Returns:
        () fp32: the sum over the pairs with a valid token of both directions' mean.
    """
    total = torch.zeros((), dtype=torch.float32, device=patches.device)
    for start in range(0, patches.shape[0], group_size):
        part = slice(start, start + group_size)
        total = total + _group_loss(patches[part], words[part], valid[part], scale)
    return total


def _group_loss(v: Tensor, w: Tensor, valid: Tensor, scale: Tensor) -> Tensor:
    dtype = _product_dtype(v)
    image, text = _TokenwiseSimilarity.apply(v.to(dtype), w.to(dtype), valid)
    present = valid.any(1)
    image, text = ((scale * s).masked_fill(~present, -1e4) for s in (image, text.T))
    target = torch.arange(v.shape[0], device=v.device)
    pair = F.cross_entropy(image, target, reduction="none") + F.cross_entropy(text, target, reduction="none")
    return torch.where(present, pair, 0.0).sum() / 2


class _TokenwiseSimilarity(torch.autograd.Function):
    """s and r of a group, each (G, G), image by caption; only the winners of the maxima are kept for backward."""

    @staticmethod
    def forward(ctx, v: Tensor, w: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        G, P, _ = v.shape
        T = w.shape[1]
        # One more dimension puts invalid tokens below every cosine inside the product.
        v1 = F.pad(v, (0, 1), value=1.0)
        w1 = torch.cat([w, (valid.to(w.dtype) - 1)[:, :, None] * 3], dim=2)
        with torch.autocast(v.device.type, enabled=False):
            cosines = (v1.flatten(0, 1) @ w1.flatten(0, 1).T).view(G, P, G, T)
        best, token = cosines.max(3)
        top, patch = cosines.max(1)
        tokens = valid.sum(1).clamp(min=1)
        ctx.save_for_backward(v, w, valid, tokens, token, patch)
        return best.float().mean(1), (top.float() * valid).sum(2) / tokens

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, ds: Tensor, dr: Tensor) -> tuple[Tensor, Tensor, None]:
        v, w, valid, tokens, token, patch = ctx.saved_tensors
        G, P, _ = v.shape
        dcosines = v.new_zeros(G, P, G, w.shape[1])
        share = (ds / P).to(v.dtype)[:, None, :, None].expand(G, P, G, 1)
        dcosines.scatter_(3, token[:, :, :, None], share)
        share = ((dr / tokens)[:, :, None] * valid).to(v.dtype)
        dcosines.scatter_add_(1, patch[:, None], share[:, None])
        dcosines = dcosines.view(v.shape[0] * P, -1)
        return (dcosines @ w.flatten(0, 1)).view_as(v), (dcosines.T @ v.flatten(0, 1)).view_as(w), None


def feature_targets(patches: Tensor) -> Tensor:
    """Features as targets: each patch of mean 0 and variance 1, which keeps them from shrinking to a constant.

    As in data2vec (arXiv 2202.03555) and I-JEPA (arXiv 2301.08243), whose target is, as here, the last layer alone.

    Args:
        patches: (B, P, D).

    Returns:
        (B, P, D) fp32 (fp64 for fp64 features).
    """
    return F.layer_norm(patches.to(_statistics(patches.dtype)), patches.shape[-1:])


def feature_loss(pred: Tensor, targets: Tensor, index: Tensor) -> Tensor:
    """Smooth L1 of predicted features, summed; as in I-JEPA quadratic below a difference of 1.

    Args:
        pred: (B, K, D).
        targets: (B, P, D) from `feature_targets`, without gradient.
        index: (B, K) int64, the patches that are predicted.

    Returns:
        () fp32 (fp64 for fp64 targets).
    """
    return F.smooth_l1_loss(pred.to(targets.dtype), gather_patches(targets, index), reduction="sum")


def _product_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def global_counts(counts: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """Counts (C,) int64 summed over the group, and its number of ranks."""
    if group is None:
        return counts, 1
    dist.all_reduce(counts, group=group)
    return counts, dist.get_world_size(group)
