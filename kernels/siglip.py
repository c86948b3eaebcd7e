"""Pairwise sigmoid loss over all pairs of a process group.

    l_ij = s <I_i, T_j> + t,  z_ij = 1 where i = j, else -1
    loss = W / B sum_ij ln(1 + exp(-z_ij l_ij))

No sum over a row is needed before the gradient, so forward forms both: three matrix products in all, and nothing
quadratic is stored.
"""

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels import dispatch, groups, reference
from kernels.scaled import scale_gradients

_NAME = "fused_siglip_loss"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NAMESPACE = "sycoca_kernels"


@torch.library.custom_op(f"{_NAMESPACE}::siglip_loss_and_grads", mutates_args=())
def _loss_and_grads_op(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    need_image: bool,
    need_text: bool,
    need_scalars: bool,
    product: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if impl == "triton":
        from kernels import siglip_triton as implementation
    else:
        from kernels import siglip_cpu as implementation
    with torch.autocast(image.device.type, enabled=False):
        return implementation.loss_and_grads(
            image, text, logit_scale, logit_bias, offset, need_image, need_text, need_scalars, product
        )


@_loss_and_grads_op.register_fake
def _(image, text, logit_scale, logit_bias, offset, need_image, need_text, need_scalars, product, impl):
    return (
        _fp32(image),
        _fp32(image, *(image.shape if need_image else (0,))),
        _fp32(image, *(text.shape if need_text else (0,))),
        _fp32(image, 2 if need_scalars else 0),
    )


@torch.library.custom_op(f"{_NAMESPACE}::siglip_attach", mutates_args=())
def _attach_op(
    value: Tensor,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    dimage: Tensor,
    dtext: Tensor,
    dscalars: Tensor,
) -> Tensor:
    return value.clone()


@_attach_op.register_fake
def _(value, *rest):
    return torch.empty_like(value)


def _context(ctx, inputs, output):
    _, *leaves, dimage, dtext, dscalars = inputs
    ctx.save_for_backward(dimage, dtext, dscalars)
    ctx.dtypes = [x.dtype for x in leaves]
    ctx.shapes = [x.shape for x in leaves[2:]]


def _autograd(ctx, dloss):
    dimage, dtext, dscalars = ctx.saved_tensors
    scalars = dscalars.split(1) if dscalars.numel() else (dscalars, dscalars)
    scaled = scale_gradients(dloss, [dimage, dtext, *scalars])
    scaled[2:] = [x.reshape(shape) if x.numel() else x for x, shape in zip(scaled[2:], ctx.shapes)]
    needs = ctx.needs_input_grad[1:5]
    return None, *(x.to(dtype) if need else None for x, dtype, need in zip(scaled, ctx.dtypes, needs)), None, None, None


_attach_op.register_autograd(_autograd, setup_context=_context)


def fused_siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    group: object = None,
    impl: str = "auto",
    counts: Sequence[int] | None = None,
) -> Tensor:
    """Sigmoid contrastive loss (SigLIP; Zhai et al. 2023, algorithm 1) without the matrix of logits.

    Args:
        image: (b, D), floating, used as it is: normalising is the caller's.
        text: (b, D), floating.
        logit_scale: positive, already exponentiated; a tensor of one element, or a float.
        logit_bias: a tensor of one element, or a float.
        group: process group whose ranks hold shares of the batch; None for this process alone.
        impl: "auto", or one of `implementations("fused_siglip_loss")`.
        counts: b of every rank of the group where the caller knows them; otherwise they are exchanged, which on a GPU
            makes the host wait.

    Returns:
        () fp32: W / B times the sum over this rank's images and all texts. The mean over the ranks is the loss of the
        whole batch, and the mean over the ranks of the gradients its gradient. Differentiable once.

    Raises:
        ValueError: a shape, value, device, group or implementation does not fit.
        TypeError: a dtype or the type of a scalar does not fit.
    """
    logit_scale, logit_bias = _check(image, text, logit_scale, logit_bias)
    alone = group is None
    dispatch.require(not (alone and counts is not None), _NAME, "counts belong to a group", counts)
    layout = groups.exchange_layout(_NAME, image.shape[0], image.device, group, counts)
    dispatch.require(layout.total >= 1, _NAME, "the batch must hold at least one pair", layout.total)
    # The plain form rounds 16-bit logits.
    size = layout.pairs if groups.product_dtype(image) == torch.float32 else sys.maxsize
    chosen = dispatch.select(_NAME, impl, image.device, size=size)
    if torch.float64 in (image.dtype, text.dtype):
        dispatch.require(impl in ("auto", "reference"), _NAME, f"{impl} takes no float64", image.dtype, TypeError)
        chosen = "reference"
    alone = layout.world_size == 1
    if chosen == "reference":
        if not alone:
            image, text = (groups.GatherRows.apply(x, layout, group) for x in (image, text))
        return reference.siglip_loss(
            image, text, logit_scale, logit_bias, rows=layout.rows, world_size=layout.world_size
        )
    leaves = image, text, logit_scale, logit_bias
    need_image, need_text, need_scale, need_bias = (x.requires_grad and torch.is_grad_enabled() for x in leaves)
    with torch.no_grad():
        here = [x.detach() for x in leaves]
        all_text = here[1] if alone else groups.all_gather(groups.under_autocast(here[1]), layout, group)
        product = groups.product_dtype(image)
        total, dimage, dtext, dscalars = _loss_and_grads_op(
            here[0], all_text, *here[2:], layout.offset, need_image, need_text, need_scale or need_bias, product, chosen
        )
        if need_text and not alone:
            dtext = groups.reduce_scatter(dtext, layout, group.group_name)
        share = layout.world_size / layout.total
        value, *gradients = (x * share for x in (total, dimage, dtext, dscalars))
    return _attach_op(value, *leaves, *gradients)


