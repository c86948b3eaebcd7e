"""Custom operators of the contrastive loss, and its gradient.

The statistics are constants of autograd; `attach` joins the finished value to the gradient with respect to features and
scale.
"""

import torch
from torch import Tensor

from kernels import groups, itc_ring
from kernels.itc_parts import Place, Statistics, Targets, Wanted

_NAMESPACE = "sycoca_kernels"


def _run(impl: str, part: str, *args) -> tuple[Tensor, ...]:
    """One part of an implementation, out of autocast's reach: its dtype is an argument."""
    if impl == "triton":
        from kernels import itc_triton as implementation
    elif impl == "gluon":
        from kernels import itc_gluon as implementation
    else:
        from kernels import itc_cpu as implementation
    with torch.autocast(args[0].device.type, enabled=False):
        return getattr(implementation, part)(*args)


@torch.library.custom_op(f"{_NAMESPACE}::itc_prologue", mutates_args=())
def prologue(
    image: Tensor, text: Tensor, logit_scale: Tensor, product: torch.dtype, impl: str
) -> tuple[Tensor, Tensor]:
    return _run(impl, "prologue", image, text, logit_scale, product)


@prologue.register_fake
def _(image, text, logit_scale, product, impl):
    return _fp32(image, image.shape[0]), _fp32(image, 2)


@torch.library.custom_op(f"{_NAMESPACE}::itc_sums", mutates_args=())
def sums(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    shift: Tensor,
    ids: Tensor | None,
    text_ids: Tensor | None,
    weight: Tensor | None,
    smoothing: float,
    offset: int,
    product: torch.dtype,
    scratch_bytes: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    targets, place = Targets(ids, text_ids, weight, smoothing), Place(offset, product, scratch_bytes)
    return _run(impl, "sums", image, text, logit_scale, shift, targets, place)


@sums.register_fake
def _(image, text, logit_scale, shift, ids, text_ids, weight, smoothing, offset, product, scratch_bytes, impl):
    return _fp32(image, 2, image.shape[0]), _fp32(image, 2, text.shape[0])


@torch.library.custom_op(f"{_NAMESPACE}::itc_online", mutates_args=())
def online(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    safe: Tensor,
    offset: int,
    product: torch.dtype,
    scratch_bytes: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return _run(impl, "online", image, text, logit_scale, safe, Place(offset, product, scratch_bytes))


@online.register_fake
def _(image, text, logit_scale, safe, offset, product, scratch_bytes, impl):
    return _fp32(image, 2, image.shape[0]), _fp32(image, 2, text.shape[0])


@torch.library.custom_op(f"{_NAMESPACE}::itc_grads", mutates_args=())
def grads(
    dloss: Tensor,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    row: Tensor,
    column: Tensor,
    coefficient: Tensor,
    safe: Tensor,
    ids: Tensor | None,
    text_ids: Tensor | None,
    weight: Tensor | None,
    smoothing: float,
    offset: int,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
    product: torch.dtype,
    scratch_bytes: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    stats, targets = Statistics(row, column, coefficient, safe), Targets(ids, text_ids, weight, smoothing)
    wanted, place = Wanted(need_image, need_text, need_scale), Place(offset, product, scratch_bytes)
    return _run(impl, "grads", image, text, logit_scale, dloss, stats, targets, wanted, place)


@grads.register_fake
def _(dloss, image, text, logit_scale, row, column, coefficient, safe, ids, text_ids, weight, smoothing, offset, *rest):
    need_image, need_text, need_scale = rest[:3]
    return (
        _fp32(image, *(image.shape if need_image else (0,))),
        _fp32(image, *(text.shape if need_text else (0,))),
        _fp32(image, *(() if need_scale else (0,))),
    )


@torch.library.custom_op(f"{_NAMESPACE}::itc_attach", mutates_args=())
def attach(
    value: Tensor,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    all_text: Tensor,
    row: Tensor,
    column: Tensor,
    coefficient: Tensor,
    safe: Tensor,
    ids: Tensor | None,
    text_ids: Tensor | None,
    weight: Tensor | None,
    smoothing: float,
    counts: list[int],
    rank: int,
    group_name: str,
    ring: bool,
    product: torch.dtype,
    scratch_bytes: int,
    impl: str,
) -> Tensor:
    return value.clone()


@attach.register_fake
def _(value, *rest):
    return torch.empty_like(value)


def _context(ctx, inputs, output):
    _, image, text, logit_scale, *saved = inputs[:12]
    ctx.save_for_backward(image, logit_scale, *saved)
    ctx.text_dtype = text.dtype
    ctx.smoothing, ctx.counts, ctx.rank, ctx.group_name, ctx.ring, *ctx.settings = inputs[12:]


def _autograd(ctx, dloss):
    image, logit_scale, all_text, *stats = ctx.saved_tensors
    needs = ctx.needs_input_grad[1:4]
    layout = groups.Layout(tuple(ctx.counts), ctx.rank)
    # dI = W s / (2 B) G T
    factor = dloss * (layout.world_size / (2 * layout.total))
    arguments = factor, image, all_text, logit_scale, *stats, ctx.smoothing
    if ctx.ring:
        dimage, dtext, dscale = itc_ring.grads(*arguments, layout, ctx.group_name, *needs, *ctx.settings)
    else:
        dimage, dtext, dscale = grads(*arguments, layout.offset, *needs, *ctx.settings)
        dtext = groups.reduce_scatter(dtext, layout, ctx.group_name) if needs[1] else dtext
    dimage = dimage.to(image.dtype) if needs[0] else None
    dtext = dtext.to(ctx.text_dtype) if needs[1] else None
    dscale = dscale.reshape(logit_scale.shape).to(logit_scale.dtype) if needs[2] else None
    return None, dimage, dtext, dscale, *[None] * 16


attach.register_autograd(_autograd, setup_context=_context)


def _fp32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)
