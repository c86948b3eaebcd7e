"""Attentive patch selection, one program per sample.

    s_i = max_{j valid} <v_i, t_j> / (|v_i| |t_j|),    rank_i = #{j: s_j > s_i or (s_j = s_i and j < i)}

Every valid feature is read once, similarities stay in registers, scores go through the score output. Ranks are counted,
so the order is total and no value leaves its place; lists come out ascending by a prefix sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tuning


@triton.jit
def _square_score(score_ptr, square, in_range, columns, SIDE: tl.constexpr):
    """Sum of the scores of SIDE x SIDE patches, added row by row."""
    corner = square
    if SIDE > 1:
        across = columns // SIDE
        corner = square // across * SIDE * columns + square % across * SIDE
    total = tl.load(score_ptr + corner, mask=in_range, other=-float("inf"))
    for member in tl.static_range(1, SIDE * SIDE):
        place = corner + (member // SIDE) * columns + member % SIDE
        total += tl.load(score_ptr + place, mask=in_range, other=0.0)
    return tl.where(total != total, float("inf"), total)


@triton.jit
def _best_cosine(
    v_ptr,
    t_ptr,
    valid_ptr,
    p,
    P,
    T,
    D,
    stride_vp,
    stride_vd,
    stride_tt,
    stride_td,
    stride_valid,
    eps,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scores of the patches p (BLOCK_P,)."""
    d_tile = tl.arange(0, BLOCK_D)
    t_tile = tl.arange(0, BLOCK_T)
    best = tl.full((BLOCK_P,), -float("inf"), tl.float32)
    vv = tl.zeros((BLOCK_P,), tl.float32)
    for t_start in range(0, T, BLOCK_T):
        j = t_start + t_tile
        valid = tl.load(valid_ptr + j * stride_valid, mask=j < T, other=0) != 0
        dot = tl.zeros((BLOCK_P, BLOCK_T), tl.float32)
        tt = tl.zeros((BLOCK_T,), tl.float32)
        vv = tl.zeros((BLOCK_P,), tl.float32)
        for d_start in range(0, D, BLOCK_D):
            d = d_start + d_tile
            v = tl.load(
                v_ptr + p[:, None] * stride_vp + d[None, :] * stride_vd,
                mask=(p < P)[:, None] & (d < D)[None, :],
                other=0.0,
            )
            t = tl.load(
                t_ptr + j[:, None] * stride_tt + d[None, :] * stride_td,
                mask=valid[:, None] & (d < D)[None, :],
                other=0.0,
            )
            dot = tl.dot(v, tl.trans(t), dot, input_precision="ieee")
            vv += tl.sum(v.to(tl.float32) * v.to(tl.float32), 1)
            tt += tl.sum(t.to(tl.float32) * t.to(tl.float32), 1)
        # one multiply-add per similarity: -inf where the token does not count
        scale = 1.0 / tl.maximum(tl.sqrt(tt), eps)
        bias = tl.where(valid, 0.0, -float("inf"))
        best = tl.maximum(best, tl.max(dot * scale[None, :] + bias[None, :], 1))
    s = best / tl.maximum(tl.sqrt(vv), eps)
    # no valid token; and no negative zero
    return tl.where((best == -float("inf")) | (s == 0.0), 0.0, s)


