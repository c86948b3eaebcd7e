"""Reconstruction error of chosen patches with torch operators."""

import torch
from torch import Tensor


def loss(pred: Tensor, images: Tensor, index: Tensor, patch_size: int, kind: str, scale: float, eps: float) -> Tensor:
    """scale * sum of the error, () fp32."""
    total = pred.new_zeros((), dtype=_sum_dtype(pred))
    for b in range(pred.shape[0] if pred.numel() else 0):
        error = pred[b] - _target(images[b], index[b], patch_size, kind, eps, total.dtype)
        total += torch.linalg.vector_norm(error, 1) if kind == "l1" else torch.linalg.vector_norm(error) ** 2
    return total * scale


def loss_backward(
    dloss: Tensor,
    pred: Tensor,
    images: Tensor,
    index: Tensor,
    patch_size: int,
    kind: str,
    scale: float,
    eps: float,
) -> Tensor:
    """Gradient of `pred`."""
    dpred = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    factor = dloss * (scale if kind == "l1" else 2 * scale)
    for b in range(pred.shape[0] if pred.numel() else 0):
        error = pred[b] - _target(images[b], index[b], patch_size, kind, eps, dloss.dtype)
        torch.mul(error.sign_() if kind == "l1" else error, factor, out=error)
        dpred[b] = error
    return dpred


def _target(image: Tensor, index: Tensor, p: int, kind: str, eps: float, dtype: torch.dtype) -> Tensor:
    """Pixels (K, p p C) of the patches index (K,) of an image (C, H, W), as `kind` wants them."""
    C, H, W = image.shape
    # (K, C, p, p)
    patches = image.view(C, H // p, p, W // p, p).permute(1, 3, 2, 4, 0)
    target = patches[index // (W // p), index % (W // p)].flatten(1).to(dtype)
    if kind == "mse_normalised":
        variance, mean = torch.var_mean(target, dim=1, correction=0, keepdim=True)
        target = (target - mean) / (variance + eps).sqrt()
    return target


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
