"""Gathering chosen patches and scattering them back, with positions, prefix and fill fused.

    gather   y_k = x_{i(k)} + pos_{i(k)}                         behind y = prefix
    scatter  y_i = pos_i + (x_k where i = i(k), else fill)

Each direction's backward is the other one's forward: rows are stored once, without atomics, so that the places of a
row must differ wherever a gradient is asked for.
"""

import torch
from torch import Tensor

from kernels import dispatch, patches_cpu, reference

_GATHER, _SCATTER = "gather_patches", "scatter_patches"


def _implementation(impl: str):
    if impl == "triton":
        from kernels import patches_triton

        return patches_triton
    return patches_cpu


@torch.library.custom_op("sycoca_kernels::gather_patches", mutates_args=())
def _gather_op(x: Tensor, index: Tensor, pos: Tensor | None, prefix: Tensor | None, impl: str) -> Tensor:
    return _implementation(impl).gather(x, index, pos, prefix)


@_gather_op.register_fake
def _(x, index, pos, prefix, impl):
    return x.new_empty(x.shape[0], index.shape[1] + (prefix is not None), x.shape[2])


@torch.library.custom_op("sycoca_kernels::gather_patches_backward", mutates_args=())
def _gather_backward_op(
    dy: Tensor, index: Tensor, num_patches: int, need_x: bool, need_pos: bool, impl: str
) -> tuple[Tensor, Tensor]:
    return _implementation(impl).gather_backward(dy, index, num_patches, need_x, need_pos)


@_gather_backward_op.register_fake
def _(dy, index, num_patches, need_x, need_pos, impl):
    B, _, D = dy.shape
    dx = dy.new_empty(B if need_x else 0, num_patches, D)
    return dx, dy.new_empty(num_patches if need_pos else 0, D, dtype=_sum_dtype(dy))


@torch.library.custom_op("sycoca_kernels::scatter_patches", mutates_args=())
def _scatter_op(x: Tensor, index: Tensor, fill: Tensor, num_patches: int, pos: Tensor | None, impl: str) -> Tensor:
    return _implementation(impl).scatter(x, index, fill, num_patches, pos)


@_scatter_op.register_fake
def _(x, index, fill, num_patches, pos, impl):
    return x.new_empty(x.shape[0], num_patches, x.shape[2])


