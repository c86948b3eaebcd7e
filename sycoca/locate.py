"""Where in an image a phrase is: a model's boxes, and a picture of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sycoca.images import as_pil, normalise, resized_crop
from sycoca.regions import to_corners

_COLOURS = ("#e6194b", "#0082c8", "#3cb44b", "#f58231", "#911eb4", "#008080", "#aa6e28", "#800000")
_LEAST_FONT_PX = 12


class Located(NamedTuple):
    """A phrase, its box (x0, y0, x1, y1) in 0..1 of the image, and the model's belief that it is there, 0..1.

    `match` is None for a model that does not match images and texts.
    """

    phrase: str
    box: tuple[float, float, float, float]
    match: float | None


def whole_image(image: Image.Image | np.ndarray, size: int) -> np.ndarray:
    """All of an image as a square (size, size, 3) uint8, proportions not kept, as boxes are learned on."""
    image = as_pil(image)
    return resized_crop(image, (0, 0, *image.size), size)


@torch.inference_mode()
def locate(model: Any, tokenizer: Any, image: Image.Image | np.ndarray, phrases: Sequence[str]) -> list[Located]:
    """Boxes of what phrases describe.

    Args:
        model: with the objective `bbox`, in evaluation mode.
        tokenizer: the model's.
        image: RGB PIL image or (height, width, 3) uint8.
        phrases: at least one.

    Raises:
        ValueError: the model was built without boxes, or there is no phrase.
    """
    if getattr(model, "box_head", None) is None:
        raise ValueError("built without the objective 'bbox', which learns where things are")
    if not phrases:
        raise ValueError("locate: no phrase")
    device, config = next(model.parameters()).device, model.config
    pixels = torch.from_numpy(whole_image(image, config.vision.image_size))[None].to(device)
    views = model.view_images(model.encode_image(normalise(pixels)))
    views = views._replace(seen=views.seen.of(torch.zeros(len(phrases), dtype=torch.int64, device=device)))
    text = model.encode_text(tokenizer.encode(list(phrases), config.text.context_length).to(device))
    boxes = shown(model.locate(text, views)).tolist()
    matches = [None] * len(phrases)
    if model.itm_head is not None:
        matches = model.match(text, views).softmax(1)[:, 1].tolist()
    return [Located(phrase, tuple(box), match) for phrase, box, match in zip(phrases, boxes, matches)]


def shown(boxes: Tensor) -> Tensor:
    """Corners (B, 4) in 0..1 of the part inside the image of boxes (B, 4), (cx, cy, w, h)."""
    return to_corners(boxes.double()).clamp(0, 1)


def draw_boxes(image: Image.Image | np.ndarray, found: Sequence[Located]) -> Image.Image:
    """A copy of an image with a frame for each phrase, labelled by it; an empty one has a white frame and no label."""
    image = as_pil(image).convert("RGB").copy()
    painter = ImageDraw.Draw(image)
    width, height = image.size
    font = ImageFont.load_default(max(_LEAST_FONT_PX, min(width, height) // 28))
    line = max(2, min(width, height) // 160)
    for place, (phrase, box, match) in enumerate(found):
        colour = _COLOURS[place % len(_COLOURS)] if phrase else "white"
        x0, y0, x1, y1 = (round(side * size) for side, size in zip(box, (width, height) * 2))
        painter.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=line)
        if not phrase:
            continue
        label = phrase if match is None else f"{phrase}  {match:.0%}"
        _, top, right, bottom = painter.textbbox((0, 0), label, font=font)
        w, h = right + 6, bottom + 6
        # Above the frame where there is room, inside the picture in any case.
        x, y = max(0, min(x0, width - w)), y0 - h if y0 >= h else min(y0 + line, max(0, height - h))
        painter.rectangle((x, y, x + w, y + h), fill=colour)
        painter.text((x + 3, y + 3 - top // 2), label, fill="white", font=font)
    return image
