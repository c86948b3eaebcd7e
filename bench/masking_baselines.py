"""Best plain compositions for the masking operators."""

import torch
from torch import Tensor


def select(
    patches: Tensor, tokens: Tensor, valid: Tensor, num_masked: int, num_dropped: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attentive selection: patches are not normalised but their scores divided, and one order serves all lists."""
    P = patches.shape[1]
    t = torch.nn.functional.normalize(tokens, dim=2, eps=1e-8)
    scores = torch.bmm(patches, t.mT).masked_fill_(~valid[:, None], -torch.inf).amax(2).float()
    scores = scores / torch.linalg.vector_norm(patches, dim=2, dtype=torch.float32).clamp_min(1e-8)
    scores = scores.masked_fill(~valid.any(1, keepdim=True), 0.0)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(P, device=order.device).expand_as(order))

    def places(chosen: Tensor, count: int) -> Tensor:
        return chosen.nonzero()[:, 1].view(-1, count)

    masked, dropped = rank < num_masked, rank >= P - num_dropped
    return (
        scores,
        places(masked, num_masked),
        places(~masked, P - num_masked),
        places(dropped, num_dropped),
        places(~dropped, P - num_dropped),
    )


def patch_loss(pred: Tensor, images: Tensor, index: Tensor, patch_size: int, kind: str) -> Tensor:
    """Reconstruction error: only the chosen patches' runs of pixels are fetched, and compared channel by channel."""
    B, C, H, W = images.shape
    p, K, columns = patch_size, index.shape[1], W // patch_size
    sample = torch.arange(B, device=index.device)[:, None] * (C * H * columns)
    first = sample + index // columns * (p * columns) + index % columns
    channels, lines = torch.arange(C, device=index.device)[:, None], torch.arange(p, device=index.device)
    runs = (channels * (H * columns) + lines * columns).view(-1)
    target = images.view(-1, p).index_select(0, (first[:, :, None] + runs).view(-1)).view(B, K, C, p, p)
    if kind == "mse_normalised":
        variance, mean = torch.var_mean(target, (2, 3, 4), correction=0, keepdim=True)
        target = (target - mean) * (variance + 1e-6).rsqrt()
    pred = pred.view(B, K, p, p, C).permute(0, 1, 4, 2, 3).float()
    if kind == "l1":
        return torch.nn.functional.l1_loss(pred, target)
    return torch.nn.functional.mse_loss(pred, target)
