"""Box losses in one launch each way.

Forward is one program, so that both sums and the number of boxes are finished where they are formed: a batch holds
hundreds of boxes. The arithmetic is not contracted, so that equal boxes cost exactly 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tuning


@triton.jit
def _axis(pred_ptr, target_ptr, e, valid, stride_pe, stride_pc, stride_te, stride_tc, AXIS: tl.constexpr):
    """Centre and size of both boxes on an axis, fp32; of rows that are not valid 0."""
    centre = tl.load(pred_ptr + e * stride_pe + AXIS * stride_pc, mask=valid, other=0.0).to(tl.float32)
    size = tl.load(pred_ptr + e * stride_pe + (AXIS + 2) * stride_pc, mask=valid, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + e * stride_te + AXIS * stride_tc, mask=valid, other=0.0).to(tl.float32)
    target_size = tl.load(target_ptr + e * stride_te + (AXIS + 2) * stride_tc, mask=valid, other=0.0).to(tl.float32)
    return centre, size, target, target_size


@triton.jit
def _interval(centre, size):
    half = tl.maximum(size, 0.0) * 0.5
    return centre - half, centre + half


@triton.jit
def _extent(centre, size, target, target_size):
    """Length of both intervals, of their overlap (negative: of the gap), and of the hull."""
    low, high = _interval(centre, size)
    target_low, target_high = _interval(target, target_size)
    overlap = tl.minimum(high, target_high) - tl.maximum(low, target_low)
    hull = tl.maximum(high, target_high) - tl.minimum(low, target_low)
    return high - low, target_high - target_low, overlap, hull


@triton.jit
def _quotient(part, area, min_area):
    return tl.where(area > min_area, tl.div_rn(part, tl.where(area > min_area, area, 1.0)), 0.0)


@triton.jit
def _ahead(a, b):
    """1 where a > b, 1/2 where they are equal, else 0: the derivative of max(a, b) in a."""
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def _boxes_kernel(
    pred_ptr,
    target_ptr,
    valid_ptr,
    l1_ptr,
    giou_ptr,
    share_ptr,
    E,
    stride_pe,
    stride_pc,
    stride_te,
    stride_tc,
    stride_ve,
    min_area,
    MEAN: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    l1 = tl.zeros((BLOCK_E,), tl.float32)
    giou = tl.zeros((BLOCK_E,), tl.float32)
    count = tl.zeros((BLOCK_E,), tl.float32)
    for start in range(0, E, BLOCK_E):
        e = (start + tl.arange(0, BLOCK_E)).to(tl.int64)
        valid = tl.load(valid_ptr + e * stride_ve, mask=e < E, other=0) != 0
        x, w, tx, tw = _axis(pred_ptr, target_ptr, e, valid, stride_pe, stride_pc, stride_te, stride_tc, 0)
        y, h, ty, th = _axis(pred_ptr, target_ptr, e, valid, stride_pe, stride_pc, stride_te, stride_tc, 1)
        l1 += tl.abs(x - tx) + tl.abs(y - ty) + tl.abs(w - tw) + tl.abs(h - th)
        width, target_width, overlap_x, hull_x = _extent(x, w, tx, tw)
        height, target_height, overlap_y, hull_y = _extent(y, h, ty, th)
        I = tl.maximum(overlap_x, 0.0) * tl.maximum(overlap_y, 0.0)
        U = width * height + target_width * target_height - I
        C = hull_x * hull_y
        # 1 - GIoU
        giou += _quotient(U - I, U, min_area) + _quotient(C - U, C, min_area)
        count += tl.where(valid, 1.0, 0.0)
    share = 1.0
    if MEAN:
        share = tl.div_rn(1.0, tl.maximum(tl.sum(count, 0), 1.0))
    tl.store(l1_ptr, tl.sum(l1, 0) * share)
    tl.store(giou_ptr, tl.sum(giou, 0) * share)
    tl.store(share_ptr, share)


@triton.jit
def _axis_gradient(centre, size, target, target_size, dside, dcommon, daround):
    """Gradients of centre and size of one axis; those of its length, of the overlap and of the hull are given."""
    low, high = _interval(centre, size)
    target_low, target_high = _interval(target, target_size)
    dcommon = tl.where(tl.minimum(high, target_high) >= tl.maximum(low, target_low), dcommon, 0.0)
    after, before = _ahead(high, target_high), _ahead(low, target_low)
    dhigh = dside + dcommon * (1.0 - after) + daround * after
    dlow = -dside - dcommon * before - daround * (1.0 - before)
    return dhigh + dlow, tl.where(size < 0, 0.0, (dhigh - dlow) * 0.5)


@triton.jit
def _boxes_backward_kernel(
    dl1_ptr,
    dgiou_ptr,
    share_ptr,
    pred_ptr,
    target_ptr,
    valid_ptr,
    dpred_ptr,
    E,
    stride_pe,
    stride_pc,
    stride_te,
    stride_tc,
    stride_ve,
    min_area,
    BLOCK_E: tl.constexpr,
):
    e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    valid = tl.load(valid_ptr + e * stride_ve, mask=e < E, other=0) != 0
    x, w, tx, tw = _axis(pred_ptr, target_ptr, e, valid, stride_pe, stride_pc, stride_te, stride_tc, 0)
    y, h, ty, th = _axis(pred_ptr, target_ptr, e, valid, stride_pe, stride_pc, stride_te, stride_tc, 1)
    width, target_width, overlap_x, hull_x = _extent(x, w, tx, tw)
    height, target_height, overlap_y, hull_y = _extent(y, h, ty, th)
    overlap_x, overlap_y = tl.maximum(overlap_x, 0.0), tl.maximum(overlap_y, 0.0)
    I = overlap_x * overlap_y
    U = width * height + target_width * target_height - I
    C = hull_x * hull_y
    # g = 2 - I / U - U / C with U = A + B - I
    dA = _quotient(_quotient(I, U, min_area), U, min_area) - _quotient(1.0, C, min_area)
    dI = -_quotient(1.0, U, min_area) - dA
    dC = _quotient(_quotient(U, C, min_area), C, min_area)
    dx, dw = _axis_gradient(x, w, tx, tw, dA * height, dI * overlap_y, dC * hull_y)
    dy, dh = _axis_gradient(y, h, ty, th, dA * width, dI * overlap_x, dC * hull_x)
    share = tl.load(share_ptr)
    l1, giou = tl.load(dl1_ptr) * share, tl.load(dgiou_ptr) * share
    dpred_ptr += e * 4
    dtype = dpred_ptr.dtype.element_ty
    inside = e < E
    tl.store(dpred_ptr, tl.where(valid, dx * giou + _sign(x - tx) * l1, 0.0).to(dtype), mask=inside)
    tl.store(dpred_ptr + 1, tl.where(valid, dy * giou + _sign(y - ty) * l1, 0.0).to(dtype), mask=inside)
    tl.store(dpred_ptr + 2, tl.where(valid, dw * giou + _sign(w - tw) * l1, 0.0).to(dtype), mask=inside)
    tl.store(dpred_ptr + 3, tl.where(valid, dh * giou + _sign(h - th) * l1, 0.0).to(dtype), mask=inside)


def loss(pred: Tensor, target: Tensor, valid: Tensor, mean: bool, min_area: float) -> tuple[Tensor, Tensor, Tensor]:
    """Both losses, and the share of a valid box in them."""
    # one byte per flag, whatever the pointer type of a bool is
    valid = valid.view(torch.uint8)
    out = tuple(pred.new_empty((), dtype=torch.float32) for _ in range(3))
    with torch.cuda.device_of(pred):
        _boxes_kernel[(1,)](
            pred, target, valid, *out, len(pred), *pred.stride(), *target.stride(), *valid.stride(), min_area,
            MEAN=mean, BLOCK_E=tuning.BOXES, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def loss_backward(
    dl1: Tensor, dgiou: Tensor, share: Tensor, pred: Tensor, target: Tensor, valid: Tensor, min_area: float
) -> Tensor:
    """Gradient of `pred`."""
    E = len(pred)
    dpred = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    if E == 0:
        return dpred
    valid = valid.view(torch.uint8)
    with torch.cuda.device_of(pred):
        _boxes_backward_kernel[(triton.cdiv(E, tuning.BOXES),)](
            dl1, dgiou, share, pred, target, valid, dpred, E,
            *pred.stride(), *target.stride(), *valid.stride(), min_area,
            BLOCK_E=tuning.BOXES, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return dpred
