"""Statistics of the contrastive loss on sm_90, with specialised warps; gradients by `itc_gluon_bwd`.

Each group of warps adds to partial sums that it alone holds. Limits: 16-bit features that TMA can describe; one-hot
targets without smoothing. Anything else takes the kernels of `itc_triton`.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels import contrast_gluon, contrast_tiles, itc_triton, tuning
from kernels.contrast_gluon import LOG2E, allocate, group_barrier, move, multiply, tile_of_turn, touches_edge, turns
from kernels.itc_gluon_bwd import grads
from kernels.itc_parts import Place, Targets
from kernels.itc_triton import online, prologue

__all__ = ["grads", "online", "prologue", "sums"]


@gluon.jit
def _add(ptr, index, value, size):
    group_barrier()
    inside = index < size
    gl.store(ptr + index, gl.load(ptr + index, mask=inside, other=0.0) + value, mask=inside)


@gluon.jit
def _sum(
    buffers,
    sums,
    place,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    GROUP_M: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    row_ptr, column_ptr, scale_ptr, shift_ptr, offset = sums
    _, _, M, N, D = place
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    factor = gl.load(scale_ptr).to(gl.float32) * LOG2E
    r = gl.load(shift_ptr)
    part = (gl.program_id(0) * 2 + GROUP).to(gl.int64)
    row_ptr += part * M
    column_ptr += part * N
    tiles_m, tiles_n = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N)
    # The groups take turns: a group multiplies its tile only when the other one has multiplied the tile before.
    for turn in range(GROUP, turns(tiles_m, tiles_n), 2):
        m, n = tile_of_turn(turn, tiles_m, tiles_n, BLOCK_M, BLOCK_N, GROUP_M)
        zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
        acc = multiply(buffers, turn, gl.cdiv(D, BLOCK_D), GROUP, zeros, BUFFERS)
        rows = m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
        columns = n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
        E = gl.exp2(acc * factor - r)
        if touches_edge(m, n, M, N, offset, BLOCK_M, BLOCK_N):
            wide_rows, wide_columns = gl.expand_dims(rows, 1), gl.expand_dims(columns, 0)
            off = (wide_columns != wide_rows + offset) & (wide_rows < M) & (wide_columns < N)
            E = gl.where(off, E, 0.0)
        _add(row_ptr, rows, gl.sum(E, 1), M)
        _add(column_ptr, columns, gl.sum(E, 0), N)


@gluon.jit
def _sums_specialised_kernel(
    image,
    text,
    scale_ptr,
    shift_ptr,
    row_ptr,
    column_ptr,
    offset,
    M,
    N,
    D,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    GROUP_M: gl.constexpr,
    BUFFERS: gl.constexpr,
    PRODUCER: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    buffers = allocate(image, text, BLOCK_M, BLOCK_N, BLOCK_D, BUFFERS)
    sums = (row_ptr, column_ptr, scale_ptr, shift_ptr, offset)
    place = (0, 0, M, N, D)
    gl.warp_specialize(
        [
            (_sum, (buffers, sums, place, 0, BLOCK_M, BLOCK_N, BLOCK_D, GROUP_M, BUFFERS)),
            (_sum, (buffers, sums, place, 1, BLOCK_M, BLOCK_N, BLOCK_D, GROUP_M, BUFFERS)),
            (move, (image, text, buffers, place, BLOCK_M, BLOCK_N, BLOCK_D, GROUP_M, BUFFERS)),
        ],
        [4, 1],
        [CONSUMER, PRODUCER],
    )


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
    if not contrast_gluon.supports(image, text, targets.weight):
        return itc_triton.sums(image, text, logit_scale, shift, targets, place)
    (M, D), N = image.shape, text.shape[0]
    tile = tuning.GLUON_SUMS
    programs = contrast_tiles.persistent(tile, M, N, image)
    row_parts, column_parts = (
        torch.zeros(programs * contrast_gluon.GROUPS, size, device=image.device) for size in (M, N)
    )
    _sums_specialised_kernel[(programs,)](
        *contrast_gluon.operands(image, text, tile),
        logit_scale,
        shift,
        row_parts,
        column_parts,
        place.offset,
        M,
        N,
        D,
        **contrast_gluon.constants(tile),
    )
    row, column = (torch.zeros(2, size, device=image.device) for size in (M, N))
    torch.sum(row_parts, 0, out=row[0])
    torch.sum(column_parts, 0, out=column[0])
    return row, column