class FusedSigLipLoss(nn.Module):
    """`fused_siglip_loss` with the call signature of open_clip's `SigLipLoss`.

    Args:
        cache_labels: accepted and not used, there are no labels.
        rank: accepted and not used, the group knows.
        world_size: where it is above 1, the default process group is used.
        dist_impl: accepted and not used, the texts are gathered.
        group: process group to use in place of the default one.
        uneven: whether ranks may hold different numbers of pairs, which then are exchanged at every call; on a GPU the
            host waits for that.
        impl: as in `fused_siglip_loss`.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        group: object = None,
        uneven: bool = False,
        impl: str = "auto",
    ):
        super().__init__()
        self.group = group if group is not None else groups.default_group(world_size)
        self.uneven = uneven
        self.impl = impl

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        bias = 0.0 if logit_bias is None else logit_bias
        counts = None if self.uneven else groups.equal_counts(image_features.shape[0], self.group)
        options = {"group": self.group, "counts": counts, "impl": self.impl}
        loss = fused_siglip_loss(image_features, text_features, logit_scale, bias, **options)
        return {"contrastive_loss": loss} if output_dict else loss


def _check(image, text, logit_scale, logit_bias) -> tuple[Tensor, Tensor]:
    """Raise unless the arguments fit the contract; scale and bias as tensors."""
    require = dispatch.require
    require(isinstance(image, Tensor), _NAME, "image must be a tensor", type(image).__name__, TypeError)
    require(image.ndim == 2 and image.shape[1] >= 1, _NAME, "image must be (b, D) with D >= 1", tuple(image.shape))
    groups.check_texts(_NAME, text, None)
    require(image.shape == text.shape, _NAME, "image and text must have one shape", (*image.shape, *text.shape))
    require(image.dtype in _DTYPES, _NAME, "image must be fp64, fp32, bf16 or fp16", image.dtype, TypeError)
    same = image.dtype == text.dtype or groups.product_dtype(image) == groups.product_dtype(text)
    require(same, _NAME, "image and text must have one dtype", (image.dtype, text.dtype), TypeError)
    scalars = []
    for name, value in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        if not isinstance(value, Tensor):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(number, _NAME, f"{name} must be a float or a tensor", type(value).__name__, TypeError)
            limit = "positive and finite" if name == "logit_scale" else "finite"
            fits = math.isfinite(value) and (value > 0 or name == "logit_bias")
            require(fits, _NAME, f"{name} must be {limit}", value)
            value = torch.full((), float(value), device=image.device)
        require(value.numel() == 1, _NAME, f"{name} must have one element", tuple(value.shape))
        require(value.is_floating_point(), _NAME, f"{name} must be floating", value.dtype, TypeError)
        scalars.append(value)
    dispatch.require_same_device(_NAME, (image, text, *scalars))
    if dispatch.checks_enabled():
        for name, value in zip(("image", "text", "logit_scale", "logit_bias"), (image, text, *scalars)):
            require(bool(value.isfinite().all()), _NAME, f"{name} must be finite", "inf or nan")
    return scalars[0], scalars[1]


def _fp32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)
