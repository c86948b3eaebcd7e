"""What makes patches of an image where it is more than a linear map: sizes of its convolutions.

    3 -> D / 2^(n-1) -> ... -> D / 2 -> D   each a 3 x 3 convolution of stride 2, n of them for patches of 2^n pixels;
    D -> D                                  one more of stride 1, then a linear map

Xiao et al. 2021 (arXiv 2106.14881), without normalisation, which [CLS] and patches get together behind the stem.
"""

from itertools import pairwise
from typing import NamedTuple

from sycoca.checked import require

_LEAST = 32


class StemConv(NamedTuple):
    """Channels before and after a convolution, and its stride."""

    before: int
    after: int
    stride: int


def stem_convs(patch_size: int, width: int) -> list[StemConv]:
    """The convolutions, first to last, for patches of 2^n pixels (n at least 1) and D channels."""
    halvings = patch_size.bit_length() - 1
    channels = [3, *(max(_LEAST, width >> left) for left in reversed(range(halvings)))]
    return [*(StemConv(*pair, 2) for pair in pairwise(channels)), StemConv(channels[-1], width, 1)]


def check_stem(vision) -> None:
    """Refuses an image encoder (`VisionConfig`) that a stem of convolutions does not fit."""
    if vision.stem == "conv":
        size = vision.patch_size
        halved = size >= 2 and size & (size - 1) == 0
        require(halved, f"stem: 'conv' halves the image step by step, patch_size {size} is no power of 2")
        require(vision.swin is None, "stem: 'conv' is for a ViT, and swin is given")
