"""L1 and generalised IoU of predicted boxes, one to one.

    l1 = sum_c |b_c - t_c|,    giou = 1 - GIoU = (U - I) / U + (C - U) / C

I, U and C are the areas of the overlap, of the union and of the smallest box around both. A quotient whose denominator
is at most MIN_AREA is 0, and so is its gradient: equal boxes cost 0 even where they have no area. Sides below 0 count
as 0. Where two corners agree, each has half of the gradient, so that it vanishes at t.
"""

import torch
from torch import Tensor

from kernels import box_loss_cpu, dispatch, reference

# of an image: less than a thousandth of a pixel on a side
MIN_AREA = 1e-12
_NAME = "box_loss"


def _implementation(impl: str):
    if impl == "triton":
        from kernels import box_loss_triton

        return box_loss_triton
    return box_loss_cpu


@torch.library.custom_op("sycoca_kernels::box_loss", mutates_args=())
def _loss_op(
    pred: Tensor, target: Tensor, valid: Tensor, mean: bool, min_area: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _implementation(impl).loss(pred, target, valid, mean, min_area)


@_loss_op.register_fake
def _(pred, target, valid, mean, min_area, impl):
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    return tuple(pred.new_empty((), dtype=dtype) for _ in range(3))


@torch.library.custom_op("sycoca_kernels::box_loss_backward", mutates_args=())
def _loss_backward_op(
    dl1: Tensor, dgiou: Tensor, share: Tensor, pred: Tensor, target: Tensor, valid: Tensor, min_area: float, impl: str
) -> Tensor:
    return _implementation(impl).loss_backward(dl1, dgiou, share, pred, target, valid, min_area)


@_loss_backward_op.register_fake
def _(dl1, dgiou, share, pred, target, valid, min_area, impl):
    return pred.new_empty(pred.shape)


def _context(ctx, inputs, output):
    pred, target, valid, _, *ctx.settings = inputs
    ctx.save_for_backward(output[2], pred, target, valid)
    ctx.mark_non_differentiable(output[2])


def _autograd(ctx, dl1, dgiou, _):
    return _loss_backward_op(dl1, dgiou, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None


_loss_op.register_autograd(_autograd, setup_context=_context)


def box_loss(
    pred: Tensor, target: Tensor, valid: Tensor, *, reduction: str = "mean", impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Errors of predicted boxes: L1 over the coordinates, and 1 - GIoU.

    Sources: X-VLM (arXiv 2111.08276), section 3.2; GIoU: Rezatofighi et al. 2019.

    Args:
        pred: (E, 4), floating: (cx, cy, w, h) in shares of the image, 0 .. 1.
        target: (E, 4), floating, the same. It must not require a gradient.
        valid: (E,) bool. A row without it adds nothing and has no gradient, whatever its values.
        reduction: "mean" over the valid boxes (0 where there are none), or "sum".
        impl: "auto", or one of `implementations("box_loss")`.

    Returns:
        l1 and giou, each () fp32, differentiable once in `pred`.

    Raises:
        ValueError: a shape, option, device or implementation does not fit.
        TypeError: a dtype does not fit.
    """
    _check(pred, target, valid, reduction)
    chosen = dispatch.select(_NAME, impl, pred.device, size=pred.shape[0])
    if chosen == "reference":
        return reference.box_loss(pred, target, valid, reduction)
    if chosen == "triton":
        dtypes = {pred.dtype, target.dtype}
        dispatch.require(torch.float64 not in dtypes, _NAME, "triton takes no float64", dtypes, TypeError)
    l1, giou, _ = _loss_op(pred, target, valid, reduction == "mean", MIN_AREA, chosen)
    return l1, giou


def _check(pred: Tensor, target: Tensor, valid: Tensor, reduction: str) -> None:
    require = dispatch.require
    require(pred.ndim == 2 and pred.shape[1] == 4, _NAME, "pred must be (E, 4)", tuple(pred.shape))
    E = pred.shape[0]
    require(tuple(target.shape) == (E, 4), _NAME, f"target must be ({E}, 4)", tuple(target.shape))
    require(tuple(valid.shape) == (E,), _NAME, f"valid must be ({E},)", tuple(valid.shape))
    require(pred.is_floating_point(), _NAME, "pred must be floating", pred.dtype, TypeError)
    require(target.is_floating_point(), _NAME, "target must be floating", target.dtype, TypeError)
    require(valid.dtype == torch.bool, _NAME, "valid must be torch.bool", valid.dtype, TypeError)
    require(reduction in ("mean", "sum"), _NAME, "reduction must be mean or sum", repr(reduction))
    require(not target.requires_grad, _NAME, "target must not require a gradient", "target.requires_grad = True")
    dispatch.require_same_device(_NAME, (pred, target, valid))
    if dispatch.checks_enabled():
        for name, box in (("pred", pred), ("target", target)):
            unusual = box[valid & ~((box >= 0) & (box <= 1)).all(1)]
            require(unusual.numel() == 0, _NAME, f"valid rows of {name} must be in 0 .. 1", unusual.tolist())
