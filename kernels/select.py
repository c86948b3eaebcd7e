"""Attentive patch selection.

    s_i = max_{j valid} <v_i, t_j> / (max(|v_i|, eps) max(|t_j|, eps))

Patches are ranked by score descending, index ascending; the first are masked for TG-MIM, the last dropped for
captioning. The similarities (B, P, T) are never stored. Limits: `triton` takes up to 1024 patches.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import dispatch, reference, select_cpu

EPS = 1e-8
MAX_PATCHES_TRITON = 1024
_NAME = "attentive_select"


class PatchSelection(NamedTuple):
    """Scores and the four index lists of `attentive_select`.

    Attributes:
        scores: (B, P), fp32, in -1 .. 1 up to rounding.
        masked: (B, num_masked) int64, ascending: the highest-ranked patches.
        visible: (B, P - num_masked) int64, ascending: the others.
        dropped: (B, num_dropped) int64, ascending: the lowest-ranked patches.
        kept: (B, P - num_dropped) int64, ascending: the others.
    """

    scores: Tensor
    masked: Tensor
    visible: Tensor
    dropped: Tensor
    kept: Tensor


@torch.library.custom_op("sycoca_kernels::attentive_select", mutates_args=())
def _select_op(
    patches: Tensor,
    tokens: Tensor,
    valid: Tensor,
    num_masked: int,
    num_dropped: int,
    block: int,
    columns: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if impl == "triton":
        from kernels import select_triton as implementation
    else:
        implementation = select_cpu
    return implementation.select(patches, tokens, valid, num_masked, num_dropped, block, columns, EPS)


@_select_op.register_fake
def _(patches, tokens, valid, num_masked, num_dropped, block, columns, impl):
    B, P, _ = patches.shape
    dtype = torch.float64 if patches.dtype == torch.float64 else torch.float32
    lengths = num_masked, P - num_masked, num_dropped, P - num_dropped
    lists = (patches.new_empty(B, length, dtype=torch.int64) for length in lengths)
    return patches.new_empty(B, P, dtype=dtype), *lists


def attentive_select(
    patches: Tensor,
    tokens: Tensor,
    valid: Tensor,
    *,
    num_masked: int,
    num_dropped: int,
    block: int = 1,
    grid: tuple[int, int] | None = None,
    impl: str = "auto",
) -> PatchSelection:
    """Rank the patches of each image by their best cosine with a caption token, and split them into index lists.

    Source: SyCoCa (arXiv 2401.02137), attentive masking. Carries no gradient. A row without a valid token scores 0
    everywhere, so that its order is that of the indices.

    Args:
        patches: (B, P, D), floating.
        tokens: (B, T, D), the dtype of `patches`.
        valid: (B, T) bool, True where a token takes part in the maximum.
        num_masked: patches in `masked`, in 0 .. P; a multiple of block * block.
        num_dropped: patches in `dropped`, in 0 .. P; a multiple of block * block.
        block: side in patches of the squares that are selected together, ranked by the sum of their scores.
        grid: (rows, columns) of the patches, multiples of `block`; needed where `block` is not 1.
        impl: "auto", or one of `implementations("attentive_select")`.

    Returns:
        The scores and the index lists; products are formed in the input dtype (under autocast in its dtype) and
        accumulated in fp32.

    Raises:
        ValueError: a shape, count, device or implementation does not fit.
        TypeError: a dtype or the type of a scalar does not fit.
    """
    kind = patches.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        if patches.is_floating_point() and patches.dtype != torch.float64:
            patches, tokens = patches.to(dtype), tokens.to(dtype)
        with torch.autocast(kind, enabled=False):
            sizes = {"num_masked": num_masked, "num_dropped": num_dropped, "block": block, "grid": grid}
            return attentive_select(patches, tokens, valid, **sizes, impl=impl)
    rows, columns = _check(patches, tokens, valid, num_masked, num_dropped, block, grid)
    patches, tokens = patches.detach(), tokens.detach()
    B, P, D = patches.shape
    size = B * P * tokens.shape[1] * D
    chosen = dispatch.select(_NAME, impl, patches.device, size=size)
    if chosen == "reference":
        return PatchSelection(
            *reference.attentive_select(patches, tokens, valid, num_masked, num_dropped, block, (rows, columns))
        )
    if chosen == "triton":
        dispatch.require(P <= MAX_PATCHES_TRITON, _NAME, f"triton takes at most {MAX_PATCHES_TRITON} patches", P)
        dispatch.require(patches.dtype != torch.float64, _NAME, "triton takes no float64", patches.dtype, TypeError)
    return PatchSelection(*_select_op(patches, tokens, valid, num_masked, num_dropped, block, columns, chosen))


def _check(
    patches: Tensor,
    tokens: Tensor,
    valid: Tensor,
    num_masked: int,
    num_dropped: int,
    block: int,
    grid: tuple[int, int] | None,
) -> tuple[int, int]:
    """Validate the arguments; the grid of the patches."""
    require = dispatch.require
    require(patches.ndim == 3, _NAME, "patches must be (B, P, D)", tuple(patches.shape))
    B, P, D = patches.shape
    require(
        tokens.ndim == 3 and tokens.shape[0] == B and tokens.shape[2] == D,
        _NAME,
        f"tokens must be ({B}, T, {D})",
        tuple(tokens.shape),
    )
    require(
        tuple(valid.shape) == (B, tokens.shape[1]),
        _NAME,
        f"valid must be ({B}, {tokens.shape[1]})",
        tuple(valid.shape),
    )
    require(patches.is_floating_point(), _NAME, "patches must be floating", patches.dtype, TypeError)
    require(tokens.dtype == patches.dtype, _NAME, f"tokens must be {patches.dtype}", tokens.dtype, TypeError)
    require(valid.dtype == torch.bool, _NAME, "valid must be torch.bool", valid.dtype, TypeError)
    dispatch.require_same_device(_NAME, (patches, tokens, valid))
    for name, count in (("num_masked", num_masked), ("num_dropped", num_dropped), ("block", block)):
        is_count = isinstance(count, int | torch.SymInt) and not isinstance(count, bool)
        require(is_count, _NAME, f"{name} must be an int", repr(count), TypeError)
    require(block >= 1, _NAME, "block must be at least 1", block)
    for name, count in (("num_masked", num_masked), ("num_dropped", num_dropped)):
        require(0 <= count <= P, _NAME, f"{name} must be in 0 .. {P}", count)
        require(count % block**2 == 0, _NAME, f"{name} must be a multiple of block * block = {block**2}", count)
    if grid is None:
        require(block == 1, _NAME, "grid must be given where block is not 1; block is", block)
        return 1, P
    require(
        len(grid) == 2 and math.prod(grid) == P and grid[0] % block == 0 and grid[1] % block == 0,
        _NAME,
        f"grid must be (rows, columns) of {P} patches, multiples of {block}",
        tuple(grid),
    )
    return grid[0], grid[1]
