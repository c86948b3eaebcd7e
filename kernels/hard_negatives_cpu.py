"""Hard negatives with torch operators.

One product, a block of rows at a time. A row is drawn in its block: a chunk by its sum, then a column of it. A column
keeps the sums of every block, draws a block, and has the logits of that one formed again.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# columns of a chunk, and rows of a block of a batch of up to CHUNK * CHUNK
CHUNK = 64


class _Sums(NamedTuple):
    """Of the columns in each block of rows (blocks, B): largest logit, weights relative to it of the negatives and of
    the positives, and the number of negatives."""

    peak: Tensor
    negative: Tensor
    positive: Tensor
    count: Tensor


def sample(
    image: Tensor, text: Tensor, logit_scale: Tensor, ids: Tensor | None, floor: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """For each text an image (B,), for each image a text (B,)."""
    B = image.shape[0]
    text_negative = torch.empty(B, dtype=torch.int64)
    if B == 0:
        return text_negative, text_negative.clone()
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    image, text = image.to(dtype) * logit_scale.reshape(()).to(dtype), text.to(dtype)
    for_images, for_texts = _uniform(seed, B)
    height = max(CHUNK, math.isqrt(B))
    blocks = [slice(start, min(start + height, B)) for start in range(0, B, height)]
    sums = _Sums(*(torch.empty(len(blocks), B, dtype=dtype) for _ in _Sums._fields))
    # whole chunks: what lies past the batch has no weight
    scratch = torch.full((min(height, B), -(-B // CHUNK) * CHUNK), -torch.inf, dtype=dtype)
    for number, rows in enumerate(blocks):
        logits = scratch[: rows.stop - rows.start]
        torch.mm(image[rows], text.T, out=logits[:, :B])
        positives = _positives(ids, rows, B)
        if floor == 0:
            # only negatives weigh, so that none is too small beside a positive
            logits[positives] = -torch.inf
        _sum_columns(logits[:, :B], positives, [part[number] for part in sums])
        text_negative[rows] = _draw_rows(logits, positives, ids, rows, B, floor, for_images[rows])
    return _draw_columns(image, text, ids, blocks, sums, floor, for_texts), text_negative


def _sum_columns(logits: Tensor, positives: tuple[Tensor, Tensor], sums: list[Tensor]) -> None:
    """Fill in the sums of a block (rows, B)."""
    row, column = positives
    peak, negative, positive, count = sums
    torch.amax(logits, 0, out=peak)
    weights = torch.sub(logits, _finite(peak)).exp_()
    positive.zero_().index_add_(0, column, weights[row, column])
    weights[row, column] = 0
    torch.sum(weights, 0, out=negative)
    count.fill_(len(logits)).sub_(torch.bincount(column, minlength=len(count)))


def _draw_rows(
    logits: Tensor,
    positives: tuple[Tensor, Tensor],
    ids: Tensor | None,
    rows: slice,
    B: int,
    floor: float,
    u: Tensor,
) -> Tensor:
    """A column for each row of a block (rows, chunks * CHUNK)."""
    row, column = positives
    height, chunks = len(logits), logits.shape[1] // CHUNK
    weights = torch.sub(logits, _finite(logits.amax(1, keepdim=True))).exp_()
    total = weights.new_zeros(height).index_add_(0, row, weights[row, column])
    weights[row, column] = 0
    weights = weights.view(height, chunks, CHUNK)
    per_chunk = weights.sum(2).double()
    lift = floor * (per_chunk.sum(1) + total)
    count = torch.full((chunks,), float(CHUNK), dtype=torch.float64)
    count[-1] -= chunks * CHUNK - B
    taken = torch.bincount(row * chunks + column // CHUNK, minlength=height * chunks).view(height, chunks)
    per_chunk += (count - taken) * lift[:, None]
    mass = per_chunk.sum(1)
    chunk, rest = _invert(per_chunk, u * mass)
    place = torch.arange(height)
    columns = chunk[:, None] * CHUNK + torch.arange(CHUNK)
    negative = _is_negative(ids, place[:, None] + rows.start, columns, B)
    inside = (weights[place, chunk].double() + lift[:, None]).masked_fill_(~negative, 0)
    drawn = chunk * CHUNK + _invert(inside, rest)[0]
    return drawn.masked_fill_(~((mass > 0) & mass.isfinite()), -1)


def _draw_columns(
    image: Tensor, text: Tensor, ids: Tensor | None, blocks: list[slice], sums: _Sums, floor: float, u: Tensor
) -> Tensor:
    """A row for each column; `image` is scaled."""
    B = len(u)
    peak = _finite(sums.peak.amax(0))
    factor = (sums.peak - peak).exp_().double()
    per_block = sums.negative.double() * factor
    lift = floor * (per_block + sums.positive * factor).sum(0)
    per_block += sums.count * lift
    mass = per_block.sum(0)
    chosen, rest = _invert(per_block.T, u * mass)
    drawn = torch.empty(B, dtype=torch.int64)
    for number, rows in enumerate(blocks):
        columns = (chosen == number).nonzero()[:, 0]
        weights = torch.mm(text[columns], image[rows].T).sub_(peak[columns, None]).exp_().double()
        negative = _is_negative(ids, columns[:, None], torch.arange(rows.start, rows.stop), B)
        weights = weights.add_(lift[columns, None]).masked_fill_(~negative, 0)
        drawn[columns] = rows.start + _invert(weights, rest[columns])[0]
    return drawn.masked_fill_(~((mass > 0) & mass.isfinite()), -1)


def _invert(weights: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """First place in each row of weights (N, K) whose cumulative sum exceeds the threshold (N,), and what is left."""
    cdf = weights.cumsum(1)
    # rounding must carry the threshold neither to the end nor below what has weight
    threshold = torch.minimum(threshold, cdf[:, -1] * (1 - 2**-52)).clamp_min_(0)
    place = (cdf <= threshold[:, None]).sum(1).clamp_max_(weights.shape[1] - 1)
    before = cdf.gather(1, (place[:, None] - 1).clamp_min(0))[:, 0].masked_fill_(place == 0, 0)
    return place, threshold - before


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
