"""Reconstruction error of chosen patches, against pixels read straight from the image.

    l1              sum |y - t|
    mse             sum (y - t)^2
    mse_normalised  sum (y - (t - mean) / sqrt(var + eps))^2, mean and biased variance over the patch

The patchified target is never stored; backward reads the pixels again. Limits: `triton` takes patches of up to 16384
values.
"""

import torch
from torch import Tensor

from kernels import dispatch, patch_loss_cpu, reference

KINDS = ("l1", "mse", "mse_normalised")
EPS = 1e-6
MAX_VALUES_TRITON = 16384
_NAME = "masked_patch_loss"


def _implementation(impl: str):
    if impl == "triton":
        from kernels import patch_loss_triton

        return patch_loss_triton
    return patch_loss_cpu


@torch.library.custom_op("sycoca_kernels::masked_patch_loss", mutates_args=())
def _loss_op(
    pred: Tensor, images: Tensor, index: Tensor, patch_size: int, kind: str, scale: float, impl: str
) -> Tensor:
    return _implementation(impl).loss(pred, images, index, patch_size, kind, scale, EPS)


@_loss_op.register_fake
def _(pred, images, index, patch_size, kind, scale, impl):
    return pred.new_empty((), dtype=torch.float64 if pred.dtype == torch.float64 else torch.float32)


@torch.library.custom_op("sycoca_kernels::masked_patch_loss_backward", mutates_args=())
def _loss_backward_op(
    dloss: Tensor, pred: Tensor, images: Tensor, index: Tensor, patch_size: int, kind: str, scale: float, impl: str
) -> Tensor:
    return _implementation(impl).loss_backward(dloss, pred, images, index, patch_size, kind, scale, EPS)


@_loss_backward_op.register_fake
def _(dloss, pred, images, index, patch_size, kind, scale, impl):
    return pred.new_empty(pred.shape)


def _context(ctx, inputs, output):
    pred, images, index, *ctx.settings = inputs
    ctx.save_for_backward(pred, images, index)


def _autograd(ctx, dloss):
    return _loss_backward_op(dloss, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None, None


_loss_op.register_autograd(_autograd, setup_context=_context)


def masked_patch_loss(
    pred: Tensor,
    images: Tensor,
    index: Tensor,
    *,
    patch_size: int,
    kind: str = "l1",
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Error of predicted patches against the pixels of an image.

    Sources: SimMIM (l1), MAE (mse, mse_normalised; the variance here is the biased one).

    Args:
        pred: (B, K, p * p * C), floating, each patch in the order (row, column, channel).
        images: (B, C, H, W), floating, H and W multiples of p. Targets: they must not require a gradient.
        index: (B, K) int64, patches of the image in row-major order.
        patch_size: p, pixels.
        kind: "l1", "mse" or "mse_normalised".
        reduction: "mean" over all elements (0 where there are none), or "sum".
        impl: "auto", or one of `implementations("masked_patch_loss")`.

    Returns:
        () fp32, differentiable once in `pred`.

    Raises:
        ValueError: a shape, option, device or implementation does not fit.
        TypeError: a dtype or the type of a scalar does not fit.
    """
    _check(pred, images, index, patch_size, kind, reduction)
    chosen = dispatch.select(_NAME, impl, pred.device, size=pred.numel())
    if chosen == "reference":
        return reference.masked_patch_loss(pred, images, index, patch_size, kind, reduction)
    if chosen == "triton":
        dtypes = {pred.dtype, images.dtype}
        dispatch.require(torch.float64 not in dtypes, _NAME, "triton takes no float64", dtypes, TypeError)
        limit = f"triton takes patches of at most {MAX_VALUES_TRITON} values"
        dispatch.require(pred.shape[2] <= MAX_VALUES_TRITON, _NAME, limit, pred.shape[2])
    scale = 1.0 if reduction == "sum" else 1.0 / max(1, pred.numel())
    return _loss_op(pred, images, index, patch_size, kind, scale, chosen)


def _check(pred: Tensor, images: Tensor, index: Tensor, patch_size: int, kind: str, reduction: str) -> None:
    require = dispatch.require
    is_count = isinstance(patch_size, int) and not isinstance(patch_size, bool)
    require(is_count, _NAME, "patch_size must be an int", repr(patch_size), TypeError)
    require(patch_size >= 1, _NAME, "patch_size must be at least 1", patch_size)
    require(kind in KINDS, _NAME, f"kind must be one of {', '.join(KINDS)}", repr(kind))
    require(reduction in ("mean", "sum"), _NAME, "reduction must be mean or sum", repr(reduction))
    require(images.ndim == 4, _NAME, "images must be (B, C, H, W)", tuple(images.shape))
    B, C, H, W = images.shape
    limit = f"H and W of images must be multiples of patch_size = {patch_size}"
    require(H % patch_size == 0 and W % patch_size == 0, _NAME, limit, (H, W))
    require(index.ndim == 2 and index.shape[0] == B, _NAME, f"index must be ({B}, K)", tuple(index.shape))
    shape = B, index.shape[1], patch_size * patch_size * C
    require(tuple(pred.shape) == shape, _NAME, f"pred must be {shape}", tuple(pred.shape))
    require(pred.is_floating_point(), _NAME, "pred must be floating", pred.dtype, TypeError)
    require(images.is_floating_point(), _NAME, "images must be floating", images.dtype, TypeError)
    require(index.dtype == torch.int64, _NAME, "index must be torch.int64", index.dtype, TypeError)
    require(not images.requires_grad, _NAME, "images must not require a gradient", "images.requires_grad = True")
    dispatch.require_same_device(_NAME, (pred, images, index))
    if dispatch.checks_enabled():
        P = (H // patch_size) * (W // patch_size)
        outside = index[(index < 0) | (index >= P)]
        require(outside.numel() == 0, _NAME, f"index must be in 0 .. {P - 1}", outside.tolist())
