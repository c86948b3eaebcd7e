"""Specifications of all operators, in plain torch.

Differentiable by autograd, in the dtype of the inputs (statistics at least fp32), quadratic in memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def itc_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    rows: slice | None = None,
    world_size: int = 1,
) -> Tensor:
    """Symmetric contrastive loss of all pairs (B, D), (B, D): the share of the pairs in `rows`, times `world_size`."""
    B = image.shape[0]
    logits = (image @ text.T).to(_at_least_fp32(image.dtype)) * logit_scale.reshape(())
    same = torch.eye(B, device=image.device) if ids is None else ids[:, None] == ids[None, :]
    same = same.to(logits.dtype)
    # q_ij = (1 - eps) y_ij / n_i + eps / B, symmetric
    targets = (1.0 - label_smoothing) * same / same.sum(1, keepdim=True) + label_smoothing / B
    row = -(targets * logits.log_softmax(1)).sum(1)
    column = -(targets * logits.log_softmax(0)).sum(0)
    terms = (row + column) / 2
    return terms[rows if rows is not None else slice(None)].sum() * (world_size / B)


def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    rows: slice | None = None,
    world_size: int = 1,
) -> Tensor:
    """Pairwise sigmoid loss: the share of the images in `rows`, times `world_size`."""
    B = image.shape[0]
    logits = (image @ text.T).to(_at_least_fp32(image.dtype)) * logit_scale.reshape(()) + logit_bias.reshape(())
    labels = 2 * torch.eye(B, dtype=logits.dtype, device=image.device) - 1
    terms = -F.logsigmoid(labels * logits).sum(1)
    return terms[rows if rows is not None else slice(None)].sum() * (world_size / B)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def attentive_select(
    patches: Tensor,
    tokens: Tensor,
    valid: Tensor,
    num_masked: int,
    num_dropped: int,
    block: int = 1,
    grid: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scores (B, P) and the index lists masked, visible, dropped, kept of patches (B, P, D) under tokens (B, T, D)."""
    B, P, _ = patches.shape
    dtype = _at_least_fp32(patches.dtype)
    v = F.normalize(patches.to(dtype), dim=2, eps=1e-8)
    t = F.normalize(tokens.to(dtype), dim=2, eps=1e-8)
    # s_i = max_j <v_i, t_j> / (|v_i| |t_j|)
    scores = v.new_zeros(B, P)
    if tokens.shape[1] > 0:
        similarity = (v @ t.mT).masked_fill(~valid[:, None, :], -torch.inf)
        scores = similarity.amax(2).masked_fill(~valid.any(1, keepdim=True), 0.0)
    rows, columns = grid if grid is not None else (1, P)
    units = scores.reshape(B, rows // block, block, columns // block, block).permute(0, 1, 3, 2, 4).flatten(3).unbind(3)
    total = units[0]
    for unit in units[1:]:
        total = total + unit
    order = total.flatten(1).sort(dim=1, descending=True, stable=True).indices
    # (B, units, block * block): the patches of each unit
    members = torch.arange(P, device=patches.device).reshape(rows // block, block, columns // block, block)
    members = members.permute(0, 2, 1, 3).reshape(-1, block * block)
    ranked = members[order].flatten(1)
    lists = ranked[:, :num_masked], ranked[:, num_masked:], ranked[:, P - num_dropped :], ranked[:, : P - num_dropped]
    return scores, *(indices.sort(dim=1).values for indices in lists)


def gather_patches(x: Tensor, index: Tensor, pos: Tensor | None = None, prefix: Tensor | None = None) -> Tensor:
    """Rows of x (B, P, D) at index (B, K), plus pos (P, D) there, behind prefix (D,) or (B, D)."""
    B, _, D = x.shape
    dtype = _at_least_fp32(x.dtype)
    rows = x.gather(1, index[:, :, None].expand(-1, -1, D)).to(dtype)
    if pos is not None:
        rows = rows + pos[index].to(dtype)
    if prefix is not None:
        rows = torch.cat([prefix.to(dtype).expand(B, D)[:, None], rows], dim=1)
    return rows.to(x.dtype)


def scatter_patches(x: Tensor, index: Tensor, fill: Tensor, num_patches: int, pos: Tensor | None = None) -> Tensor:
    """Rows of x (B, K, D) at their places index (B, K) among P, fill (D,) elsewhere, plus pos (P, D)."""
    B, _, D = x.shape
    dtype = _at_least_fp32(x.dtype)
    out = fill.to(dtype).expand(B, num_patches, D).scatter(1, index[:, :, None].expand(-1, -1, D), x.to(dtype))
    if pos is not None:
        out = out + pos.to(dtype)
    return out.to(x.dtype)


def masked_patch_loss(
    pred: Tensor, images: Tensor, index: Tensor, patch_size: int, kind: str = "l1", reduction: str = "mean"
) -> Tensor:
    """Error of pred (B, K, p p C) against the pixels of the patches index (B, K) of images (B, C, H, W)."""
    B, C, H, W = images.shape
    p = patch_size
    dtype = _at_least_fp32(pred.dtype)
    patches = images.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)
    patches = patches.reshape(B, (H // p) * (W // p), p * p * C)
    target = patches.gather(1, index[:, :, None].expand(-1, -1, p * p * C)).to(dtype)
    if kind == "mse_normalised":
        target = target - target.mean(2, keepdim=True)
        target = target / (target.square().mean(2, keepdim=True) + 1e-6).sqrt()
    error = pred.to(dtype) - target
    total = error.abs().sum() if kind == "l1" else error.square().sum()
    return total / max(1, pred.numel()) if reduction == "mean" else total


def region_pool(x: Tensor, rects: Tensor, image_index: Tensor) -> Tensor:
    """Mean (E, D) of the cells of x (N, R, C, D)[image_index] in rects (E, 4) = [col0, row0, col1, row1); else 0."""
    _, R, C, _ = x.shape
    row, column = torch.arange(R, device=x.device), torch.arange(C, device=x.device)
    col0, row0, col1, row1 = rects[:, :, None].unbind(1)
    rows, columns = (row >= row0) & (row < row1), (column >= col0) & (column < col1)
    inside = rows[:, :, None, None] & columns[:, None, :, None]
    cells = x[image_index].to(_at_least_fp32(x.dtype))
    total = torch.where(inside, cells, 0.0).sum((1, 2))
    return (total / inside.sum((1, 2)).clamp_min(1)).to(x.dtype)


def box_loss(pred: Tensor, target: Tensor, valid: Tensor, reduction: str = "mean") -> tuple[Tensor, Tensor]:
    """L1 and 1 - GIoU of boxes (E, 4) = (cx, cy, w, h) over the valid ones (E,)."""
    dtype = _at_least_fp32(pred.dtype)
    pred, target = (torch.where(valid[:, None], box.to(dtype), 0.5) for box in (pred, target))
    l1 = (pred - target).abs().sum(1)
    (low, high), (target_low, target_high) = (_corners(box) for box in (pred, target))
    overlap = (torch.minimum(high, target_high) - torch.maximum(low, target_low)).clamp_min(0)
    hull = torch.maximum(high, target_high) - torch.minimum(low, target_low)
    I, C = (side[:, 0] * side[:, 1] for side in (overlap, hull))
    A, B = (side[:, 0] * side[:, 1] for side in (high - low, target_high - target_low))
    U = A + B - I
    # 1 - GIoU = (U - I) / U + (C - U) / C
    giou = _ratio(U - I, U) + _ratio(C - U, C)
    count = valid.sum().clamp_min(1) if reduction == "mean" else 1
    return tuple(torch.where(valid, value, 0.0).sum() / count for value in (l1, giou))


def _corners(box: Tensor) -> tuple[Tensor, Tensor]:
    half = box[:, 2:].clamp_min(0) / 2
    return box[:, :2] - half, box[:, :2] + half


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    present = whole > 1e-12
    return torch.where(present, part / torch.where(present, whole, 1.0), 0.0)


def sample_hard_negatives(
    image: Tensor, text: Tensor, logit_scale: Tensor, ids: Tensor | None, floor: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """For each text an image (B,) and for each image a text (B,), P(j) ~ softmax_j + floor over its negatives."""
    B = image.shape[0]
    ids = torch.arange(B, device=image.device) if ids is None else ids
    dtype = _at_least_fp32(image.dtype)
    logits = (image.to(dtype) @ text.to(dtype).T) * logit_scale.reshape(()).to(dtype)
    negative = ids[:, None] != ids[None, :]
    rows = torch.arange(B, device=image.device)
    text_negative = _draw(logits, negative, floor, _uniform(seed, 2 * rows))
    return _draw(logits.T, negative, floor, _uniform(seed, 2 * rows + 1)), text_negative


def _draw(logits: Tensor, negative: Tensor, floor: float, u: Tensor) -> Tensor:
    """The first j whose cumulative weight exceeds u times the sum of all, -1 where no weight is."""
    if floor == 0:
        # only negatives weigh, so that none is too small beside a positive
        logits = logits.masked_fill(~negative, -torch.inf)
    weights = torch.where(negative, logits.softmax(1).double() + floor, 0.0)
    cdf = weights.cumsum(1)
    total = cdf[:, -1:]
    # rounding must not carry the threshold to the end
    threshold = torch.minimum(u[:, None] * total, total * (1 - 2**-52))
    drawn = (cdf <= threshold).sum(1)
    exists = (total > 0) & total.isfinite()
    return torch.where(exists.any(1), drawn, -1)


def _uniform(seed: Tensor, counter: Tensor) -> Tensor:
    """Numbers in [0, 1) of 53 bits, fp64: the SplitMix64 sequence from where it takes the seed, at the counters."""
    return (_splitmix(_splitmix(seed) + (counter + 1) * -0x61C8864680B583EB) >> 11 & (1 << 53) - 1).double() * 2**-53


def _splitmix(z: Tensor) -> Tensor:
    """Finaliser of SplitMix64 on int64, whose shifts keep the sign."""
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return z ^ (z >> 31 & (1 << 33) - 1)
