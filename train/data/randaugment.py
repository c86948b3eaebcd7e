"""RandAugment (arXiv 1909.13719) as X-VLM pre-trains with it: N operations drawn, each done half the time.

    s = strength / 10
    brightness, sharpness   image blended with black, or with a smoothed one, by 0.1 + 1.8 s
    autocontrast, equalise  channel by channel
    shear x, y              +- 0.3 s
    translate x, y          +- s 10 / 224 of the side
    rotate                  +- 30 s degrees

What moves in from outside is grey. Operations that move pixels are left out where a picture has boxes. None changes the
hue by intent, but autocontrast and equalise change colours, so that a caption that names an exact one may become wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from sycoca.images import Draws

STRONGEST = 10
_GREY = (128, 128, 128)
_SHARE_DONE = 0.5
_FARTHEST = 10 / 224


def _moved(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """The image whose pixel (x, y) is that of the old one at (a x + b y + c, d x + e y + f), bilinearly."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=_GREY)


def _blend(s: float) -> float:
    return 0.1 + 1.8 * s


# By name: of an image and s, which has a sign.
COLOURS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, s: image,
    "autocontrast": lambda image, s: ImageOps.autocontrast(image),
    "equalise": lambda image, s: ImageOps.equalize(image),
    "brightness": lambda image, s: ImageEnhance.Brightness(image).enhance(_blend(abs(s))),
    "sharpness": lambda image, s: ImageEnhance.Sharpness(image).enhance(_blend(abs(s))),
}
PLACES: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "shear_x": lambda image, s: _moved(image, (1, 0.3 * s, 0, 0, 1, 0)),
    "shear_y": lambda image, s: _moved(image, (1, 0, 0, 0.3 * s, 1, 0)),
    "translate_x": lambda image, s: _moved(image, (1, 0, s * _FARTHEST * image.width, 0, 1, 0)),
    "translate_y": lambda image, s: _moved(image, (1, 0, 0, 0, 1, s * _FARTHEST * image.height)),
    "rotate": lambda image, s: image.rotate(30 * s, Image.Resampling.BILINEAR, fillcolor=_GREY),
}
_WITHOUT_PLACES = tuple(COLOURS.values())
_ALL = (*COLOURS.values(), *PLACES.values())


def randaugment(
    picture: np.ndarray, draws: Draws, count: int, strength: float, *, geometric: bool = True
) -> np.ndarray:
    """A picture with some operations done to it.

    Args:
        picture: (H, W, 3) uint8.
        draws: uniform numbers, three for each operation, whatever is done.
        count: operations drawn.
        strength: of them, 0..10.
        geometric: whether pixels may move.

    Returns:
        (H, W, 3) uint8; the picture itself where nothing is done.
    """
    operations, image = _ALL if geometric else _WITHOUT_PLACES, None
    for _ in range(count):
        which, done, side = draws.random(), draws.random(), draws.random()
        if done < _SHARE_DONE:
            image = Image.fromarray(np.ascontiguousarray(picture)) if image is None else image
            s = math.copysign(strength / STRONGEST, side - 0.5)
            image = operations[int(which * len(operations))](image, s)
    return picture if image is None else np.array(image)