@torch.library.custom_op("sycoca_kernels::scatter_patches_backward", mutates_args=())
def _scatter_backward_op(
    dy: Tensor, index: Tensor, need_x: bool, need_fill: bool, need_pos: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _implementation(impl).scatter_backward(dy, index, need_x, need_fill, need_pos)


@_scatter_backward_op.register_fake
def _(dy, index, need_x, need_fill, need_pos, impl):
    B, P, D = dy.shape
    dx = dy.new_empty(B if need_x else 0, index.shape[1], D)
    dfill = dy.new_empty(D if need_fill else 0, dtype=_sum_dtype(dy))
    return dx, dfill, dy.new_empty(P if need_pos else 0, D, dtype=_sum_dtype(dy))


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _gather_context(ctx, inputs, output):
    x, index, pos, prefix, impl = inputs
    ctx.save_for_backward(index)
    ctx.num_patches, ctx.impl = x.shape[1], impl
    ctx.pos_dtype = None if pos is None else pos.dtype
    ctx.prefix = None if prefix is None else (prefix.ndim, prefix.dtype)


def _gather_autograd(ctx, dy):
    (index,) = ctx.saved_tensors
    need_x, _, need_pos, need_prefix, _ = ctx.needs_input_grad
    dx = dpos = dprefix = None
    if need_x or need_pos:
        rows = dy[:, 1:] if ctx.prefix else dy
        dx, dpos = _gather_backward_op(rows, index, ctx.num_patches, need_x, need_pos, ctx.impl)
    if need_prefix:
        ndim, dtype = ctx.prefix
        dprefix = dy[:, 0] if ndim == 2 else dy[:, 0].sum(0, dtype=_sum_dtype(dy))
        dprefix = dprefix.to(dtype)
    return dx if need_x else None, None, dpos.to(ctx.pos_dtype) if need_pos else None, dprefix, None


def _scatter_context(ctx, inputs, output):
    _, index, fill, _, pos, impl = inputs
    ctx.save_for_backward(index)
    ctx.impl, ctx.fill_dtype = impl, fill.dtype
    ctx.pos_dtype = None if pos is None else pos.dtype


def _scatter_autograd(ctx, dy):
    (index,) = ctx.saved_tensors
    need_x, _, need_fill, _, need_pos, _ = ctx.needs_input_grad
    dx, dfill, dpos = _scatter_backward_op(dy, index, need_x, need_fill, need_pos, ctx.impl)
    dfill = dfill.to(ctx.fill_dtype) if need_fill else None
    return dx if need_x else None, None, dfill, None, dpos.to(ctx.pos_dtype) if need_pos else None, None


_gather_op.register_autograd(_gather_autograd, setup_context=_gather_context)
_scatter_op.register_autograd(_scatter_autograd, setup_context=_scatter_context)


def gather_patches(
    x: Tensor, index: Tensor, *, pos: Tensor | None = None, prefix: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Gather rows of each sample, add their positional embeddings, and put a prefix token in front.

    Args:
        x: (B, P, D), floating.
        index: (B, K) int64 in 0 .. P - 1, different within a sample where a gradient is asked for.
        pos: (P, D), floating, added to the rows gathered.
        prefix: (D,) or (B, D), floating, the first row of every sample as it is.
        impl: "auto", or one of `implementations("gather_patches")`.

    Returns:
        (B, [1 +] K, D) in the dtype of `x`; sums are formed in fp32. Differentiable once in x, pos and prefix.

    Raises:
        ValueError: a shape, device or implementation does not fit.
        TypeError: a dtype does not fit.
    """
    require = dispatch.require
    _check_rows(_GATHER, x, index)
    B, P, D = x.shape
    require(index.shape[0] == B, _GATHER, f"index must be ({B}, K)", tuple(index.shape))
    _check_floating(_GATHER, "pos", pos, ((P, D),))
    _check_floating(_GATHER, "prefix", prefix, ((D,), (B, D)))
    dispatch.require_same_device(_GATHER, (x, index, pos, prefix))
    if dispatch.checks_enabled():
        _check_index(_GATHER, index, P, torch.is_grad_enabled() and (x.requires_grad or _requires_grad(pos)))
    chosen = dispatch.select(_GATHER, impl, x.device, size=B * index.shape[1] * D)
    if chosen == "reference":
        return reference.gather_patches(x, index, pos, prefix)
    _check_triton(_GATHER, chosen, (x, pos, prefix))
    return _gather_op(x, index, pos, prefix, chosen)


def scatter_patches(
    x: Tensor, index: Tensor, fill: Tensor, *, num_patches: int, pos: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Put rows of each sample back to their places, a fill token everywhere else, and add positional embeddings.

    Args:
        x: (B, K, D), floating.
        index: (B, K) int64 in 0 .. num_patches - 1, different within a sample.
        fill: (D,), floating, the row of every place that `index` does not name.
        num_patches: P, at least K.
        pos: (P, D), floating, added to every row.
        impl: "auto", or one of `implementations("scatter_patches")`.

    Returns:
        (B, P, D) in the dtype of `x`; sums are formed in fp32. Differentiable once in x, fill and pos.

    Raises:
        ValueError: a shape, count, device or implementation does not fit.
        TypeError: a dtype or the type of a scalar does not fit.
    """
    require = dispatch.require
    _check_rows(_SCATTER, x, index)
    B, K, D = x.shape
    require(tuple(index.shape) == (B, K), _SCATTER, f"index must be ({B}, {K})", tuple(index.shape))
    is_count = isinstance(num_patches, int | torch.SymInt) and not isinstance(num_patches, bool)
    require(is_count, _SCATTER, "num_patches must be an int", repr(num_patches), TypeError)
    require(num_patches >= K, _SCATTER, f"num_patches must be at least K = {K}", num_patches)
    _check_floating(_SCATTER, "fill", fill, ((D,),))
    _check_floating(_SCATTER, "pos", pos, ((num_patches, D),))
    dispatch.require_same_device(_SCATTER, (x, index, fill, pos))
    if dispatch.checks_enabled():
        _check_index(_SCATTER, index, num_patches, True)
    chosen = dispatch.select(_SCATTER, impl, x.device, size=B * num_patches * D)
    if chosen == "reference":
        return reference.scatter_patches(x, index, fill, num_patches, pos)
    _check_triton(_SCATTER, chosen, (x, fill, pos))
    return _scatter_op(x, index, fill, num_patches, pos, chosen)


def _check_rows(operator: str, x: Tensor, index: Tensor) -> None:
    dispatch.require(x.ndim == 3, operator, "x must have 3 dimensions", tuple(x.shape))
    dispatch.require(index.ndim == 2, operator, "index must be (B, K)", tuple(index.shape))
    dispatch.require(x.is_floating_point(), operator, "x must be floating", x.dtype, TypeError)
    dispatch.require(index.dtype == torch.int64, operator, "index must be torch.int64", index.dtype, TypeError)


def _check_floating(operator: str, name: str, x: Tensor | None, shapes: tuple[tuple[int, ...], ...]) -> None:
    if x is not None:
        limit = f"{name} must be {' or '.join(map(str, shapes))}"
        dispatch.require(tuple(x.shape) in shapes, operator, limit, tuple(x.shape))
        dispatch.require(x.is_floating_point(), operator, f"{name} must be floating", x.dtype, TypeError)


def _check_triton(operator: str, impl: str, tensors: tuple[Tensor | None, ...]) -> None:
    if impl == "triton":
        dtypes = {x.dtype for x in tensors if x is not None}
        dispatch.require(torch.float64 not in dtypes, operator, "triton takes no float64", dtypes, TypeError)


def _check_index(operator: str, index: Tensor, num_patches: int, unique: bool) -> None:
    outside = index[(index < 0) | (index >= num_patches)]
    dispatch.require(outside.numel() == 0, operator, f"index must be in 0 .. {num_patches - 1}", outside.tolist())
    if unique:
        ascending = index.sort(dim=1).values
        repeated = ascending[:, 1:][ascending[:, 1:] == ascending[:, :-1]]
        dispatch.require(repeated.numel() == 0, operator, "index must be unique per row", repeated.tolist())


def _requires_grad(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad
