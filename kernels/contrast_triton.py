"""What the contrastive operators share in Triton: exact diagonal and norms before, diagonal and scale after.

L_ii = s log2(e) <I_i, T_i>
dI = f s (A / magnify + g I'),  df = f <A / magnify + g I', I>     A accumulated, g the diagonal of G
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
# Probabilities of order 1/B would be subnormal in fp16; |G| <= 2 stays finite.
FP16_FACTOR = 2.0**13
BLOCK_ROWS, BLOCK_WIDTH = 16, 128


@triton.jit
def _prologue_kernel(
    image_ptr,
    text_ptr,
    scale_ptr,
    diagonal_ptr,
    squares_ptr,
    M,
    D,
    stride_im,
    stride_id,
    stride_tm,
    stride_td,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = rows.to(tl.int64)[:, None]
    dot = tl.zeros((BLOCK_M,), dtype=tl.float32)
    image_square = tl.zeros((BLOCK_M,), dtype=tl.float32)
    text_square = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        mask = (rows < M)[:, None] & (d < D)
        x = tl.load(image_ptr + r * stride_im + d * stride_id, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(text_ptr + r * stride_tm + d * stride_td, mask=mask, other=0.0).to(tl.float32)
        dot += tl.sum(x * y, 1)
        image_square += tl.sum(x * x, 1)
        text_square += tl.sum(y * y, 1)
    tl.store(diagonal_ptr + rows, dot * tl.load(scale_ptr).to(tl.float32) * LOG2E, mask=rows < M)
    tl.store(squares_ptr + rows, image_square, mask=rows < M)
    tl.store(squares_ptr + M + rows, text_square, mask=rows < M)


@triton.jit
def _epilogue_kernel(
    gradient_ptr,
    features_ptr,
    partner_ptr,
    coefficient_ptr,
    scale_ptr,
    factor_ptr,
    dscale_ptr,
    magnify,
    to_partner,
    to_coefficient,
    rows_total,
    partner_rows,
    coefficients,
    D,
    stride_fn,
    stride_fd,
    stride_pn,
    stride_pd,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = rows.to(tl.int64)[:, None]
    partner = r + to_partner
    c = rows + to_coefficient
    paired = (rows < rows_total) & (c >= 0) & (c < coefficients)
    g = tl.load(coefficient_ptr + c, mask=paired, other=0.0)
    factor = tl.load(factor_ptr).to(tl.float32)
    scale = tl.load(scale_ptr).to(tl.float32)
    dot = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        mask = (rows < rows_total)[:, None] & (d < D)
        y = tl.load(partner_ptr + partner * stride_pn + d * stride_pd, mask=mask & paired[:, None], other=0.0)
        x = tl.load(features_ptr + r * stride_fn + d * stride_fd, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(gradient_ptr + r * D + d, mask=mask, other=0.0) / magnify + g[:, None] * y.to(tl.float32)
        # <G, I T^T> = sum_i <(G T)_i, I_i>
        dot += tl.sum(gradient * x, 1)
        tl.store(gradient_ptr + r * D + d, gradient * (scale * factor), mask=mask)
    tl.store(dscale_ptr + rows, dot * factor, mask=rows < rows_total)


def prologue(image: Tensor, text: Tensor, logit_scale: Tensor, product: torch.dtype) -> tuple[Tensor, Tensor]:
    """Diagonal logits (b,) in units of ln 2, and the largest norms (2,) of image and text."""
    image, text = image.to(product), text.to(product)
    M, D = image.shape
    diagonal = torch.empty(M, device=image.device)
    squares = torch.zeros(2, M, device=image.device)
    if M:
        _prologue_kernel[(triton.cdiv(M, BLOCK_ROWS),)](
            image, text, logit_scale, diagonal, squares, M, D, *image.stride(), *text.stride(), BLOCK_ROWS, BLOCK_WIDTH
        )
    # A column of zeros gives a rank without rows a norm.
    return diagonal, torch.nn.functional.pad(squares, (0, 1)).amax(1).sqrt()


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b, accumulated in fp32."""
    if a.dtype == torch.float32 or not a.is_cuda:
        out.addmm_(a.float(), b.float())
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)


def finish(
    gradient, features, partner, coefficient, logit_scale, factor, magnify, to_partner, to_coefficient
) -> Tensor:
    """Add the diagonal and scale, in place; the rows' shares of the scale's gradient."""
    N, D = gradient.shape
    parts = torch.empty(N, device=gradient.device)
    if N:
        _epilogue_kernel[(triton.cdiv(N, BLOCK_ROWS),)](
            gradient,
            features,
            partner,
            coefficient,
            logit_scale,
            factor,
            parts,
            magnify,
            to_partner,
            to_coefficient,
            N,
            partner.shape[0],
            coefficient.shape[0],
            D,
            *features.stride(),
            *partner.stride(),
            BLOCK_ROWS,
            BLOCK_WIDTH,
        )
    return parts
