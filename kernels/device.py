"""Device functions that more than one Triton kernel uses."""

import triton
import triton.language as tl


@triton.jit
def product_tile(
    a,
    b,
    m,
    n,
    M,
    N,
    D,
    stride_am,
    stride_ad,
    stride_bn,
    stride_bd,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    """A B^T for rows from m and columns from n on, fp32; a and b are pointers, or descriptors where TMA."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if TMA:
        for d in range(0, D, BLOCK_D):
            x = a.load([m, d])
            y = b.load([n, d])
            acc = tl.dot(x, y.T, acc, input_precision="ieee")
    else:
        rows = m + tl.arange(0, BLOCK_M)
        columns = n + tl.arange(0, BLOCK_N)
        depth = tl.arange(0, BLOCK_D)
        a_row = a + rows.to(tl.int64)[:, None] * stride_am
        b_row = b + columns.to(tl.int64)[None, :] * stride_bn
        for d in range(0, D, BLOCK_D):
            inner = d + depth
            x = tl.load(a_row + inner[None, :] * stride_ad, mask=(rows < M)[:, None] & (inner < D)[None, :], other=0.0)
            y = tl.load(
                b_row + inner[:, None] * stride_bd, mask=(columns < N)[None, :] & (inner < D)[:, None], other=0.0
            )
            acc = tl.dot(x, y, acc, input_precision="ieee")
    return acc


@triton.jit
def grouped_tile(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile, in an order whose operands stay in L2: GROUP_M tiles down, then across."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    inside = tile - group * (GROUP_M * tiles_n)
    return (group * GROUP_M + inside % height) * BLOCK_M, (inside // height) * BLOCK_N


@triton.jit
def touches_edge(m, n, M, N, offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether a tile reaches past the matrix, or meets the diagonal (i, i + offset)."""
    past = (m + BLOCK_M > M) | (n + BLOCK_N > N)
    return past | ((n < m + offset + BLOCK_M) & (m + offset < n + BLOCK_N))


@triton.jit
def add_to_partial(ptr, index, value, size):
    """Add to a partial sum that only this program holds; threads see what others of the program stored."""
    tl.debug_barrier()
    inside = index < size
    tl.store(ptr + index, tl.load(ptr + index, mask=inside, other=0.0) + value, mask=inside)
