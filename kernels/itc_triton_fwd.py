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
from kernels.itc_parts import Place, Targets


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
    BY_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    # The columns' logits are those of the gradient to the last bit, which a product of text and image would not give:
    # at logits of 10^4 that bit is a thousandth of a probability.
    AXIS: tl.constexpr = 0 if BY_COLUMN else 1
    OWN: tl.constexpr = BLOCK_N if BY_COLUMN else BLOCK_M
    OTHER: tl.constexpr = BLOCK_M if BY_COLUMN else BLOCK_N
    size = N if BY_COLUMN else M
    first = tl.program_id(0) * OWN
    maximum = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), dtype=tl.float32)
    # The host does not know whether this is needed: where it is not, no tile is formed.
    end = tl.where(tl.load(safe_ptr), 0, M if BY_COLUMN else N)
    factor = tl.load(scale_ptr).to(tl.float32) * LOG2E
    for start in range(0, end, OTHER):
        m = start if BY_COLUMN else first
        n = first if BY_COLUMN else start
        rows = m + tl.arange(0, BLOCK_M)
        columns = n + tl.arange(0, BLOCK_N)
        dot = product_tile(
            image, text, m, n, M, N, D, stride_im, stride_id, stride_tn, stride_td, BLOCK_M, BLOCK_N, BLOCK_D, TMA
        )
        off = (columns[None, :] != rows[:, None] + offset) & (rows < M)[:, None] & (columns < N)[None, :]
        L = tl.where(off, dot * factor, float("-inf"))
        larger = tl.maximum(maximum, tl.max(L, AXIS))
        r = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp2(maximum - r) + tl.sum(tl.exp2(L - tl.expand_dims(r, AXIS)), AXIS)
        maximum = larger
    own = first + tl.arange(0, OWN)
    tl.store(state_ptr + own, maximum, mask=own < size)
    tl.store(state_ptr + size + own, total, mask=own < size)


def sums(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    shift: Tensor,
    targets: Targets,
    place: Place,
) -> tuple[Tensor, Tensor]:
    """Off-diagonal sums under a common shift, and sums of q_ij L_ij."""
    image, text = image.to(place.product), text.to(place.product)
    (M, D), N = image.shape, text.shape[0]
    row, column = (torch.zeros(2, size, device=image.device) for size in (M, N))
    if M == 0 or N == 0:
        return row, column
    one_hot = targets.weight is None
    tile = contrast_tiles.tile_for("sums" if one_hot else "target sums", image, text)
    programs = contrast_tiles.persistent(tile, M, N, image)
    parts = 1 if one_hot else 2
    row_parts, column_parts = (torch.zeros(programs, parts, size, device=image.device) for size in (M, N))
    _sums_kernel[(programs,)](
        *contrast_tiles.operands(image, text, tile),
        logit_scale,
        shift,
        *(shift if x is None else x for x in targets[:3]),
        row_parts,
        column_parts,
        targets.smoothing,
        place.offset,
        M,
        N,
        D,
        *image.stride(),
        *text.stride(),
        HAS_TARGETS=not one_hot,
        HAS_IDS=targets.ids is not None,
        GROUP_M=tile.group_m,
        **contrast_tiles.constants(tile),
    )
    torch.sum(row_parts, 0, out=row[:parts])
    torch.sum(column_parts, 0, out=column[:parts])
    return row, column


def online(image: Tensor, text: Tensor, logit_scale: Tensor, safe: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """Off-diagonal maxima, and sums relative to them."""
    image, text = image.to(place.product), text.to(place.product)
    (M, D), N = image.shape, text.shape[0]
    row, column = (torch.zeros(2, size, device=image.device) for size in (M, N))
    row[0], column[0] = -torch.inf, -torch.inf
    if M == 0 or N == 0:
        return row, column
    tile = contrast_tiles.tile_for("online", image, text)
    for state, by_column, own in ((row, False, tile.block_m), (column, True, tile.block_n)):
        _online_kernel[(triton.cdiv(state.shape[1], own),)](
            *contrast_tiles.operands(image, text, tile),
            logit_scale,
            safe,
            state,
            place.offset,
            M,
            N,
            D,
            *image.stride(),
            *text.stride(),
            BY_COLUMN=by_column,
            **contrast_tiles.constants(tile),
        )
    return row, column
