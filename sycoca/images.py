"""Images in and out: bounded decoding, crops and resizing by torchvision's rules, normalisation.

resize         the shorter side becomes s, the longer int(s longer / shorter); antialiased bicubic
centre crop    corner round((side - s) / 2)
random crop    area share uniform, log aspect uniform, up to ten draws, else the largest legal centred crop
normalise      (x / 255 - mean) / std, channel by channel
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 64_000_000

# Pillow would hand PostScript to an interpreter and read many rare formats; these are what image-caption data holds.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO")
_ATTEMPTS = 10


class ImageError(ValueError):
    """An image that cannot be used; `cause` says why in words that many images share."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class Draws(Protocol):
    """A source of uniform numbers, such as numpy.random.Generator."""

    def random(self) -> float:
        """The next number in [0, 1)."""
        ...


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        # 16-bit grey arrives as I;16 or I; Pillow's own conversion clips it to white.
        scale = 257.0 if image.mode != "F" and (image.mode != "I" or values.max(initial=0) > 255) else 1.0
        return Image.fromarray(np.clip(values / scale, 0, 255).astype(np.uint8), "L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def decode(source: bytes | str | os.PathLike | Any, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image, upright, as RGB; transparency over white.

    Args:
        source: the encoded bytes, a path, or a binary file.
        max_pixels: the largest area that is decoded, judged by the header before any memory is taken.

    Returns:
        A loaded PIL image of mode RGB.

    Raises:
        ImageError: of cause "missing image", "image too large" or "unreadable image".
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = io.BytesIO(source)
    with warnings.catch_warnings():
        # The header check below decides about size; the rest is gossip about metadata.
        warnings.simplefilter("ignore")
        try:
            with Image.open(source, formats=_FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise ImageError("image too large")
                image.load()
                try:
                    upright = ImageOps.exif_transpose(image)
                except Exception:
                    # Broken orientation data must not cost a sound picture.
                    upright = image
                return _to_rgb(upright)
        except ImageError:
            raise
        except FileNotFoundError:
            raise ImageError("missing image") from None
        except Image.DecompressionBombError:
            raise ImageError("image too large") from None
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, MemoryError):
            raise ImageError("unreadable image") from None
        except Exception:
            # Damaged files make Pillow's plugins raise what they like (struct.error, IndexError, KeyError, ...).
            raise ImageError("unreadable image") from None


def _resized(width: int, height: int, size: int) -> tuple[int, int]:
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def _center_corner(width: int, height: int, size: int) -> tuple[int, int]:
    return round((width - size) / 2), round((height - size) / 2)


def _middle(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = _center_corner(*image.size, side)
    return image.crop((left, top, left + side, top + side))


def as_pil(image: Image.Image | np.ndarray) -> Image.Image:
    """An image of either form as PIL's."""
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image


def center_image(image: Image.Image | np.ndarray, size: int) -> np.ndarray:
    """The picture for evaluation: shorter side to `size`, square out of the middle.

    The other way round for a strip that would grow beyond `MAX_PIXELS`, which may differ at the edges of the square.

    Args:
        image: RGB PIL image or (height, width, 3) uint8.
        size: side in pixels.

    Returns:
        (size, size, 3) uint8.
    """
    if isinstance(image, np.ndarray) and image.shape[:2] == (size, size):
        return image
    image = as_pil(image)
    shape = _resized(*image.size, size)
    if shape[0] * shape[1] > MAX_PIXELS:
        # A strip would be blown up beyond all memory only to be cut away.
        image, shape = _middle(image), (size, size)
    if image.size != shape:
        image = image.resize(shape, Image.Resampling.BICUBIC)
    left, top = _center_corner(*shape, size)
    if (left, top) != (0, 0) or shape != (size, size):
        image = image.crop((left, top, left + size, top + size))
    return np.array(image)


def crop_box(
    box: tuple[float, float, float, float], image: Image.Image | np.ndarray
) -> tuple[float, float, float, float]:
    """Where a box lies in the square that `center_image` cuts out, up to the rounding of pixels.

    Args:
        box: x0, y0, x1, y1 in 0..1 of the image.
        image: the image, for its proportions.

    Returns:
        x0, y0, x1, y1 in 0..1 of the square, clipped to it; a box outside has no area.
    """
    width, height = (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    x0, x1 = (min(1.0, max(0.0, (x * width - left) / side)) for x in (box[0], box[2]))
    y0, y1 = (min(1.0, max(0.0, (y * height - top) / side)) for y in (box[1], box[3]))
    return x0, y0, x1, y1


def random_crop_box(
    width: int, height: int, draws: Draws, scale: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> tuple[int, int, int, int]:
    """A crop as torchvision's RandomResizedCrop chooses it.

    Args:
        width: of the image in pixels.
        height: of the image in pixels.
        draws: uniform numbers.
        scale: range of the share of the area.
        ratio: range of width over height.

    Returns:
        (left, top, width, height) in pixels, inside the image.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_ATTEMPTS):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * draws.random())
        aspect = math.exp(low + (high - low) * draws.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(draws.random() * (height - h + 1))
            left = int(draws.random() * (width - w + 1))
            return left, top, w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (width - w) // 2, (height - h) // 2, w, h


def random_image(
    image: Image.Image | np.ndarray,
    size: int,
    draws: Draws,
    *,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """The picture for training: a random crop, resized. Never mirrored: captions say left and right.

    Args:
        image: RGB PIL image or (height, width, 3) uint8.
        size: side in pixels.
        draws: uniform numbers.
        scale: range of the crop's share of the area.
        ratio: range of the crop's width over height.

    Returns:
        (size, size, 3) uint8.
    """
    image = as_pil(image)
    return resized_crop(image, random_crop_box(*image.size, draws, scale, ratio), size)


def resized_crop(image: Image.Image | np.ndarray, crop: tuple[int, int, int, int], size: int) -> np.ndarray:
    """A part of an image as a square, proportions not kept.

    Args:
        image: RGB PIL image or (height, width, 3) uint8.
        crop: left, top, width, height in pixels, inside the image.
        size: side in pixels.

    Returns:
        (size, size, 3) uint8.
    """
    left, top, width, height = crop
    part = as_pil(image).crop((left, top, left + width, top + height))
    return np.array(part.resize((size, size), Image.Resampling.BICUBIC))


def _scale_and_shift(device: torch.device) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(IMAGE_MEAN, dtype=torch.float64)
    std = torch.tensor(IMAGE_STD, dtype=torch.float64)
    scale, shift = 1.0 / (255.0 * std), -mean / std
    return scale.float().to(device)[:, None, None], shift.float().to(device)[:, None, None]


def normalise(pictures: Tensor) -> Tensor:
    """Pixels as the models take them.

    Args:
        pictures: (B, H, W, 3) or (H, W, 3) uint8, on any device.

    Returns:
        (B, 3, H, W) or (3, H, W) fp32, contiguous, by CLIP's mean and standard deviation.
    """
    scale, shift = _scale_and_shift(pictures.device)
    images = pictures.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
    return images.mul_(scale).add_(shift)


def denormalise(images: Tensor) -> Tensor:
    """The inverse of `normalise`, for pictures.

    Args:
        images: (B, 3, H, W) or (3, H, W) floating point.

    Returns:
        (B, H, W, 3) or (H, W, 3) uint8; values outside the range of pixels are clipped.
    """
    scale, shift = _scale_and_shift(images.device)
    pixels = (images.detach().float() - shift) / scale
    return pixels.round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous()


def load_images(paths: Iterable[str | os.PathLike], size: int) -> Tensor:
    """Image files as the models take them at evaluation.

    Args:
        paths: B files.
        size: side in pixels.

    Returns:
        (B, 3, size, size) fp32.

    Raises:
        ImageError: a file cannot be used.
    """
    return normalise(torch.from_numpy(np.stack([center_image(decode(path), size) for path in paths])))


def eval_transform(image: Image.Image | np.ndarray, size: int) -> Tensor:
    """An image as the models take it at evaluation.

    Args:
        image: RGB PIL image or (height, width, 3) uint8.
        size: side in pixels.

    Returns:
        (3, size, size) fp32.
    """
    return normalise(torch.from_numpy(center_image(image, size)))
