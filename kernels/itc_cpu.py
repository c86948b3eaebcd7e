"""Contrastive sums and gradients in cache-sized blocks, with library matrix products.

    L_ij = s log2(e) <I_i, T_j>         logits in units of ln 2
    O_i = sum_{j != i} 2^(L_ij - r_i)   off-diagonal sums, rows and columns from one product
    G_ij = P^r_ij + P^c_ij - 2 q_ij

Products are fp32: those of bf16 and fp16 values are exact there. Memory is two blocks beside the results.
"""

import math

import torch
from torch import Tensor

from kernels.itc_parts import Place, Statistics, Targets, Wanted

LN2 = math.log(2.0)
BLOCK_ROWS = 1024
BLOCK_COLUMNS = 1024


def prologue(image: Tensor, text: Tensor, logit_scale: Tensor, product: torch.dtype) -> tuple[Tensor, Tensor]:
    """Diagonal logits (b,) in units of ln 2, and the largest norms (2,) of image and text."""
    L = image.new_empty(image.shape[0], dtype=torch.float32)
    norms = torch.zeros(2, dtype=torch.float32)
    for rows in _blocks(image.shape[0], BLOCK_ROWS):
        A, T = _load(image[rows], product), _load(text[rows], product)
        torch.linalg.vecdot(A, T, out=L[rows])
        largest = torch.stack((A.square().sum(1).amax(), T.square().sum(1).amax())).sqrt()
        norms = torch.maximum(norms, largest)
    return L.mul_(logit_scale.reshape(()) / LN2), norms


def sums(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    shift: Tensor,
    targets: Targets,
    place: Place,
) -> tuple[Tensor, Tensor]:
    """Off-diagonal sums under a common shift, and sums of q_ij L_ij."""
    row, column = torch.zeros(2, image.shape[0]), torch.zeros(2, text.shape[0])
    factor, r = logit_scale.item() / LN2, shift.item()
    for rows, columns, L in _logits(image, text, factor, place):
        diagonal = _diagonal(L, rows, columns, place.offset)
        if targets.weight is not None:
            diagonal.zero_()
            qL = _targets(targets, rows, columns).mul_(L)
            row[1, rows] += qL.sum(1)
            column[1, columns] += qL.sum(0)
        diagonal.fill_(-math.inf)
        E = (L.sub_(r) if r else L).exp2_()
        row[0, rows] += E.sum(1)
        column[0, columns] += E.sum(0)
    return row, column


def online(image: Tensor, text: Tensor, logit_scale: Tensor, safe: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """Off-diagonal maxima, and sums relative to them."""
    row, column = torch.zeros(2, image.shape[0]), torch.zeros(2, text.shape[0])
    if safe.item():
        return row, column
    row[0], column[0] = -math.inf, -math.inf
    for rows, columns, L in _logits(image, text, logit_scale.item() / LN2, place):
        _diagonal(L, rows, columns, place.offset).fill_(-math.inf)
        for state, dim in ((row[:, rows], 1), (column[:, columns], 0)):
            m = torch.maximum(state[0], L.amax(dim))
            r = torch.where(m == -math.inf, 0.0, m)
            state[1] = state[1] * torch.exp2(state[0] - r) + (L - r.unsqueeze(dim)).exp2_().sum(dim)
            state[0] = m
    return row, column


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
    row, column, coefficient, safe = stats
    (b, D), n = image.shape, text.shape[0]
    dimage = torch.zeros(b, D) if wanted.image else torch.empty(0)
    dtext = torch.zeros(n, D) if wanted.text else torch.empty(0)
    dscale = torch.zeros(()) if wanted.scale else torch.empty(0)
    scale, common = logit_scale.item(), bool(safe.item())
    r = row[0, 0].item() if common and b else 0.0
    for rows, columns, L in _logits(image, text, scale / LN2, place):
        inverse_row, inverse_column = row[1, rows, None], column[1, columns]
        S = L.clone() if wanted.scale and not (wanted.image or wanted.text) else None
        if common:
            # G_ij = E_ij (1/Zr_i + 1/Zc_j)
            G = (L.sub_(r) if r else L).exp2_().mul_(inverse_row + inverse_column)
        else:
            by_column = (L - column[0, columns]).exp2_().mul_(inverse_column)
            G = L.sub_(row[0, rows, None]).exp2_().mul_(inverse_row).add_(by_column)
        if targets.weight is not None:
            G.sub_(_targets(targets, rows, columns), alpha=2)
        first = max(0, columns.start - place.offset - rows.start)
        diagonal = _diagonal(G, rows, columns, place.offset)
        diagonal.copy_(coefficient[rows][first : first + diagonal.shape[0]])
        if wanted.image:
            dimage[rows].addmm_(G, _load(text[columns], place.product))
        if wanted.text:
            dtext[columns].addmm_(G.T, _load(image[rows], place.product))
        if S is not None:
            dscale += (G * S).sum() * (LN2 / scale)
    if wanted.scale and (wanted.image or wanted.text):
        # <G, I T^T> = sum_i <(G T)_i, I_i>
        gradient, features = (dimage, image) if wanted.image else (dtext, text)
        for rows in _blocks(gradient.shape[0], BLOCK_ROWS):
            dscale += torch.linalg.vecdot(gradient[rows], _load(features[rows], place.product)).sum()
    for gradient in (dimage, dtext):
        gradient.mul_(scale * factor)
    return dimage, dtext, dscale * factor if wanted.scale else dscale


def _blocks(size: int, block: int):
    return (slice(start, min(start + block, size)) for start in range(0, size, block))


def _load(x: Tensor, product: torch.dtype) -> Tensor:
    """fp32 values of a block as the product sees them."""
    return x.to(product).to(torch.float32)


def _logits(image: Tensor, text: Tensor, factor: float, place: Place):
    """Blocks (rows, columns, L), row by row; the storage of L is reused."""
    c, w = _block_shape(image.shape[0], text.shape[0], place.scratch_bytes)
    scratch = torch.empty(c * w)
    for rows in _blocks(image.shape[0], c):
        A = _load(image[rows], place.product) * factor
        for columns in _blocks(text.shape[0], w):
            T = _load(text[columns], place.product)
            L = scratch[: A.shape[0] * T.shape[0]].view(A.shape[0], T.shape[0])
            yield rows, columns, torch.mm(A, T.T, out=L)


def _block_shape(b: int, n: int, scratch_bytes: int) -> tuple[int, int]:
    """Rows and columns of a block; two fp32 blocks fit `scratch_bytes` where it is given."""
    c, w = min(b, BLOCK_ROWS), min(n, BLOCK_COLUMNS)
    while scratch_bytes and c * w * 8 > scratch_bytes and max(c, w) > 1:
        c, w = (max(c // 2, 1), w) if c >= w else (c, max(w // 2, 1))
    return max(c, 1), max(w, 1)


def _diagonal(x: Tensor, rows: slice, columns: slice, offset: int) -> Tensor:
    """View of the elements (i, i + offset) that lie in the block."""
    k = rows.start + offset - columns.start
    c, w = x.shape
    if k <= -c or k >= w:
        return x.new_empty(0)
    return x.diagonal(k)


def _targets(targets: Targets, rows: slice, columns: slice) -> Tensor:
    """q_ij off the diagonal, (c, w)."""
    ids, text_ids, weight, smoothing = targets
    if ids is None:
        return weight.new_full((rows.stop - rows.start, columns.stop - columns.start), smoothing)
    same = ids[rows, None] == text_ids[columns]
    return same.to(torch.float32).mul_(weight[rows, None]).add_(smoothing)
