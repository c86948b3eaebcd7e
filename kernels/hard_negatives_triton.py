"""Hard negatives: the sums of every tile of logits in both directions from one product, then a program for each draw.

A draw takes a tile by its sums, in fp64, as the floor is far below the rounding of fp32 beside 1; then it forms the
logits of one row of that tile again.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import dispatch, tuning
from kernels.device import product_tile

# the interpreter pays by the tile, and several of them must meet
INTERPRETED_TILE = tuning.PairsTile(16, 16, 4, 1, "interpreted")
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _store_sums(sums_ptr, logits, counted, negative, tile, index, B, tiles, AXIS: tl.constexpr):
    """Largest logit, weights relative to it of the negatives and of all, and the number of negatives, along an axis."""
    peak = tl.max(tl.where(counted, logits, -float("inf")), AXIS)
    # the maximum over nothing
    base = tl.where(peak == -float("inf"), 0.0, peak)
    weights = tl.where(counted, tl.exp2(logits - tl.expand_dims(base, AXIS)), 0.0)
    ptr = sums_ptr + tile.to(tl.int64) * B + index
    step = tiles * B
    tl.store(ptr, peak, mask=index < B)
    tl.store(ptr + step, tl.sum(tl.where(negative, weights, 0.0), AXIS), mask=index < B)
    tl.store(ptr + 2 * step, tl.sum(weights, AXIS), mask=index < B)
    tl.store(ptr + 3 * step, tl.sum(negative.to(tl.float32), AXIS), mask=index < B)


@triton.jit
def _sums_kernel(
    image_ptr,
    text_ptr,
    scale_ptr,
    ids_ptr,
    sums_ptr,
    B,
    D,
    stride_im,
    stride_id,
    stride_tn,
    stride_td,
    stride_ids,
    HAS_IDS: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(B, SIDE)
    row_tile = tl.program_id(0) // tiles
    column_tile = tl.program_id(0) % tiles
    m, n = row_tile * SIDE, column_tile * SIDE
    dot = product_tile(
        image_ptr, text_ptr, m, n, B, B, D, stride_im, stride_id, stride_tn, stride_td, SIDE, SIDE, BLOCK_D, False
    )
    # logits in base 2
    logits = dot * (tl.load(scale_ptr).to(tl.float32) * LOG2_E)
    i = m + tl.arange(0, SIDE)
    j = n + tl.arange(0, SIDE)
    if HAS_IDS:
        own = tl.load(ids_ptr + i.to(tl.int64) * stride_ids, mask=i < B, other=0)
        other = tl.load(ids_ptr + j.to(tl.int64) * stride_ids, mask=j < B, other=0)
        differs = own[:, None] != other[None, :]
    else:
        differs = i[:, None] != j[None, :]
    inside = (i < B)[:, None] & (j < B)[None, :]
    negative = inside & differs
    # without a floor only negatives weigh, so that none is too small beside a positive
    counted = inside if HAS_FLOOR else negative
    _store_sums(sums_ptr, logits, counted, negative, column_tile, i, B, tiles, 1)
    _store_sums(sums_ptr + 4 * tiles * B, logits, counted, negative, row_tile, j, B, tiles, 0)


@triton.jit
def _mix(bits):
    """Finaliser of SplitMix64."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@triton.jit
def _invert(weights, threshold):
    """First place whose cumulative weight exceeds the threshold, what is left of it, and whether there is weight."""
    cdf = tl.cumsum(weights, 0)
    last = tl.max(cdf, 0)
    # rounding must carry the threshold neither to the end nor below what has weight
    threshold = tl.maximum(tl.minimum(threshold, last * (1.0 - 2.220446049250313e-16)), 0.0)
    passed = cdf <= threshold
    return tl.sum(passed.to(tl.int32), 0), threshold - tl.max(tl.where(passed, cdf, 0.0), 0), last > 0


