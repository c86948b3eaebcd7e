"""Mean of the patches in rectangles of a grid.

    y_e = 1 / |r_e| sum_{p in r_e} x_{g(e), p},    dx_{n, p} = sum_{e: g(e) = n, p in r_e} dy_e / |r_e|

Rectangles are taken image by image, so that an image's features are read once and its gradient is stored once, without
atomics. A value that is not finite spoils the rectangles of its image.
"""

import torch
from torch import Tensor

from kernels import dispatch, reference, region_pool_cpu

_NAME = "region_pool"


def _implementation(impl: str):
    if impl == "triton":
        from kernels import region_pool_triton

        return region_pool_triton
    return region_pool_cpu


@torch.library.custom_op("sycoca_kernels::region_pool", mutates_args=())
def _pool_op(x: Tensor, rects: Tensor, order: Tensor, starts: Tensor, impl: str) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return _implementation(impl).pool(x, rects, order, starts)


@_pool_op.register_fake
def _(x, rects, order, starts, impl):
    return x.new_empty(rects.shape[0], x.shape[3])


@torch.library.custom_op("sycoca_kernels::region_pool_backward", mutates_args=())
def _pool_backward_op(
    dy: Tensor, rects: Tensor, order: Tensor, starts: Tensor, rows: int, columns: int, impl: str
) -> Tensor:
    with torch.autocast(dy.device.type, enabled=False):
        return _implementation(impl).pool_backward(dy, rects, order, starts, rows, columns)


@_pool_backward_op.register_fake
def _(dy, rects, order, starts, rows, columns, impl):
    return dy.new_empty(starts.shape[0] - 1, rows, columns, dy.shape[1])


def _context(ctx, inputs, output):
    x, rects, order, starts, impl = inputs
    ctx.save_for_backward(rects, order, starts)
    ctx.settings = x.shape[1], x.shape[2], impl


def _autograd(ctx, dy):
    return _pool_backward_op(dy, *ctx.saved_tensors, *ctx.settings), None, None, None, None


_pool_op.register_autograd(_autograd, setup_context=_context)


def region_pool(x: Tensor, rects: Tensor, image_index: Tensor, *, impl: str = "auto") -> Tensor:
    """Pool the patches of each rectangle to their mean: the feature of a box, or of a whole image.

    Source: X-VLM (arXiv 2111.08276), section 3.1.

    Args:
        x: (N, R, C, D), floating: N images of R rows and C columns of patches.
        rects: (E, 4) int32 cells, [col0, row0, col1, row1), ends excluded. What lies outside the grid is cut off; a
            rectangle without a cell has the mean 0 and no gradient.
        image_index: (E,) int64 in 0 .. N - 1, the image of each rectangle, in any order.
        impl: "auto", or one of `implementations("region_pool")`.

    Returns:
        (E, D) in the dtype of `x`; sums are formed in fp32. Differentiable once in x.

    Raises:
        ValueError: a shape, device or implementation does not fit.
        TypeError: a dtype does not fit.
    """
    _check(x, rects, image_index)
    chosen = dispatch.select(_NAME, impl, x.device, size=rects.shape[0] * x.shape[1] * x.shape[2] * x.shape[3])
    if chosen == "reference":
        return reference.region_pool(x, rects, image_index)
    if chosen == "triton":
        dispatch.require(x.dtype != torch.float64, _NAME, "triton takes no float64", x.dtype, TypeError)
    image, order = image_index.sort(stable=True)
    # rectangles order[starts[n]] .. order[starts[n + 1] - 1] are those of image n
    starts = torch.searchsorted(image, torch.arange(x.shape[0] + 1, device=x.device))
    return _pool_op(x, rects, order, starts, chosen)


def _check(x: Tensor, rects: Tensor, image_index: Tensor) -> None:
    require = dispatch.require
    require(x.ndim == 4, _NAME, "x must be (N, R, C, D)", tuple(x.shape))
    require(rects.ndim == 2 and rects.shape[1] == 4, _NAME, "rects must be (E, 4)", tuple(rects.shape))
    E = rects.shape[0]
    require(tuple(image_index.shape) == (E,), _NAME, f"image_index must be ({E},)", tuple(image_index.shape))
    require(x.is_floating_point(), _NAME, "x must be floating", x.dtype, TypeError)
    require(rects.dtype == torch.int32, _NAME, "rects must be torch.int32", rects.dtype, TypeError)
    index_dtype = image_index.dtype
    require(index_dtype == torch.int64, _NAME, "image_index must be torch.int64", index_dtype, TypeError)
    dispatch.require_same_device(_NAME, (x, rects, image_index))
    if dispatch.checks_enabled():
        N, R, C, _ = x.shape
        outside = image_index[(image_index < 0) | (image_index >= N)]
        require(outside.numel() == 0, _NAME, f"image_index must be in 0 .. {N - 1}", outside.tolist())
        low, high = rects[:, :2], rects[:, 2:]
        fits = ((low >= 0) & (low < high) & (high <= rects.new_tensor([C, R]))).all(1)
        limit = f"rects must hold cells of {R} rows and {C} columns"
        require(bool(fits.all()), _NAME, limit, rects[~fits].tolist())
