"""Sigmoid loss and its gradients, in Triton and library matrix products.

    G_ij = sigmoid(l_ij), i != j;  g_i = -sigmoid(-l_ii), kept in fp32
    dI = s (G T + g I'),  dT = s (G^T I + g T'),  dt = sum G + sum g

One product forms loss and G together, a block of G at a time through scratch of fixed size.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import contrast_tiles
from kernels.contrast_triton import FP16_FACTOR, accumulate, finish, prologue
from kernels.device import grouped_tile, product_tile, touches_edge


@triton.jit
def _sigmoid_kernel(
    image,
    text,
    scale_ptr,
    bias_ptr,
    sums_ptr,
    G_ptr,
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
    HAS_GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
):
    scale = tl.load(scale_ptr).to(tl.float32)
    bias = tl.load(bias_ptr).to(tl.float32)
    loss = tl.zeros((BLOCK_M,), dtype=tl.float32)
    gradient = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(height, BLOCK_M) * tl.cdiv(width, BLOCK_N), tl.num_programs(0)):
        m, n = grouped_tile(tile, height, width, BLOCK_M, BLOCK_N, GROUP_M)
        i = m + tl.arange(0, BLOCK_M)
        j = n + tl.arange(0, BLOCK_N)
        m += first_row
        n += first_column
        dot = product_tile(
            image, text, m, n, M, N, D, stride_im, stride_id, stride_tn, stride_td, BLOCK_M, BLOCK_N, BLOCK_D, TMA
        )
        l = dot * scale + bias
        # ln(1 + e^l) = max(l, 0) + ln(1 + x), x = e^-|l|, by its series where 1 + x would round x away
        x = tl.exp(-tl.abs(l))
        softplus = tl.maximum(l, 0.0) + tl.where(x < 2.0**-8, x * (1.0 - 0.5 * x), tl.log(1.0 + x))
        G = tl.sigmoid(l)
        inside = (i < height)[:, None] & (j < width)[None, :]
        if touches_edge(m, n, first_row + height, first_column + width, offset, BLOCK_M, BLOCK_N):
            off = inside & ((first_column + j)[None, :] != (first_row + i)[:, None] + offset)
            softplus = tl.where(off, softplus, 0.0)
            G = tl.where(off, G, 0.0)
        loss += tl.sum(softplus, 1)
        gradient += tl.sum(G, 1)
        if HAS_GRADIENT:
            G_ptrs = G_ptr + i.to(tl.int64)[:, None] * stride_gm + j[None, :]
            tl.store(G_ptrs, (G * magnify).to(G_ptr.dtype.element_ty), mask=inside)
    sums_ptr += 2 * tl.program_id(0)
    tl.store(sums_ptr, tl.sum(loss, 0))
    tl.store(sums_ptr + 1, tl.sum(gradient, 0))


def loss_and_grads(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    need_image: bool,
    need_text: bool,
    need_scalars: bool,
    product: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of the pairs' losses, and its gradients in image, text, and (scale, bias), fp32; empty where not needed."""
    image, text = image.to(product), text.to(product)
    (M, D), N = image.shape, text.shape[0]
    form_image = need_image or (need_scalars and not need_text)
    dimage, dtext = (
        torch.zeros(size if wanted else 0, D, device=image.device) for size, wanted in ((M, form_image), (N, need_text))
    )
    magnify = FP16_FACTOR if product == torch.float16 else 1.0
    L, _ = prologue(image, text[offset : offset + M], logit_scale, product)
    diagonal = L * math.log(2.0) + logit_bias.reshape(()).float()
    g = -torch.sigmoid(-diagonal)
    sums = torch.stack((torch.nn.functional.softplus(-diagonal).sum(), g.sum()))
    wanted = form_image or need_text
    for rows, columns, G, parts in blocks(image, text, logit_scale, logit_bias, offset, magnify, wanted):
        sums = sums + parts.sum(0)
        if form_image:
            accumulate(dimage[rows], G, text[columns])
        if need_text:
            accumulate(dtext[columns], G.T, image[rows])
    empty = torch.empty(0, device=image.device)
    one = torch.ones((), device=image.device)
    scalars, dscale = (g, logit_scale, one, magnify), None
    if form_image:
        dscale = finish(dimage, image, text, *scalars, offset, 0).sum()
    if need_text:
        parts = finish(dtext, text, image, *scalars, -offset, -offset).sum()
        dscale = parts if dscale is None else dscale
    dscalars = torch.stack((dscale, sums[1])) if need_scalars else empty
    return sums[0], dimage if need_image else empty, dtext if need_text else empty, dscalars


def blocks(image, text, logit_scale, logit_bias, offset, magnify, wanted):
    """Blocks (rows, columns, G, sums of loss and G per program); the storage of G is reused."""
    M, (N, D) = image.shape[0], text.shape
    tile = contrast_tiles.tile_for("sigmoid", image, text)
    # Without a gradient nothing is stored, and any tensor stands for G.
    whole = [(slice(0, M), slice(0, N), image)] if M else []
    for rows, columns, G in contrast_tiles.blocks(image, text, 0) if wanted else whole:
        height, width = rows.stop - rows.start, columns.stop - columns.start
        programs = contrast_tiles.persistent(tile, height, width, image)
        parts = torch.empty(programs, 2, device=image.device)
        _sigmoid_kernel[(programs,)](
            *contrast_tiles.operands(image, text, tile),
            logit_scale,
            logit_bias,
            parts,
            G,
            magnify,
            offset,
            rows.start,
            columns.start,
            height,
            width,
            M,
            N,
            D,
            *image.stride(),
            *text.stride(),
            G.stride(0),
            HAS_GRADIENT=wanted,
            GROUP_M=tile.group_m,
            **contrast_tiles.constants(tile),
        )
        yield rows, columns, G, parts
