"""Contrastive loss and gradients of a batch whose logits fit a CPU's cache: the whole matrix at once.

    u_i = ln sum_{j != i} e^(l_ij) - l_ii        and v_i by columns
    loss = 1/(2 B) sum_i [softplus(u_i) + softplus(v_i)]
    G_ij = e^(l_ij - lse^r_i) + e^(l_ij - lse^c_j),   G_ii = -sigmoid(u_i) - sigmoid(v_i)

One process, one positive for each sample, no smoothing. Forward forms the gradients too: a call costs little more than
its operators' dispatch, and the matrix is at hand.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.scaled import scale_gradients

_NAMESPACE = "sycoca_kernels"


def _loss_and_grads(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
    product: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast("cpu", enabled=False):
        # Products of 16-bit values are exact in fp32.
        I, T = (x.to(product).float() for x in (image, text))
        s, share = logit_scale.float().reshape(()), 0.5 / len(I)
        L = torch.mm(I, T.T).mul_(s)
        diagonal = L.diagonal()
        positive = diagonal.clone()
        diagonal.fill_(-math.inf)
        u, v = (torch.logsumexp(L, dim) - positive for dim in (1, 0))
        row, column = F.softplus(u), F.softplus(v)
        value = (row.sum() + column.sum()) * share
        dI, dT, ds = I.new_empty(0), I.new_empty(0), I.new_empty(0)
        if need_image or need_text or need_scale:
            by_column = (L - (column + positive)).exp_()
            G = L.sub_((row + positive)[:, None]).exp_().add_(by_column)
            torch.neg(torch.sigmoid(u) + torch.sigmoid(v), out=positive)
            diagonal.copy_(positive)
            G.mul_(share)
            if need_image or need_scale:
                dI = torch.mm(G, T)
                ds = torch.sum(dI * I) if need_scale else ds
                dI.mul_(s)
            if need_text:
                dT = torch.mm(G.T, I).mul_(s)
        return value, dI if need_image else I.new_empty(0), dT, ds


_loss_and_grads_op = torch.library.custom_op(
    f"{_NAMESPACE}::itc_small_loss_and_grads", _loss_and_grads, mutates_args=()
)


@_loss_and_grads_op.register_fake
def _(image, text, logit_scale, need_image, need_text, need_scale, product):
    return (
        _fp32(image),
        _fp32(image, *(image.shape if need_image else (0,))),
        _fp32(image, *(text.shape if need_text else (0,))),
        _fp32(image, *(() if need_scale else (0,))),
    )


@torch.library.custom_op(f"{_NAMESPACE}::itc_small_attach", mutates_args=())
def _attach_op(
    value: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor, dimage: Tensor, dtext: Tensor, dscale: Tensor
) -> Tensor:
    return value.clone()


@_attach_op.register_fake
def _(value, *rest):
    return torch.empty_like(value)


def _context(ctx, inputs, output):
    _, *leaves, dimage, dtext, dscale = inputs
    ctx.save_for_backward(dimage, dtext, dscale)
    ctx.dtypes, ctx.scale_shape = [x.dtype for x in leaves], leaves[2].shape


def _autograd(ctx, dloss):
    scaled = scale_gradients(dloss, list(ctx.saved_tensors))
    return None, *_of_leaves(ctx, scaled, ctx.needs_input_grad[1:4]), None, None, None


def _of_leaves(ctx, scaled: list[Tensor], needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Gradients in the shapes and dtypes of image, text and scale; None where not needed."""
    dimage, dtext, dscale = scaled
    found = dimage, dtext, dscale.reshape(ctx.scale_shape) if needs[2] else dscale
    return [x.to(dtype) if need else None for x, dtype, need in zip(found, ctx.dtypes, needs)]


_attach_op.register_autograd(_autograd, setup_context=_context)


class _Eager(torch.autograd.Function):
    """The same without the dispatch of custom operators, which costs a small batch as much as its arithmetic."""

    @staticmethod
    def forward(ctx, image, text, logit_scale, needs: list[bool], product: torch.dtype) -> Tensor:
        value, *gradients = _loss_and_grads(image, text, logit_scale, *needs, product)
        ctx.save_for_backward(*gradients)
        ctx.dtypes, ctx.scale_shape = [image.dtype, text.dtype, logit_scale.dtype], logit_scale.shape
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss: Tensor):
        return *_of_leaves(ctx, [dloss * x for x in ctx.saved_tensors], ctx.needs_input_grad[:3]), None, None


def loss(image: Tensor, text: Tensor, logit_scale: Tensor, product: torch.dtype) -> Tensor:
    """() fp32 for image and text (B, D) and a scale of one element; products in `product`."""
    leaves = image, text, logit_scale
    needs = [x.requires_grad and torch.is_grad_enabled() for x in leaves]
    if not torch.compiler.is_compiling():
        return _Eager.apply(*leaves, needs, product)
    value, *gradients = _loss_and_grads_op(*(x.detach() for x in leaves), *needs, product)
    return _attach_op(value, *leaves, *gradients)


def _fp32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)