@triton.jit
def _draw_kernel(
    own_ptr,
    other_ptr,
    scale_ptr,
    ids_ptr,
    seed_ptr,
    sums_ptr,
    drawn_ptr,
    floor,
    B,
    D,
    tiles,
    stride_an,
    stride_ad,
    stride_bn,
    stride_bd,
    stride_ids,
    DIRECTION: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    counter = 2 * row + (DIRECTION + 1)
    seed = tl.load(seed_ptr).to(tl.uint64)
    bits = _mix(_mix(seed) + counter.to(tl.uint64) * 0x9E3779B97F4A7C15)
    u = (bits >> 11).to(tl.float64) * 1.1102230246251565e-16

    t = tl.arange(0, BLOCK_T)
    step = tiles * B
    sums_ptr += DIRECTION * 4 * step + t * B + row
    peak = tl.load(sums_ptr, mask=t < tiles, other=-float("inf"))
    top = tl.max(peak, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    factor = tl.exp2(peak - top)
    negative_sum = (tl.load(sums_ptr + step, mask=t < tiles, other=0.0) * factor).to(tl.float64)
    whole_sum = (tl.load(sums_ptr + 2 * step, mask=t < tiles, other=0.0) * factor).to(tl.float64)
    count = tl.load(sums_ptr + 3 * step, mask=t < tiles, other=0.0).to(tl.float64)
    lift = tl.sum(whole_sum, 0) * floor
    weights = negative_sum + lift * count
    mass = tl.sum(weights, 0)
    tile, rest, _ = _invert(weights, u * mass)

    j = tile.to(tl.int64) * SIDE + tl.arange(0, SIDE)
    logits = tl.zeros((SIDE,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        own = tl.load(own_ptr + row * stride_an + d * stride_ad, mask=d < D, other=0.0).to(tl.float32)
        other = tl.load(
            other_ptr + j[:, None] * stride_bn + d[None, :] * stride_bd,
            mask=(j < B)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        logits += tl.sum(other.to(tl.float32) * own[None, :], 1)
    logits *= tl.load(scale_ptr).to(tl.float32) * LOG2_E
    if HAS_IDS:
        differs = tl.load(ids_ptr + j * stride_ids, mask=j < B, other=0) != tl.load(ids_ptr + row * stride_ids)
    else:
        differs = j != row
    weights = tl.where(differs & (j < B), tl.exp2(logits - top).to(tl.float64) + lift, 0.0)
    place, _, found = _invert(weights, rest)
    exists = found & (mass > 0) & (mass < float("inf"))
    tl.store(drawn_ptr + row, tl.where(exists, tile.to(tl.int64) * SIDE + place, -1))


def sample(
    image: Tensor, text: Tensor, logit_scale: Tensor, ids: Tensor | None, floor: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """For each text an image (B,), for each image a text (B,)."""
    B, D = image.shape
    image_negative, text_negative = (image.new_empty(B, dtype=torch.int64) for _ in range(2))
    if B == 0:
        return image_negative, text_negative
    tile = INTERPRETED_TILE if dispatch.interpreting() else tuning.negatives_tile(D, image.element_size())
    tiles = triton.cdiv(B, tile.side)
    # direction, kind of sum, tile, sample
    sums = torch.empty(2, 4, tiles, B, dtype=torch.float32, device=image.device)
    stride_ids = 0 if ids is None else ids.stride(0)
    options = {"HAS_IDS": ids is not None, "SIDE": tile.side, "BLOCK_D": tile.block_d, "num_warps": tile.warps}
    with torch.cuda.device_of(image):
        _sums_kernel[(tiles * tiles,)](
            image, text, logit_scale, ids, sums, B, D, *image.stride(), *text.stride(), stride_ids,
            HAS_FLOOR=floor > 0, num_stages=tile.stages, **options,
        )  # fmt: skip
        for direction, (own, other, drawn) in enumerate(((image, text, text_negative), (text, image, image_negative))):
            _draw_kernel[(B,)](
                own, other, logit_scale, ids, seed, sums, drawn, floor, B, D, tiles,
                *own.stride(), *other.stride(), stride_ids,
                DIRECTION=direction, BLOCK_T=max(16, triton.next_power_of_2(tiles)), **options,
            )  # fmt: skip
    return image_negative, text_negative
