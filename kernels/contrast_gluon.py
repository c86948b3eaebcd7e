"""Tiles of image-text products on sm_90, with specialised warps.

One warp moves tiles of both operands into shared memory by TMA; two groups of four warps multiply, each a tile of its
own, in turn: while one works on its logits, the tensor cores work for the other.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels import contrast_tiles, tuning

# The name of the barrier of a group of warps differs between Triton's versions.
group_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
GROUPS = 2
GROUP_WARPS = 4
PRODUCER_REGISTERS, GROUP_REGISTERS = 24, 240
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def tile_of_turn(turn, tiles_m, tiles_n, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr):
    """First row and column of this program's tile of a turn, in an order whose operands stay in L2."""
    tile = gl.program_id(0) + turn * gl.num_programs(0)
    group = tile // (GROUP_M * tiles_n)
    height = gl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    inside = tile - group * (GROUP_M * tiles_n)
    return (group * GROUP_M + inside % height) * BLOCK_M, (inside // height) * BLOCK_N


@gluon.jit
def turns(tiles_m, tiles_n):
    """How many tiles this program works on."""
    return (tiles_m * tiles_n - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def allocate(image, text, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BUFFERS: gl.constexpr):
    """Buffers of both operands, and the barriers: filled, emptied, and whose turn it is."""
    image_buffers = gl.allocate_shared_memory(image.dtype, [BUFFERS, BLOCK_M, BLOCK_D], image.layout)
    text_buffers = gl.allocate_shared_memory(text.dtype, [BUFFERS, BLOCK_N, BLOCK_D], text.layout)
    ready = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    entry = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(BUFFERS):
        mbarrier.init(ready.index(buffer), count=1)
        mbarrier.init(empty.index(buffer), count=1)
    for group in gl.static_range(2):
        mbarrier.init(entry.index(group), count=1)
    # The first group enters first.
    mbarrier.arrive(entry.index(0), count=1)
    return image_buffers, text_buffers, ready, empty, entry


@gluon.jit
def move(
    image,
    text,
    buffers,
    place,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    GROUP_M: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """The warp that moves: operands of all tiles of a block of logits, turn by turn."""
    image_buffers, text_buffers, ready, empty, _ = buffers
    first_row, first_column, height, width, D = place
    tiles_m, tiles_n = gl.cdiv(height, BLOCK_M), gl.cdiv(width, BLOCK_N)
    step = 0
    for turn in range(turns(tiles_m, tiles_n)):
        m, n = tile_of_turn(turn, tiles_m, tiles_n, BLOCK_M, BLOCK_N, GROUP_M)
        for d in range(0, D, BLOCK_D):
            buffer = step % BUFFERS
            mbarrier.wait(empty.index(buffer), (step // BUFFERS & 1) ^ 1)
            mbarrier.expect(ready.index(buffer), (BLOCK_M + BLOCK_N) * BLOCK_D * 2)
            tma.async_copy_global_to_shared(image, [first_row + m, d], ready.index(buffer), image_buffers.index(buffer))
            tma.async_copy_global_to_shared(
                text, [first_column + n, d], ready.index(buffer), text_buffers.index(buffer)
            )
            step += 1


@gluon.jit
def multiply(buffers, turn, depth, GROUP: gl.constexpr, acc, BUFFERS: gl.constexpr):
    """Product of a turn's tile; then the other group may multiply."""
    image_buffers, text_buffers, ready, empty, entry = buffers
    mbarrier.wait(entry.index(GROUP), turn // 2 & 1)
    for d in range(depth):
        step = turn * depth + d
        buffer = step % BUFFERS
        mbarrier.wait(ready.index(buffer), step // BUFFERS & 1)
        operand = text_buffers.index(buffer).permute((1, 0))
        acc = warpgroup_mma(image_buffers.index(buffer), operand, acc, is_async=True)
        # The product before this one is done, so its buffers are free.
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        mbarrier.arrive(empty.index((step + BUFFERS - 1) % BUFFERS), count=1, pred=d > 0)
    mbarrier.arrive(entry.index(1 - GROUP), count=1)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    mbarrier.arrive(empty.index((turn * depth + depth - 1) % BUFFERS), count=1)
    return acc


@gluon.jit
def touches_edge(m, n, M, N, offset, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Whether a tile reaches past the matrix, or meets the diagonal (i, i + offset)."""
    past = (m + BLOCK_M > M) | (n + BLOCK_N > N)
    return past | ((n < m + offset + BLOCK_M) & (m + offset < n + BLOCK_N))


def supports(image: torch.Tensor, text: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Whether the kernels with specialised warps take these features and targets."""
    fits = image.dtype.itemsize == 2 and all(contrast_tiles.describable(x) for x in (image, text))
    return fits and weight is None


def descriptor(x: torch.Tensor, shape: list[int], swizzle_bytes: int = 128) -> TensorDescriptor:
    """Descriptor of the tiles of a 16-bit matrix, in shared memory as the tensor cores read it."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle_bytes, element_bitwidth=16, rank=2)
    return TensorDescriptor.from_tensor(x, shape, layout)


def operands(image: torch.Tensor, text: torch.Tensor, tile: tuning.ContrastTile) -> tuple[TensorDescriptor, ...]:
    return descriptor(image, [tile.block_m, tile.block_d]), descriptor(text, [tile.block_n, tile.block_d])


def constants(tile: tuning.ContrastTile) -> dict[str, int]:
    """What a kernel is compiled for."""
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": tile.block_d,
        "GROUP_M": tile.group_m,
        "BUFFERS": tile.stages,
        "PRODUCER": PRODUCER_REGISTERS,
        "CONSUMER": GROUP_REGISTERS,
        "num_warps": GROUP_WARPS,
    }