@triton.jit
def _select_kernel(
    v_ptr,
    t_ptr,
    valid_ptr,
    score_ptr,
    masked_ptr,
    visible_ptr,
    dropped_ptr,
    kept_ptr,
    P,
    T,
    D,
    num_masked,
    num_dropped,
    columns,
    stride_vb,
    stride_vp,
    stride_vd,
    stride_tb,
    stride_tt,
    stride_td,
    stride_valid_b,
    stride_valid_t,
    eps,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    SIDE: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    v_ptr += b * stride_vb
    t_ptr += b * stride_tb
    valid_ptr += b * stride_valid_b
    score_ptr += b * P
    for p_start in range(0, P, BLOCK_P):
        p = p_start + tl.arange(0, BLOCK_P)
        s = _best_cosine(
            v_ptr, t_ptr, valid_ptr, p, P, T, D, stride_vp, stride_vd, stride_tt, stride_td, stride_valid_t, eps,
            BLOCK_P, BLOCK_T, BLOCK_D,
        )  # fmt: skip
        tl.store(score_ptr + p, s, mask=p < P)
    # scores of other threads
    tl.debug_barrier()
    i = tl.arange(0, PLACES)
    place = i < P
    squares = P // (SIDE * SIDE)
    square = i
    if SIDE > 1:
        square = i // columns // SIDE * (columns // SIDE) + i % columns // SIDE
    own = _square_score(score_ptr, square, place, columns, SIDE)
    rank = tl.zeros((PLACES,), tl.int32)
    for start in range(0, squares, BLOCK_RANK):
        other = start + tl.arange(0, BLOCK_RANK)
        value = _square_score(score_ptr, other, other < squares, columns, SIDE)
        rank += tl.sum((value[:, None] > own[None, :]).to(tl.int32), 0)
    # without ties the ranks are a permutation; only then may their sum be this large
    if tl.sum(tl.where(place, rank, 0)) != SIDE * SIDE * (squares * (squares - 1) // 2):
        for start in range(0, squares, BLOCK_RANK):
            other = start + tl.arange(0, BLOCK_RANK)
            value = _square_score(score_ptr, other, other < squares, columns, SIDE)
            tied = (value[:, None] == own[None, :]) & (other[:, None] < square[None, :])
            rank += tl.sum(tied.to(tl.int32), 0)
    rank *= SIDE * SIDE
    masked = place & (rank < num_masked)
    dropped = place & (rank >= P - num_dropped)
    # two counts in one prefix sum
    count = tl.cumsum(masked.to(tl.int32) + (dropped.to(tl.int32) << 16), 0)
    masked_before = (count & 0xFFFF) - masked.to(tl.int32)
    dropped_before = (count >> 16) - dropped.to(tl.int32)
    index = i.to(tl.int64)
    tl.store(masked_ptr + b * num_masked + masked_before, index, mask=masked)
    tl.store(visible_ptr + b * (P - num_masked) + i - masked_before, index, mask=place & (masked == 0))
    tl.store(dropped_ptr + b * num_dropped + dropped_before, index, mask=dropped)
    tl.store(kept_ptr + b * (P - num_dropped) + i - dropped_before, index, mask=place & (dropped == 0))


def select(
    patches: Tensor,
    tokens: Tensor,
    valid: Tensor,
    num_masked: int,
    num_dropped: int,
    block: int,
    columns: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scores (B, P) and the index lists masked, visible, dropped, kept."""
    B, P, D = patches.shape
    T = tokens.shape[1]
    scores = patches.new_empty(B, P, dtype=torch.float32)
    lengths = num_masked, P - num_masked, num_dropped, P - num_dropped
    lists = [patches.new_empty(B, length, dtype=torch.int64) for length in lengths]
    if B * P == 0:
        return scores, *lists
    hopper = not patches.is_cuda or torch.cuda.get_device_capability(patches.device) >= (9, 0)
    tile = tuning.select_tile(P, T, D, patches.element_size(), hopper)
    # one byte per token, whatever the pointer type of a bool is
    valid = valid.view(torch.uint8)
    with torch.cuda.device_of(patches):
        _select_kernel[(B,)](
            patches, tokens, valid, scores, *lists, P, T, D, num_masked, num_dropped, columns,
            *patches.stride(), *tokens.stride(), *valid.stride(), eps,
            BLOCK_P=tile.block_p, BLOCK_T=tile.block_t, BLOCK_D=tile.block_d,
            PLACES=tile.places, BLOCK_RANK=tile.block_rank, SIDE=block,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tuning.REGISTERS,
        )  # fmt: skip
    return scores, *lists
