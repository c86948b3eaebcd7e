"""Hard negatives with torch operators.

One product, a block of rows at a time, of which the sums over square tiles are kept in both directions. Every row and
every column draws a tile by them; then the logits of the tiles drawn are formed again.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# side of a tile of a batch of up to SIDE * SIDE
SIDE = 64
# logits of a block of rows, at least one tile high: few operators, and scratch that stays in the cache
BLOCK_VALUES = 256 * 1024
# logits this far apart have weights of one scale in fp32
ONE_SCALE = 80.0


class _Sums(NamedTuple):
    """Of each row, or column, in each tile (B, tiles): what the weights are relative to, their sum over the negatives,
    that over the positives, and the number of negatives."""

    peak: Tensor
    negative: Tensor
    positive: Tensor
    count: Tensor


def sample(
    image: Tensor, text: Tensor, logit_scale: Tensor, ids: Tensor | None, floor: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """For each text an image (B,), for each image a text (B,)."""
    B = image.shape[0]
    if B == 0:
        return tuple(torch.empty(0, dtype=torch.int64) for _ in range(2))
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    image, text = image.to(dtype) * logit_scale.reshape(()).to(dtype), text.to(dtype)
    side = max(SIDE, math.isqrt(B))
    for_images, for_texts = _uniform(seed, B)
    of_rows, of_columns = _sums(image, text, ids, floor, side)
    text_negative = _draw(image, text, ids, of_rows, floor, for_images, side)
    return _draw(text, image, ids, of_columns, floor, for_texts, side), text_negative


def _sums(image: Tensor, text: Tensor, ids: Tensor | None, floor: float, side: int) -> tuple[_Sums, _Sums]:
    """Sums of the rows and of the columns; `image` is scaled."""
    B = len(image)
    tiles = -(-B // side)
    count = torch.full((B, tiles), float(side), dtype=torch.float64)
    count[:, -1] -= tiles * side - B
    rows = _Sums(image.new_empty(B, 1), image.new_empty(B, tiles), image.new_empty(B, 1), count)
    columns = _Sums(*image.new_zeros(3, tiles, B), count)
    # whole tiles: what lies past the batch weighs nothing
    high = min(tiles, max(1, BLOCK_VALUES // (side * B)))
    scratch = image.new_zeros(high * side, tiles * side)
    for first in range(0, tiles, high):
        here = slice(first * side, min((first + high) * side, B))
        height = here.stop - here.start
        of_tiles = slice(first, -(-here.stop // side))
        block = scratch[: (of_tiles.stop - first) * side]
        logits = block[:, :B]
        torch.mm(image[here], text.T, out=logits[:height])
        logits[height:] = -torch.inf
        row, column = positives = _positives(ids, here, B)
        if floor == 0:
            # only negatives weigh, so that none is too small beside a positive
            logits[positives] = -torch.inf
        least, most = torch.aminmax(logits[:height])
        one_scale = bool(most - least < ONE_SCALE)
        peak, weights = (most, logits) if one_scale else (_tiled(logits, side).amax(1), logits.clone())
        taken = _weigh(weights, peak if one_scale else peak.repeat_interleave(side, 0), positives)
        columns.peak[of_tiles] = peak
        torch.sum(_tiled(weights, side), 1, out=columns.negative[of_tiles])
        place = (first + row // side) * B + column
        columns.positive.view(-1).index_add_(0, place, taken)
        if not one_scale:
            peak = logits.amax(1, keepdim=True)
            taken = _weigh(logits, peak, positives)
            peak = peak[:height]
        rows.peak[here] = peak
        torch.sum(block[:height].unflatten(1, (tiles, side)), 2, out=rows.negative[here])
        rows.positive[here, 0] = weights.new_zeros(height).index_add_(0, row, taken)
        count[here] -= torch.bincount(row * tiles + column // side, minlength=height * tiles).view(-1, tiles)
    return rows, _Sums(*(part.T for part in columns[:3]), count)


def _tiled(x: Tensor, side: int) -> Tensor:
    """Rows of a block as (tiles, side, B)."""
    return x.unflatten(0, (-1, side))


def _weigh(logits: Tensor, peak: Tensor, positives: tuple[Tensor, Tensor]) -> Tensor:
    """exp(logits - peak) in place, 0 for positives, whose weights are returned."""
    logits.sub_(_finite(peak)).exp_()
    taken = logits[positives]
    logits[positives] = 0
    return taken


def _draw(own: Tensor, other: Tensor, ids: Tensor | None, sums: _Sums, floor: float, u: Tensor, side: int) -> Tensor:
    """A row of `other` (B, D) for each of `own` (B, D), one of which is scaled."""
    B, tiles = sums.count.shape
    peak = _finite(sums.peak.amax(1, keepdim=True))
    factor = (sums.peak - peak).exp_().double()
    weights = sums.negative * factor
    lift = floor * (weights.sum(1, keepdim=True) + (sums.positive * factor).sum(1, keepdim=True))
    weights += sums.count * lift
    mass = weights.sum(1)
    tile, rest = _invert(weights, u * mass)
    # those that drew one tile stand together
    order = tile.argsort()
    bounds = [0, *torch.bincount(tile, minlength=tiles).cumsum(0).tolist()]
    rows, logits = own[order], own.new_empty(B, side)
    for number in range(tiles):
        start, stop = bounds[number : number + 2]
        columns = other[number * side : (number + 1) * side]
        torch.mm(rows[start:stop], columns.T, out=logits[start:stop, : len(columns)])
    first = tile[order] * side
    negative = _is_negative(ids, order[:, None], first[:, None] + torch.arange(side), B)
    weights = logits.sub_(peak[order]).exp_().double().add_(lift[order]).masked_fill_(~negative, 0)
    drawn = torch.empty(B, dtype=torch.int64)
    drawn[order] = first + _invert(weights, rest[order])[0]
    return drawn.masked_fill_(~((mass > 0) & mass.isfinite()), -1)


def _invert(weights: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """First place in each row of weights (N, K) whose cumulative sum exceeds the threshold (N,), and what is left."""
    cdf = weights.cumsum(1)
    # rounding must carry the threshold neither to the end nor below what has weight
    threshold = torch.minimum(threshold, cdf[:, -1] * (1 - 2**-52)).clamp_min_(0)
    passed = cdf <= threshold[:, None]
    place = passed.sum(1).clamp_max_(weights.shape[1] - 1)
    return place, threshold - cdf.masked_fill_(~passed, 0).amax(1)


def _positives(ids: Tensor | None, rows: slice, B: int) -> tuple[Tensor, Tensor]:
    """Row in the block and column of each positive."""
    if ids is None:
        return torch.arange(rows.stop - rows.start), torch.arange(rows.start, rows.stop)
    return (ids[rows, None] == ids).nonzero(as_tuple=True)


def _is_negative(ids: Tensor | None, row: Tensor, column: Tensor, B: int) -> Tensor:
    differs = row != column if ids is None else ids[row] != ids[column.clamp(max=B - 1)]
    return differs & (column < B)


def _finite(peak: Tensor) -> Tensor:
    """0 in place of the maximum over nothing."""
    return peak.masked_fill(peak == -torch.inf, 0)


def _uniform(seed: Tensor, B: int) -> Tensor:
    """(2, B) fp64 in [0, 1), by SplitMix64: a number of 53 bits for each row, and for each column."""
    counter = torch.arange(1, 2 * B + 1).view(B, 2).T
    bits = _mix(_mix(seed) + counter * (0x9E3779B97F4A7C15 - 2**64))
    return _shift(bits, 11).double() * 2**-53


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift(bits, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    bits = (bits ^ _shift(bits, 27)) * (0x94D049BB133111EB - 2**64)
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, places: int) -> Tensor:
    """Shift to the right without the sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)
