"""Gradients of the contrastive loss, in Triton and library matrix products.

    G_ij = P^r_ij + P^c_ij - 2 q_ij     a block at a time, in the dtype of the products
    dI = f s (G T + g I'),  dT = f s (G^T I + g T')     g the diagonal of G, kept in fp32

G passes through scratch of fixed size: written once, read by two products with fp32 accumulation.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import contrast_tiles
from kernels.contrast_triton import FP16_FACTOR, LOG2E, accumulate, finish, prologue
from kernels.device import grouped_tile, product_tile, touches_edge
from kernels.itc_parts import Place, Statistics, Targets, Wanted
from kernels.itc_triton_fwd import online, sums, target_tile

__all__ = ["grads", "online", "prologue", "sums"]


@triton.jit
def _gradient_kernel(
    image,
    text,
    scale_ptr,
    row_ptr,
    column_ptr,
    safe_ptr,
    ids_ptr,
    text_ids_ptr,
    weight_ptr,
    G_ptr,
    smoothing,
    magnify,
    offset,
    first_row,
    first_column,
    height,
    width,
    M,
    N,
    D,
    stride_im,
    stride_id,
    stride_tn,
    stride_td,
    stride_gm,
    HAS_TARGETS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
):
    factor = tl.load(scale_ptr).to(tl.float32) * LOG2E
    safe = tl.load(safe_ptr)
    for tile in range(tl.program_id(0), tl.cdiv(height, BLOCK_M) * tl.cdiv(width, BLOCK_N), tl.num_programs(0)):
        m, n = grouped_tile(tile, height, width, BLOCK_M, BLOCK_N, GROUP_M)
        i = m + tl.arange(0, BLOCK_M)
        j = n + tl.arange(0, BLOCK_N)
        m += first_row
        n += first_column
        rows = first_row + i
        columns = first_column + j
        dot = product_tile(
            image, text, m, n, M, N, D, stride_im, stride_id, stride_tn, stride_td, BLOCK_M, BLOCK_N, BLOCK_D, TMA
        )
        L = dot * factor
        row_shift = tl.load(row_ptr + rows, mask=rows < M, other=0.0)
        row_inverse = tl.load(row_ptr + M + rows, mask=rows < M, other=0.0)
        column_inverse = tl.load(column_ptr + N + columns, mask=columns < N, other=0.0)
        E = tl.exp2(L - row_shift[:, None])
        if safe:
            # One shift for all: G_ij = E_ij (1/Zr_i + 1/Zc_j)
            G = E * (row_inverse[:, None] + column_inverse[None, :])
        else:
            column_shift = tl.load(column_ptr + columns, mask=columns < N, other=0.0)
            G = E * row_inverse[:, None] + tl.exp2(L - column_shift[None, :]) * column_inverse[None, :]
        if HAS_TARGETS:
            G -= 2.0 * target_tile(ids_ptr, text_ids_ptr, weight_ptr, rows, columns, M, N, smoothing, HAS_IDS)
        if touches_edge(m, n, M, N, offset, BLOCK_M, BLOCK_N):
            G = tl.where(columns[None, :] != rows[:, None] + offset, G, 0.0)
        mask = (i < height)[:, None] & (j < width)[None, :]
        G_ptrs = G_ptr + i.to(tl.int64)[:, None] * stride_gm + j[None, :]
        tl.store(G_ptrs, (G * magnify).to(G_ptr.dtype.element_ty), mask=mask)


def grads(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    factor: Tensor,
    stats: Statistics,
    targets: Targets,
    wanted: Wanted,
    place: Place,
    blocks: Callable | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`factor` times the gradients; `blocks` forms G in place of this module's kernel."""
    image, text = image.to(place.product), text.to(place.product)
    (M, D), N = image.shape, text.shape[0]
    form_image = wanted.image or not wanted.text
    dimage, dtext = (
        torch.zeros(size if formed else 0, D, device=image.device)
        for size, formed in ((M, form_image), (N, wanted.text))
    )
    magnify = FP16_FACTOR if place.product == torch.float16 else 1.0
    stats = stats._replace(row=stats.row.contiguous(), column=stats.column.contiguous())
    for rows, columns, G in (blocks or _blocks)(image, text, logit_scale, stats, targets, place, magnify):
        if form_image:
            accumulate(dimage[rows], G, text[columns])
        if wanted.text:
            accumulate(dtext[columns], G.T, image[rows])
    scalars = stats.coefficient, logit_scale, factor
    dscale = dimage.new_empty(0)
    if form_image:
        parts = finish(dimage, image, text, *scalars, magnify, place.offset, 0)
        dscale = parts.sum() if wanted.scale else dscale
    if wanted.text:
        parts = finish(dtext, text, image, *scalars, magnify, -place.offset, -place.offset)
        dscale = parts.sum() if wanted.scale and not form_image else dscale
    return dimage if wanted.image else dimage.new_empty(0), dtext if wanted.text else dtext.new_empty(0), dscale


def _blocks(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    stats: Statistics,
    targets: Targets,
    place: Place,
    magnify: float,
):
    """Blocks (rows, columns, G); the storage of G is reused."""
    tile = contrast_tiles.tile_for("gradient" if targets.weight is None else "target gradient", image, text)
    for rows, columns, G in contrast_tiles.blocks(image, text, place.scratch_bytes):
        _gradient_kernel[(contrast_tiles.persistent(tile, *G.shape, image),)](
            *contrast_tiles.operands(image, text, tile),
            logit_scale,
            stats.row,
            stats.column,
            stats.safe,
            *(logit_scale if x is None else x for x in targets[:3]),
            G,
            targets.smoothing,
            magnify,
            place.offset,
            rows.start,
            columns.start,
            *G.shape,
            image.shape[0],
            *text.shape,
            *image.stride(),
            *text.stride(),
            G.stride(0),
            HAS_TARGETS=targets.weight is not None,
            HAS_IDS=targets.ids is not None,
            GROUP_M=tile.group_m,
            **contrast_tiles.constants(tile),
        )
        yield rows, columns, G
