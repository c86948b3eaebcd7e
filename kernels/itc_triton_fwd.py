"""Statistics of the contrastive loss, in Triton.

    O_i = sum_{j != i} 2^(L_ij - r)     rows and columns of each tile of logits, from one product

A persistent program adds the sums of its tiles to partial rows that it alone holds; a second pass adds the programs in
a fixed order. Traffic: the operands once per group of tiles, 8 bytes of partial sums per row, column and program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import contrast_tiles
from kernels.contrast_triton import LOG2E
from kernels.device import add_to_partial, grouped_tile, product_tile, touches_edge


@triton.jit
def _sums_kernel(
    image,
    text,
    scale_ptr,
    shift_ptr,
    ids_ptr,
    text_ids_ptr,
    weight_ptr,
    row_ptr,
    column_ptr,
    smoothing,
    offset,
    M,
    N,
    D,
    stride_im,
    stride_id,
    stride_tn,
    stride_td,
    HAS_TARGETS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
):
    factor = tl.load(scale_ptr).to(tl.float32) * LOG2E
    r = tl.load(shift_ptr)
    PARTS: tl.constexpr = 2 if HAS_TARGETS else 1
    program = tl.program_id(0).to(tl.int64)
    row_ptr += program * PARTS * M
    column_ptr += program * PARTS * N
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        m, n = grouped_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        rows = m + tl.arange(0, BLOCK_M)
        columns = n + tl.arange(0, BLOCK_N)
        dot = product_tile(
            image, text, m, n, M, N, D, stride_im, stride_id, stride_tn, stride_td, BLOCK_M, BLOCK_N, BLOCK_D, TMA
        )
        L = dot * factor
        E = tl.exp2(L - r)
        edge = touches_edge(m, n, M, N, offset, BLOCK_M, BLOCK_N)
        if edge:
            off = (columns[None, :] != rows[:, None] + offset) & (rows < M)[:, None] & (columns < N)[None, :]
            E = tl.where(off, E, 0.0)
        add_to_partial(row_ptr, rows, tl.sum(E, 1), M)
        add_to_partial(column_ptr, columns, tl.sum(E, 0), N)
        if HAS_TARGETS:
            q = target_tile(ids_ptr, text_ids_ptr, weight_ptr, rows, columns, M, N, smoothing, HAS_IDS)
            off = (columns[None, :] != rows[:, None] + offset) & (rows < M)[:, None] & (columns < N)[None, :]
            qL = tl.where(off, q * L, 0.0)
            add_to_partial(row_ptr + M, rows, tl.sum(qL, 1), M)
            add_to_partial(column_ptr + N, columns, tl.sum(qL, 0), N)


@triton.jit
def target_tile(ids_ptr, text_ids_ptr, weight_ptr, rows, columns, M, N, smoothing, HAS_IDS: tl.constexpr):
    """q_ij off the diagonal."""
    q = tl.full((rows.shape[0], columns.shape[0]), 0.0, tl.float32)
    if HAS_IDS:
        ids = tl.load(ids_ptr + rows, mask=rows < M, other=0)
        text_ids = tl.load(text_ids_ptr + columns, mask=columns < N, other=0)
        weight = tl.load(weight_ptr + rows, mask=rows < M, other=0.0)
        q = tl.where(ids[:, None] == text_ids[None, :], weight[:, None], 0.0)
    return q + smoothing


@triton.jit
def _online_kernel(
    image,
    text,
    scale_ptr,
    safe_ptr,
    state_ptr,
    offset,
    M,
    N,
    D,
    stride_im,
    stride_id,
    stride_tn,
    stride_td,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M
    rows = m + tl.arange(0, BLOCK_M)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    # The host does not know whether this is needed: where it is not, no tile is formed.
    end = tl.where(tl.load(safe_ptr), 0, N)
    factor = tl.load(scale_ptr).to(tl.float32) * LOG2E
    for n in range(0, end, BLOCK_N):
        columns = n + tl.arange(0, BLOCK_N)
        dot = product_tile(
            image, text, m, n, M, N, D, stride_im, stride_id, stride_tn, stride_td, BLOCK_M, BLOCK_N, BLOCK_D, TMA
        )
        off = (columns[None, :] != rows[:, None] + offset) & (columns < N)[None, :]
        L = tl.where(off, dot * factor, float("-inf"))
        larger = tl.maximum(maximum, tl.max(L, 1))
        r = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp2(maximum - r) + tl.sum(tl.exp2(L - r[:, None]), 1)
        maximum = larger
    tl.store(state_ptr + rows, maximum, mask=rows < M)
    tl.store(state_ptr + M + rows, total, mask=rows < M)


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
) -> tuple[Tensor, Tensor]:
    """Off-diagonal sums under a common shift, rows (2, b) and columns (2, n); second row: sum of q_ij L_ij."""
    image, text = image.to(product), text.to(product)
    (M, D), N = image.shape, text.shape[0]
    row, column = (torch.zeros(2, size, device=image.device) for size in (M, N))
    if M == 0 or N == 0:
        return row, column
    tile = contrast_tiles.tile_for("sums" if weight is None else "target sums", image, text)
    tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n)
    programs = min(contrast_tiles.processors(image) * tile.per_processor, tiles)
    parts = 1 if weight is None else 2
    row_parts, column_parts = (torch.zeros(programs, parts, size, device=image.device) for size in (M, N))
    _sums_kernel[(programs,)](
        contrast_tiles.operand(image, tile, tile.block_m),
        contrast_tiles.operand(text, tile, tile.block_n),
        logit_scale,
        shift,
        *(shift if x is None else x for x in (ids, text_ids, weight)),
        row_parts,
        column_parts,
        smoothing,
        offset,
        M,
        N,
        D,
        *image.stride(),
        *text.stride(),
        HAS_TARGETS=weight is not None,
        HAS_IDS=ids is not None,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=tile.block_d,
        GROUP_M=tile.group_m,
        TMA=tile.tma,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    torch.sum(row_parts, 0, out=row[:parts])
    torch.sum(column_parts, 0, out=column[:parts])
    return row, column


def online(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    safe: Tensor,
    offset: int,
    product: torch.dtype,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Off-diagonal maxima and sums relative to them, rows (2, b) and columns (2, n); nothing is done where safe."""
    image, text = image.to(product), text.to(product)
    states = []
    for a, b, diagonal in ((image, text, offset), (text, image, -offset)):
        (M, D), N = a.shape, b.shape[0]
        state = torch.empty(2, M, device=a.device)
        if N == 0:
            state[0], state[1] = -torch.inf, 0.0
        elif M:
            tile = contrast_tiles.tile_for("online", a, b)
            _online_kernel[(triton.cdiv(M, tile.block_m),)](
                contrast_tiles.operand(a, tile, tile.block_m),
                contrast_tiles.operand(b, tile, tile.block_n),
                logit_scale,
                safe,
                state,
                diagonal,
                M,
                N,
                D,
                *a.stride(),
                *b.stride(),
                BLOCK_M=tile.block_m,
                BLOCK_N=tile.block_n,
                BLOCK_D=tile.block_d,
                TMA=tile.tma,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
        states.append(state)
    return states[0], states[1]
