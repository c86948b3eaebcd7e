"""Gradients of the operators as they run here, against plain torch in double precision."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import (
    box_loss,
    fused_itc_loss,
    fused_siglip_loss,
    gather_patches,
    masked_patch_loss,
    region_pool,
    scatter_patches,
)

# Relative to the norm of the true gradient, in single precision.
TOLERANCE = 1e-5

Compute = Callable[..., Tensor]


def gradient_errors() -> Iterator[tuple[str, float]]:
    """Name of every differentiable operator, and the largest relative error among its gradients."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, (compute, leaves) in _cases().items():
        got = _gradients(compute, "auto", [leaf.to(device) for leaf in leaves])
        true = _gradients(compute, "reference", [leaf.double() for leaf in leaves])
        yield name, max(_relative(a.double().cpu(), b) for a, b in zip(got, true))


def _cases() -> dict[str, tuple[Compute, list[Tensor]]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    image, text = F.normalize(draw(48, 32), dim=1), F.normalize(draw(48, 32), dim=1)
    index = torch.stack([torch.randperm(16, generator=generator)[:6] for _ in range(3)])
    weight, pictures = draw(3, 16, 24), draw(3, 3, 16, 16)
    boxes = torch.rand(6, 4, generator=generator)

    def gather(impl: str, x: Tensor) -> Tensor:
        rows = gather_patches(x, index.to(x.device), impl=impl)
        return (rows * weight[:, :6].to(x)).sum()

    def scatter(impl: str, x: Tensor, fill: Tensor) -> Tensor:
        rows = scatter_patches(x, index.to(x.device), fill, num_patches=16, impl=impl)
        return (rows * weight.to(x)).sum()

    def pixels(impl: str, pred: Tensor) -> Tensor:
        where = index.to(pred.device)
        return masked_patch_loss(pred, pictures.to(pred), where, patch_size=4, kind="mse", impl=impl)

    def pool(impl: str, x: Tensor) -> Tensor:
        rects = torch.tensor([[0, 0, 4, 4], [1, 2, 3, 3], [0, 0, 1, 4]], dtype=torch.int32, device=x.device)
        means = region_pool(x, rects, torch.tensor([2, 0, 2], device=x.device), impl=impl)
        return (means * weight[0, :3].to(x)).sum()

    def overlap(impl: str, pred: Tensor) -> Tensor:
        valid = torch.arange(len(pred), device=pred.device) != 1
        return sum(box_loss(pred, boxes.to(pred), valid, impl=impl))

    def itc(impl: str, *leaves: Tensor) -> Tensor:
        return fused_itc_loss(*leaves, impl=impl)

    def siglip(impl: str, *leaves: Tensor) -> Tensor:
        return fused_siglip_loss(*leaves, impl=impl)

    return {
        "fused_itc_loss": (itc, [image, text, torch.tensor([14.3])]),
        "fused_siglip_loss": (siglip, [image, text, torch.tensor([10.0]), torch.tensor([-10.0])]),
        "gather_patches": (gather, [draw(3, 16, 24)]),
        "scatter_patches": (scatter, [draw(3, 6, 24), draw(24)]),
        "masked_patch_loss": (pixels, [draw(3, 6, 48)]),
        "region_pool": (pool, [draw(3, 4, 4, 24)]),
        "box_loss": (overlap, [torch.rand(6, 4, generator=generator)]),
    }


def _gradients(compute: Compute, impl: str, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(compute(impl, *leaves), leaves)


def _relative(got: Tensor, true: Tensor) -> float:
    scale = float(true.norm())
    return float((got - true).norm()) / (scale if scale > 1e-6 else 1.0)
