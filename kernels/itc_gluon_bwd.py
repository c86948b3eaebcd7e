"""Gradients of the contrastive loss on sm_90: blocks of G with specialised warps.

    G_ij = 2^(L_ij - r_i) / Z^r_i + 2^(L_ij - r_j) / Z^c_j,  G_ii = 0

While one group of warps forms G from its logits, the tensor cores multiply for the other. A tile of G leaves through
shared memory by TMA, which drops what lies past the block. Limits: those of `itc_gluon`.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from kernels import contrast_gluon, contrast_tiles, itc_triton, tuning
from kernels.contrast_gluon import LOG2E, allocate, move, multiply, tile_of_turn, touches_edge, turns
from kernels.itc_parts import Place, Statistics, Targets, Wanted


@gluon.jit
def _gradient(
    buffers,
    G_desc,
    G_buffers,
    stats,
    place,
    totals,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    GROUP_M: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    first_row, first_column, height, width, D = place
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    tiles_m, tiles_n = gl.cdiv(height, BLOCK_M), gl.cdiv(width, BLOCK_N)
    G_buffer = G_buffers.index(GROUP)
    for turn in range(GROUP, turns(tiles_m, tiles_n), 2):
        m, n = tile_of_turn(turn, tiles_m, tiles_n, BLOCK_M, BLOCK_N, GROUP_M)
        zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
        acc = multiply(buffers, turn, gl.cdiv(D, BLOCK_D), GROUP, zeros, BUFFERS)
        # The tile before has left the buffer.
        tma.store_wait(pendings=0)
        # Products and G of a whole tile do not fit the registers.
        for half in gl.static_range(2):
            for quarter in gl.static_range(2):
                part = _side(_side(acc, half), quarter)
                _store_part(part, G_buffer, stats, totals, first_row + m, first_column + n, 2 * half + quarter)
        fence_async_shared()
        tma.async_copy_shared_to_global(G_desc, [m, n], G_buffer)
    tma.store_wait(pendings=0)


@gluon.jit
def _side(x, right: gl.constexpr):
    """Left or right half of the columns."""
    halves = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)).split()
    return halves[1] if right else halves[0]


@gluon.jit
def _store_part(part, G_buffer, stats, totals, m, n, PART: gl.constexpr):
    """G of one quarter of a tile's columns, to shared memory."""
    BLOCK_M: gl.constexpr = part.shape[0]
    QUARTER: gl.constexpr = part.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUARTER, 16])
    n += PART * QUARTER
    row_ptr, column_ptr, scale_ptr, safe_ptr, magnify, offset = stats
    M, N = totals
    rows = m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    columns = n + gl.arange(0, QUARTER, layout=gl.SliceLayout(0, layout))
    row_inverse = gl.load(row_ptr + M + rows, mask=rows < M, other=0.0) * magnify
    column_inverse = gl.load(column_ptr + N + columns, mask=columns < N, other=0.0) * magnify
    dot = gl.convert_layout(part, layout, assert_trivial=True)
    L = dot * (gl.load(scale_ptr).to(gl.float32) * LOG2E)
    if gl.load(safe_ptr):
        # One shift for all: G_ij = E_ij (1/Zr_i + 1/Zc_j)
        E = gl.exp2(L - gl.load(row_ptr))
        G = E * (gl.expand_dims(row_inverse, 1) + gl.expand_dims(column_inverse, 0))
    else:
        row_shift = gl.load(row_ptr + rows, mask=rows < M, other=0.0)
        column_shift = gl.load(column_ptr + columns, mask=columns < N, other=0.0)
        G = gl.exp2(L - gl.expand_dims(row_shift, 1)) * gl.expand_dims(row_inverse, 1)
        G += gl.exp2(L - gl.expand_dims(column_shift, 0)) * gl.expand_dims(column_inverse, 0)
    if touches_edge(m, n, M, N, offset, BLOCK_M, QUARTER):
        G = gl.where(gl.expand_dims(columns, 0) != gl.expand_dims(rows, 1) + offset, G, 0.0)
    G_buffer.slice(PART * QUARTER, QUARTER, dim=1).store(G.to(G_buffer.dtype))


@gluon.jit
def _gradient_specialised_kernel(
    image,
    text,
    G,
    scale_ptr,
    row_ptr,
    column_ptr,
    safe_ptr,
    magnify,
    offset,
    first_row,
    first_column,
    height,
    width,
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
    G_buffers = gl.allocate_shared_memory(G.dtype, [2, BLOCK_M, BLOCK_N], G.layout)
    stats = (row_ptr, column_ptr, scale_ptr, safe_ptr, magnify, offset)
    place = (first_row, first_column, height, width, D)
    gl.warp_specialize(
        [
            (_gradient, (buffers, G, G_buffers, stats, place, (M, N), 0, BLOCK_M, BLOCK_N, BLOCK_D, GROUP_M, BUFFERS)),
            (_gradient, (buffers, G, G_buffers, stats, place, (M, N), 1, BLOCK_M, BLOCK_N, BLOCK_D, GROUP_M, BUFFERS)),
            (move, (image, text, buffers, place, BLOCK_M, BLOCK_N, BLOCK_D, GROUP_M, BUFFERS)),
        ],
        [4, 1],
        [CONSUMER, PRODUCER],
    )


def grads(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    factor: Tensor,
    stats: Statistics,
    targets: Targets,
    wanted: Wanted,
    place: Place,
) -> tuple[Tensor, Tensor, Tensor]:
    """`factor` times the gradients."""
    fits = contrast_gluon.supports(image.to(place.product), text.to(place.product), targets.weight)
    form = blocks if fits else None
    return itc_triton.grads(image, text, logit_scale, factor, stats, targets, wanted, place, form)


def blocks(image, text, logit_scale, stats, targets, place, magnify):
    """Blocks (rows, columns, G); the storage of G is reused."""
    tile = tuning.GLUON_GRADIENT
    for rows, columns, G in contrast_tiles.blocks(image, text, place.scratch_bytes):
        _gradient_specialised_kernel[(contrast_tiles.persistent(tile, *G.shape, image),)](
            *contrast_gluon.operands(image, text, tile),
            # A quarter of the columns is stored at a time, and a pattern of swizzled bytes cannot be cut.
            contrast_gluon.descriptor(G, [tile.block_m, tile.block_n], tile.block_n // 4 * G.element_size()),
            logit_scale,
            stats.row,
            stats.column,
            stats.safe,
            magnify,
            place.offset,
            rows.start,
            columns.start,
            *G.shape,
            image.shape[0],
            *text.shape,
            **contrast_gluon.constants(tile),
        )
        yield rows, columns, G
