"""In-batch hard negatives, drawn from the contrastive softmax.

    l_ij = s <I_i, T_j>,   w_ij = softmax_j(l_i)_j + floor where j is no positive of i, else 0
    m_i = the first j with w_i1 + ... + w_ij > u_i (w_i1 + ... + w_iB)

and the same over the columns. One number u per row and direction, from a counter: every implementation inverts the
same distribution at the same point, so that all draw alike where u is not within rounding of a border. The matrix is
formed in tiles, of which only sums are kept; a tile is drawn first, then a sample in it. Limits: `triton` takes up to
65536 pairs.
"""

import math

import torch
from torch import Tensor

from kernels import dispatch, hard_negatives_cpu, reference

MAX_PAIRS_TRITON = 65536
_NAME = "sample_hard_negatives"


@torch.library.custom_op("sycoca_kernels::sample_hard_negatives", mutates_args=())
def _sample_op(
    image: Tensor, text: Tensor, logit_scale: Tensor, ids: Tensor | None, floor: float, seed: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    if impl == "triton":
        from kernels import hard_negatives_triton as implementation
    else:
        implementation = hard_negatives_cpu
    with torch.autocast(image.device.type, enabled=False):
        return implementation.sample(image, text, logit_scale, ids, floor, seed)


@_sample_op.register_fake
def _(image, text, logit_scale, ids, floor, seed, impl):
    return tuple(image.new_empty(image.shape[0], dtype=torch.int64) for _ in range(2))


def sample_hard_negatives(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    ids: Tensor | None = None,
    floor: float = 1e-5,
    seed: Tensor,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Draw, for each text of a batch, an image that it does not describe, and for each image such a text.

    Source: ALBEF (arXiv 2107.07651) and X-VLM (arXiv 2111.08276), image-text matching. Exact, and carries no gradient.

    Args:
        image: (B, D), floating, used as it is: normalising is the caller's. Row i belongs to row i of `text`.
        text: (B, D), the dtype of `image`.
        logit_scale: positive, already exponentiated; a tensor of one element, or a float.
        ids: (B,) int64; samples with equal id are never drawn for each other. None: every sample has its own.
        floor: added to each probability of the softmax over all samples; at least 0.
        seed: (1,) int64 on the device of `image`. Equal seeds draw equally, whatever the implementation; take another
            one for each step and rank.
        impl: "auto", or one of `implementations("sample_hard_negatives")`.

    Returns:
        (image_negative, text_negative), each (B,) int64: for text i an image, for image i a text. -1 where there is
        none, or where a logit of the row is not finite. Products are formed in the input dtype (under autocast in its
        dtype) and accumulated in fp32.

    Raises:
        ValueError: a shape, value, device or implementation does not fit.
        TypeError: a dtype or the type of a scalar does not fit.
    """
    kind = image.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        if image.is_floating_point() and image.dtype != torch.float64:
            image, text = image.to(dtype), text.to(dtype)
        with torch.autocast(kind, enabled=False):
            return sample_hard_negatives(image, text, logit_scale, ids=ids, floor=floor, seed=seed, impl=impl)
    logit_scale = _check(image, text, logit_scale, ids, floor, seed)
    image, text, logit_scale = image.detach(), text.detach(), logit_scale.detach()
    B = image.shape[0]
    chosen = dispatch.select(_NAME, impl, image.device, size=B * B)
    if chosen == "reference":
        return reference.sample_hard_negatives(image, text, logit_scale, ids, floor, seed)
    if chosen == "triton":
        dispatch.require(B <= MAX_PAIRS_TRITON, _NAME, f"triton takes at most {MAX_PAIRS_TRITON} pairs", B)
        dispatch.require(image.dtype != torch.float64, _NAME, "triton takes no float64", image.dtype, TypeError)
    return _sample_op(image, text, logit_scale, ids, float(floor), seed, chosen)


def _check(image, text, logit_scale, ids, floor, seed) -> Tensor:
    """Raise unless the arguments fit the contract; the scale as a tensor."""
    require = dispatch.require
    require(image.ndim == 2 and image.shape[1] >= 1, _NAME, "image must be (B, D) with D >= 1", tuple(image.shape))
    B = image.shape[0]
    require(text.shape == image.shape, _NAME, f"text must be {tuple(image.shape)}", tuple(text.shape))
    require(image.is_floating_point(), _NAME, "image must be floating", image.dtype, TypeError)
    require(text.dtype == image.dtype, _NAME, f"text must be {image.dtype}", text.dtype, TypeError)
    if ids is not None:
        require(tuple(ids.shape) == (B,), _NAME, f"ids must be ({B},)", tuple(ids.shape))
        require(ids.dtype == torch.int64, _NAME, "ids must be torch.int64", ids.dtype, TypeError)
    require(_is_number(floor), _NAME, "floor must be a float", type(floor).__name__, TypeError)
    require(math.isfinite(floor) and floor >= 0, _NAME, "floor must be finite and at least 0", floor)
    require(isinstance(seed, Tensor), _NAME, "seed must be a tensor", type(seed).__name__, TypeError)
    require(seed.dtype == torch.int64, _NAME, "seed must be torch.int64", seed.dtype, TypeError)
    require(tuple(seed.shape) == (1,), _NAME, "seed must be (1,)", tuple(seed.shape))
    if not isinstance(logit_scale, Tensor):
        kind = type(logit_scale).__name__
        require(_is_number(logit_scale), _NAME, "logit_scale must be a float or a tensor", kind, TypeError)
        positive = math.isfinite(logit_scale) and logit_scale > 0
        require(positive, _NAME, "logit_scale must be positive and finite", logit_scale)
        logit_scale = torch.full((), float(logit_scale), dtype=torch.float32, device=image.device)
    require(logit_scale.numel() == 1, _NAME, "logit_scale must have one element", tuple(logit_scale.shape))
    require(logit_scale.is_floating_point(), _NAME, "logit_scale must be floating", logit_scale.dtype, TypeError)
    dispatch.require_same_device(_NAME, (image, text, logit_scale, ids, seed))
    if dispatch.checks_enabled():
        for name, value in (("image", image), ("text", text), ("logit_scale", logit_scale)):
            require(bool(value.isfinite().all()), _NAME, f"{name} must be finite", "inf or nan")
    return logit_scale


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
