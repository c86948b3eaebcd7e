"""Statistics of the contrastive loss on sm_90, with specialised warps.

One warp moves tiles of both operands into shared memory by TMA; two groups of four warps multiply, each a row tile of
its own, in turn: while one forms exponentials and sums, the tensor cores work for the other. Each group adds to partial
sums that it alone holds. Limits: 16-bit features that TMA can describe; one-hot targets without smoothing.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels import contrast_tiles, itc_triton, tuning
from kernels.itc_triton import grads, online, prologue

__all__ = ["grads", "online", "prologue", "sums"]

# The name of the barrier of a group of warps differs between Triton's versions.
group_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
GROUPS = 2
GROUP_WARPS = 4
PRODUCER_REGISTERS, GROUP_REGISTERS = 24, 240


@gluon.jit
def _tile(turn, tiles_m, tiles_n, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr):
    """First row and column of this program's tile of a turn, in an order whose operands stay in L2."""
    tile = gl.program_id(0) + turn * gl.num_programs(0)
    group = tile // (GROUP_M * tiles_n)
    height = gl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    inside = tile - group * (GROUP_M * tiles_n)
    return (group * GROUP_M + inside % height) * BLOCK_M, (inside // height) * BLOCK_N


@gluon.jit
def _turns(tiles_m, tiles_n):
    """How many tiles this program works on."""
    return (tiles_m * tiles_n - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def _move(
    image,
    text,
    buffers,
    sizes,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    GROUP_M: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    image_buffers, text_buffers, ready, empty = buffers
    M, N, D = sizes
    tiles_m, tiles_n = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N)
    step = 0
    for turn in range(_turns(tiles_m, tiles_n)):
        m, n = _tile(turn, tiles_m, tiles_n, BLOCK_M, BLOCK_N, GROUP_M)
        for d in range(0, D, BLOCK_D):
            buffer = step % BUFFERS
            mbarrier.wait(empty.index(buffer), (step // BUFFERS & 1) ^ 1)
            mbarrier.expect(ready.index(buffer), (BLOCK_M + BLOCK_N) * BLOCK_D * 2)
            tma.async_copy_global_to_shared(image, [m, d], ready.index(buffer), image_buffers.index(buffer))
            tma.async_copy_global_to_shared(text, [n, d], ready.index(buffer), text_buffers.index(buffer))
            step += 1


@gluon.jit
def _add(ptr, index, value, size):
    group_barrier()
    inside = index < size
    gl.store(ptr + index, gl.load(ptr + index, mask=inside, other=0.0) + value, mask=inside)


@gluon.jit
def _multiply(
    buffers,
    sums,
    sizes,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    GROUP_M: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    image_buffers, text_buffers, ready, empty = buffers
    entry, row_ptr, column_ptr, scale_ptr, shift_ptr, offset = sums
    M, N, D = sizes
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    rows_layout: gl.constexpr = gl.SliceLayout(1, layout)
    columns_layout: gl.constexpr = gl.SliceLayout(0, layout)
    factor = gl.load(scale_ptr).to(gl.float32) * 1.4426950408889634
    r = gl.load(shift_ptr)
    part = (gl.program_id(0) * 2 + GROUP).to(gl.int64)
    row_ptr += part * M
    column_ptr += part * N
    tiles_m, tiles_n = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N)
    depth = gl.cdiv(D, BLOCK_D)
    # The groups take turns: a group multiplies its tile only when the other one has multiplied the tile before.
    for turn in range(GROUP, _turns(tiles_m, tiles_n), 2):
        m, n = _tile(turn, tiles_m, tiles_n, BLOCK_M, BLOCK_N, GROUP_M)
        acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
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
        rows = m + gl.arange(0, BLOCK_M, layout=rows_layout)
        columns = n + gl.arange(0, BLOCK_N, layout=columns_layout)
        E = gl.exp2(acc * factor - r)
        past = (m + BLOCK_M > M) | (n + BLOCK_N > N)
        if past | ((n < m + offset + BLOCK_M) & (m + offset < n + BLOCK_N)):
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
    buffers = (image_buffers, text_buffers, ready, empty)
    sums = (entry, row_ptr, column_ptr, scale_ptr, shift_ptr, offset)
    sizes = (M, N, D)
    gl.warp_specialize(
        [
            (_multiply, (buffers, sums, sizes, 0, BLOCK_M, BLOCK_N, BLOCK_D, GROUP_M, BUFFERS)),
            (_multiply, (buffers, sums, sizes, 1, BLOCK_M, BLOCK_N, BLOCK_D, GROUP_M, BUFFERS)),
            (_move, (image, text, buffers, sizes, BLOCK_M, BLOCK_N, BLOCK_D, GROUP_M, BUFFERS)),
        ],
        [4, 1],
        [CONSUMER, PRODUCER],
    )


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
    """Off-diagonal sums under a common shift, rows (2, b) and columns (2, n); the second rows are zero."""
    image, text = image.to(product), text.to(product)
    fits = product.itemsize == 2 and all(contrast_tiles.describable(x) for x in (image, text))
    if weight is not None or not fits:
        targets = ids, text_ids, weight, smoothing
        return itc_triton.sums(image, text, logit_scale, shift, *targets, offset, product, scratch_bytes)
    (M, D), N = image.shape, text.shape[0]
    tile = tuning.GLUON_SUMS
    tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n)
    programs = min(contrast_tiles.processors(image), tiles)
    row_parts, column_parts = (torch.zeros(programs * GROUPS, size, device=image.device) for size in (M, N))
    dtype = gl.bfloat16 if product == torch.bfloat16 else gl.float16
    operands = (
        TensorDescriptor.from_tensor(x, shape, gl.NVMMASharedLayout.get_default_for(shape, dtype))
        for x, shape in ((image, [tile.block_m, tile.block_d]), (text, [tile.block_n, tile.block_d]))
    )
    _sums_specialised_kernel[(programs,)](
        *operands,
        logit_scale,
        shift,
        row_parts,
        column_parts,
        offset,
        M,
        N,
        D,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=tile.block_d,
        GROUP_M=tile.group_m,
        BUFFERS=tile.stages,
        PRODUCER=PRODUCER_REGISTERS,
        CONSUMER=GROUP_REGISTERS,
        num_warps=GROUP_WARPS,
    )
    row, column = (torch.zeros(2, size, device=image.device) for size in (M, N))
    torch.sum(row_parts, 0, out=row[0])
    torch.sum(column_parts, 0, out=column[0])
    return row, column
