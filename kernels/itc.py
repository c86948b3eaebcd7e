"""Symmetric contrastive loss over all pairs of a process group.

    l_ij = s <I_i, T_j>
    loss = W / B sum_i [(lse_j l_ij - sum_j q_ij l_ij) + (lse_j l_ji - sum_j q_ji l_ji)] / 2

Forward forms the logits once, in blocks, and keeps row and column statistics; backward forms them again, and two
products more. Nothing quadratic is stored. Derivation: `kernels/README.md`.
"""

import math
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kernels import dispatch, groups, itc_ops, itc_ring, itc_small, reference, tuning

_NAME = "fused_itc_loss"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCHEDULES = ("gather", "ring")
LN2 = math.log(2.0)
# No sum exceeds 2^EXPONENT_MAX; one below 2^(EXPONENT_MIN + ceil(log2 B)) may have lost terms.
EXPONENT_MAX = 125
EXPONENT_MIN = -102
BOUND_SLACK = 1.0 + 2.0**-16


def fused_itc_loss(
    image: Tensor,
    text: Tensor | groups.GatheredTexts,
    logit_scale: Tensor | float,
    *,
    group: object = None,
    ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    schedule: str = "gather",
    impl: str = "auto",
    scratch_bytes: int | None = None,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """Symmetric softmax contrastive loss (CLIP; Radford et al. 2021, figure 3) without the matrix of logits.

    Args:
        image: (b, D), floating, used as it is: normalising is the caller's.
        text: (b, D), floating; or a handle from `gather_texts`, which then carries `group` and `ids`.
        logit_scale: positive, already exponentiated; a tensor of one element, or a float.
        group: process group whose ranks hold shares of the batch; None for this process alone.
        ids: (b,) int64; samples with equal id, anywhere in the group, are positives of each other.
        label_smoothing: in [0, 1), as in `torch.nn.functional.cross_entropy`, in both directions.
        schedule: "gather" holds all texts of the group, "ring" those of one rank at a time.
        impl: "auto", or one of `implementations("fused_itc_loss")`.
        scratch_bytes: bytes for the blocks of logits; by default what is fastest.
        counts: b of every rank of the group where the caller knows them; otherwise they are exchanged, which on a GPU
            makes the host wait. A handle from `gather_texts` carries its own.

    Returns:
        () fp32: W / B times the sum over this rank's pairs. The mean over the ranks is the loss of the whole batch, and
        the mean over the ranks of the gradients its gradient. Differentiable once.

    Raises:
        ValueError: a shape, value, device, group or implementation does not fit.
        TypeError: a dtype or the type of a scalar does not fit.
    """
    handle = text if isinstance(text, groups.GatheredTexts) else None
    if handle is not None:
        text, ids, group = _opened(handle, ids, group)
    logit_scale = _check(image, text, logit_scale, ids, label_smoothing, schedule, scratch_bytes)
    alone = handle is not None or group is None
    dispatch.require(not (alone and counts is not None), _NAME, "counts belong to a group without a handle", counts)
    layout = handle.layout if handle else groups.exchange_layout(_NAME, image.shape[0], image.device, group, counts)
    dispatch.require(layout.total >= 1, _NAME, "the batch must hold at least one pair", layout.total)
    product = groups.product_dtype(image)
    # The plain form rounds 16-bit logits.
    size = layout.pairs if product == torch.float32 else sys.maxsize
    chosen = dispatch.select(_NAME, impl, image.device, size=size)
    if torch.float64 in (image.dtype, text.dtype):
        dispatch.require(impl in ("auto", "reference"), _NAME, f"{impl} takes no float64", image.dtype, TypeError)
        chosen = "reference"
    if chosen == "reference":
        return _plain(image, text, logit_scale, ids, label_smoothing, layout, group)
    dispatch.require(not (handle and schedule == "ring"), _NAME, "a ring does not take gathered texts", schedule)
    gathered = handle.wait() if handle else None
    plain = layout.world_size == 1 and ids is None and label_smoothing == 0 and scratch_bytes is None
    if chosen == "cpu" and plain and layout.pairs <= tuning.WHOLE_MATRIX_PAIRS:
        return itc_small.loss(image, text, logit_scale, product)
    ring = schedule == "ring" and layout.world_size > 1
    settings = product, scratch_bytes or 0, chosen
    return _fused(image, text, logit_scale, ids, label_smoothing, layout, group, ring, gathered, settings)


def _plain(
    image: Tensor, text: Tensor, logit_scale: Tensor, ids: Tensor | None, smoothing: float, layout, group
) -> Tensor:
    """The specification, on gathered images and texts."""
    if layout.world_size > 1:
        image = groups.GatherRows.apply(image, layout, group)
        text = groups.GatherRows.apply(text, layout, group)
        ids = None if ids is None else groups.all_gather(ids, layout, group)
    return reference.itc_loss(
        image,
        text,
        logit_scale,
        ids=ids,
        label_smoothing=smoothing,
        rows=layout.rows,
        world_size=layout.world_size,
    )


def _fused(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    ids: Tensor | None,
    smoothing: float,
    layout: groups.Layout,
    group: object,
    ring: bool,
    gathered: tuple[Tensor, Tensor | None] | None,
    settings: tuple[torch.dtype, int, str],
) -> Tensor:
    """One rank's rows against all texts."""
    alone = layout.world_size == 1
    group_name = "" if alone else group.group_name
    with torch.no_grad():
        here = image.detach(), text.detach(), logit_scale.detach()
        if gathered is None:
            all_ids = ids if ids is None or alone else groups.all_gather(ids, layout, group)
            all_text = here[1] if alone else groups.under_autocast(here[1])
            gathered = all_text if alone or ring else groups.all_gather(all_text, layout, group), all_ids
        all_text, all_ids = gathered
        targets = ids, all_ids, *_weights(ids, all_ids, smoothing, layout, image.device)
        place = (layout, group_name) if ring else (layout.offset,)
        value, stats = _forward(*here, all_text, targets, layout, group, place, settings)
    distribution = list(layout.counts), layout.rank, group_name, ring
    return itc_ops.attach(value, image, text, logit_scale, all_text, *stats, *targets, *distribution, *settings)


def _forward(
    image: Tensor, text: Tensor, logit_scale: Tensor, all_text: Tensor, targets, layout, group, place, settings
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and the statistics that backward needs: row and column (shift, 1/Z), diagonal of G, safety."""
    product, _, impl = settings
    weight, smoothing = targets[2:]
    sweeps = itc_ops if len(place) == 1 else itc_ring
    B, rows, alone = layout.total, layout.rows, layout.world_size == 1
    L, norms = itc_ops.prologue(image, text, logit_scale, product, impl)
    if not alone:
        norms = groups.all_reduce(norms, "max", group)
    spread = math.ceil(math.log2(B))
    # No sum exceeds 2^125: L_ij <= s log2(e) max|I| max|T|
    bound = logit_scale.reshape(()).float() / LN2 * norms[0] * norms[1] * BOUND_SLACK
    shift = (bound - (EXPONENT_MAX - spread)).clamp_min(0.0)
    row, column = sweeps.sums(image, all_text, logit_scale, shift, *targets, *place, *settings)
    smallest = 2.0 ** (EXPONENT_MIN + spread)
    safe = (row[0] >= smallest).all()
    all_L = L
    if not alone:
        column, all_L, safe = _share_sums(column, weight is not None, L, safe, rows, group)
    safe = safe & (column[0] >= smallest).all() & bound.isfinite()

    high_row, high_column = sweeps.online(image, all_text, logit_scale, safe, *place, *settings)
    if not alone and not _known_safe(safe):
        high_column = _share_maxima(high_column, group)
    row_m, row_O = torch.where(safe, shift, high_row[0]), torch.where(safe, row[0], high_row[1])
    column_m, column_O = torch.where(safe, shift, high_column[0]), torch.where(safe, column[0], high_column[1])

    # x = ln O - l_ii; lse - l_ii = softplus(x)
    row_x = LN2 * (row_O.log2() + (row_m - L))
    column_x = LN2 * (column_O[rows].log2() + (column_m[rows] - L))
    terms = torch.nn.functional.softplus(row_x) + torch.nn.functional.softplus(column_x)
    coefficient = -(row_x.sigmoid() + column_x.sigmoid())
    if weight is not None:
        # l_ii - sum_j q_ij l_ij
        rest = 1.0 - (weight + smoothing)
        terms = terms + LN2 * (2 * rest * L - row[1] - column[1, rows])
        coefficient = coefficient + 2 * rest
    value = terms.sum() * (layout.world_size / (2 * B))
    return value, (_inverse(row_m, row_O, L, safe), _inverse(column_m, column_O, all_L, safe), coefficient, safe)


def _inverse(m: Tensor, O: Tensor, L: Tensor, safe: Tensor) -> Tensor:
    """Shift r and 1/Z with Z = sum_j 2^(L_ij - r), the diagonal included, (2, N)."""
    r = torch.where(safe, m, torch.maximum(m, L))
    Z = torch.where(O > 0, O * torch.exp2(m - r), 0.0) + torch.exp2(L - r)
    return torch.stack((r, 1.0 / Z))


def _share_sums(
    column: Tensor, weighted: bool, L: Tensor, safe: Tensor, rows: slice, group
) -> tuple[Tensor, Tensor, Tensor]:
    """Column sums, diagonal and safety of the whole group, in one sum."""
    n = column.shape[1]
    diagonal = column.new_zeros(n)
    diagonal[rows] = L
    parts = column if weighted else column[:1]
    packed = torch.cat((diagonal, (~safe).to(torch.float32).reshape(1), parts.reshape(-1)))
    packed = groups.all_reduce(packed, "sum", group)
    return packed[n + 1 :].view(-1, n), packed[:n], packed[n] == 0


def _share_maxima(column: Tensor, group) -> Tensor:
    """Maxima of the columns over the group, and sums relative to them."""
    m = groups.all_reduce(column[0], "max", group)
    O = torch.where(column[1] > 0, column[1] * torch.exp2(column[0] - m), 0.0)
    return torch.stack((m, groups.all_reduce(O, "sum", group)))


def _known_safe(safe: Tensor) -> bool:
    """Whether the host can see, without a synchronisation, that the online statistics are not needed."""
    return safe.device.type == "cpu" and not torch.compiler.is_compiling() and bool(safe)


def _weights(ids, all_ids, smoothing: float, layout, device) -> tuple[Tensor | None, float]:
    """(1 - eps) / n_i of this rank's rows, None where every target is one-hot; and eps / B."""
    if ids is None and smoothing == 0.0:
        return None, 0.0
    weight = torch.full((layout.counts[layout.rank],), 1.0 - smoothing, device=device)
    if ids is not None:
        ordered = all_ids.sort().values
        count = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
        weight = weight / count
    return weight, smoothing / layout.total


def _opened(handle: groups.GatheredTexts, ids, group) -> tuple[Tensor, Tensor | None, object]:
    dispatch.require(
        ids is None or ids is handle.ids, _NAME, "ids belong to gather_texts where text is a handle", "both"
    )
    dispatch.require(group is None or group is handle.group, _NAME, "group must be the handle's, or None", group)
    return handle.text, handle.ids, handle.group


def _check(image, text, logit_scale, ids, smoothing, schedule, scratch_bytes) -> Tensor:
    """Raise unless the arguments fit the contract; the scale as a tensor."""
    require = dispatch.require
    require(isinstance(image, Tensor), _NAME, "image must be a tensor", type(image).__name__, TypeError)
    require(image.ndim == 2 and image.shape[1] >= 1, _NAME, "image must be (b, D) with D >= 1", tuple(image.shape))
    groups.check_texts(_NAME, text, ids)
    require(image.shape == text.shape, _NAME, "image and text must have one shape", (*image.shape, *text.shape))
    allowed = (*_DTYPES, torch.float64)
    require(image.dtype in allowed, _NAME, "image must be fp64, fp32, bf16 or fp16", image.dtype, TypeError)
    same = image.dtype == text.dtype or groups.product_dtype(image) == groups.product_dtype(text)
    require(same, _NAME, "image and text must have one dtype", (image.dtype, text.dtype), TypeError)
    if not isinstance(logit_scale, Tensor):
        number = isinstance(logit_scale, (int, float)) and not isinstance(logit_scale, bool)
        require(number, _NAME, "logit_scale must be a float or a tensor", type(logit_scale).__name__, TypeError)
        require(0.0 < logit_scale < math.inf, _NAME, "logit_scale must be positive and finite", logit_scale)
        logit_scale = torch.full((), float(logit_scale), device=image.device)
    require(logit_scale.numel() == 1, _NAME, "logit_scale must have one element", tuple(logit_scale.shape))
    require(logit_scale.is_floating_point(), _NAME, "logit_scale must be floating", logit_scale.dtype, TypeError)
    dispatch.require_same_device(_NAME, (image, text, ids, logit_scale))
    number = isinstance(smoothing, (int, float)) and not isinstance(smoothing, bool)
    require(number, _NAME, "label_smoothing must be a float", type(smoothing).__name__, TypeError)
    require(0.0 <= smoothing < 1.0, _NAME, "label_smoothing must be in [0, 1)", smoothing)
    require(schedule in SCHEDULES, _NAME, f"schedule must be one of {', '.join(SCHEDULES)}", repr(schedule))
    if scratch_bytes is not None:
        require(isinstance(scratch_bytes, int), _NAME, "scratch_bytes must be an int", repr(scratch_bytes), TypeError)
        require(scratch_bytes >= 1, _NAME, "scratch_bytes must be positive", scratch_bytes)
    if dispatch.checks_enabled():
        for name, value in _values(image, text, logit_scale):
            require(bool(value.isfinite().all()), _NAME, f"{name} must be finite", "inf or nan")
        require(bool((logit_scale > 0).all()), _NAME, "logit_scale must be positive", logit_scale.tolist())
    return logit_scale


def _values(image: Tensor, text: Tensor, logit_scale: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield from (("image", image), ("text", text), ("logit_scale", logit_scale))
