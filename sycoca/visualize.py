"""Pictures of what a model attends to: patch scores, what captioning keeps, what TG-MIM hides and rebuilds.

matplotlib is imported when the first figure is drawn.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sycoca.generate import generate_from
from sycoca.images import center_image, crop_box, decode, denormalise, eval_transform
from sycoca.vision import patchify, unpatchify
from sycoca.visualize_figure import overlay_figure, save_figure
from sycoca.visualize_words import WordMaps, word_maps

__all__ = [
    "View",
    "has_scores",
    "look_at",
    "overlay_figure",
    "restore_patches",
    "save_overlay",
    "save_overview",
    "view_pairs",
]
# The square that a person sees is at most this many pixels wide.
_SHOWN_SIZE = 512


@dataclass(frozen=True)
class View:
    """One image as the model sees it; None where the model has no such part.

    Attributes:
        image: (H, W, 3) uint8.
        caption: the true one.
        written: the model's own.
        boxes: (n, 4) x0, y0, x1, y1 of the described objects, as shares of the image.
        scores: (rows, cols) float, of the patches under the caption.
        kept: (rows, cols) bool, the patches that captioning sees.
        masked: (rows, cols) bool, the patches that TG-MIM hides.
        rebuilt: (H, W, 3) uint8, the hidden patches from the visible ones and the caption.
        stranger: a caption of another image.
        misled: as `rebuilt`, from the same visible patches and the stranger.
        words: where each word of the caption lies.
        picture: (S, S, 3) uint8, the same square of the image at the size for a person.
        source: where the image comes from.
    """

    image: np.ndarray
    caption: str
    written: str | None = None
    boxes: np.ndarray | None = None
    scores: np.ndarray | None = None
    kept: np.ndarray | None = None
    masked: np.ndarray | None = None
    rebuilt: np.ndarray | None = None
    stranger: str | None = None
    misled: np.ndarray | None = None
    words: WordMaps | None = None
    picture: np.ndarray | None = None
    source: str | None = None


def restore_patches(predicted: Tensor, target: Tensor) -> Tensor:
    """Predictions in units of each patch (`mse_normalised`) as pixels, with the target's own mean and deviation.

    Args:
        predicted: (B, K, p * p * 3).
        target: the same shape, the true pixels.

    Returns:
        The shape of `predicted`.
    """
    variance, mean = torch.var_mean(target, dim=-1, correction=0, keepdim=True)
    return predicted * (variance + 1e-6).sqrt() + mean


def has_scores(config: Any) -> bool:
    """Whether a model of this configuration selects by the score and has what its score space needs."""
    return config.scores and (config.masking.score_space != "local" or config.local_weight > 0)


@torch.no_grad()
def view_pairs(
    model: Any,
    tokenizer: Any,
    images: Tensor,
    captions: Sequence[str],
    boxes: Sequence[np.ndarray] | None = None,
    *,
    words: bool = False,
) -> list[View]:
    """Runs a model over images and captions; each image's stranger is the next caption that says something else.

    Args:
        model: SyCoCa in eval mode.
        tokenizer: the one the model was trained with.
        images: (B, 3, H, W) fp32, normalised, on the model's device.
        captions: B of them.
        boxes: of each image, as in `View`.
        words: whether each word's place is wanted too.

    Returns:
        B views.
    """
    config = model.config
    tokens = tokenizer.encode(list(captions), config.text.context_length).to(images.device)
    image, text = model.encode_image(images), model.encode_text(tokens)
    parts: dict[str, Sequence] = {"image": denormalise(images).cpu().numpy(), "caption": captions}
    if boxes is not None:
        parts["boxes"] = boxes
    if config.learns("ic"):
        parts["written"] = generate_from(model, tokenizer, image)
    if has_scores(config):
        selection = model.select(image, text)
        parts["scores"] = selection.scores.float().cpu().unflatten(1, config.vision.grid).numpy()
        if config.num_dropped:
            parts["kept"] = _marked(selection.kept, config.vision.grid)
        if config.num_masked:
            parts["masked"] = _marked(selection.masked, config.vision.grid)
        if config.num_masked and not config.predicts_features:
            parts["rebuilt"] = _rebuilt(model, images, text, selection)
            if strangers := _strangers(captions):
                parts["stranger"] = [captions[other] for other in strangers]
                parts["misled"] = _rebuilt(model, images, model.encode_text(tokens[strangers]), selection)
    if words and (maps := word_maps(model, tokenizer, image, text, captions, scored=has_scores(config))):
        parts["words"] = maps
    return [View(**{name: part[i] for name, part in parts.items()}) for i in range(len(captions))]


def save_overview(
    path: str | os.PathLike,
    model: Any,
    tokenizer: Any,
    samples: Iterable[Any],
    *,
    image_size: int,
    device: Any,
) -> None:
    """Writes one PNG of what the model makes of some samples.

    Args:
        path: of the PNG.
        model: SyCoCa in eval mode.
        tokenizer: the one the model was trained with.
        samples: things with `image` (PIL or (height, width, 3) uint8), `captions` and `described(0)`, the regions with
            a `box` that the first caption speaks of.
        image_size: side of the images in pixels.
        device: where the model is.
    """
    samples = list(samples)
    images = torch.stack([eval_transform(sample.image, image_size) for sample in samples]).to(device)
    boxes = [np.array([crop_box(r.box, s.image) for r in s.described(0)]).reshape(-1, 4) for s in samples]
    views = view_pairs(model, tokenizer, images, [sample.captions[0] for sample in samples], boxes)
    save_figure(overlay_figure(views), path)


def look_at(model: Any, tokenizer: Any, paths: Sequence[str | os.PathLike], captions: Sequence[str]) -> list[View]:
    """What a model makes of image files and their captions, for a person: words and larger pictures included.

    Args:
        model: SyCoCa in eval mode.
        tokenizer: the one the model was trained with.
        paths: B image files.
        captions: B of them.

    Returns:
        B views.

    Raises:
        ImageError: a file cannot be used.
    """
    size, device = model.config.vision.image_size, next(model.parameters()).device
    upright = [decode(path) for path in paths]
    images = torch.stack([eval_transform(image, size) for image in upright]).to(device)
    shown = [center_image(image, max(size, min(_SHOWN_SIZE, *image.size))) for image in upright]
    views = view_pairs(model, tokenizer, images, captions, words=True)
    return [replace(v, picture=p, source=os.fspath(path)) for v, p, path in zip(views, shown, paths)]


def save_overlay(
    path: str | os.PathLike,
    model: Any,
    tokenizer: Any,
    images: Sequence[str | os.PathLike],
    captions: Sequence[str],
) -> None:
    """Writes what a model makes of image files and their captions: a figure (.png) or one page (.html).

    Args:
        path: of the file to write.
        model: SyCoCa in eval mode.
        tokenizer: the one the model was trained with.
        images: B files, at least one.
        captions: B of them.

    Raises:
        ValueError: another suffix, or not as many captions as images.
        ImageError: a file cannot be used.
    """
    if len(images) != len(captions) or not images:
        raise ValueError(f"save_overlay: {len(images)} images need as many captions, got {len(captions)}")
    save_views(path, look_at(model, tokenizer, images, captions))


def save_views(path: str | os.PathLike, views: Sequence[View]) -> None:
    """Writes views as a figure (.png) or one page (.html)."""
    suffix = Path(path).suffix.lower()
    if suffix == ".html":
        from sycoca.visualize_page import overlay_page

        Path(path).write_text(overlay_page(views), encoding="utf-8")
    elif suffix == ".png":
        save_figure(overlay_figure(views), path)
    else:
        raise ValueError(f"{path}: must end in .png or .html")


def _strangers(captions: Sequence[str]) -> list[int] | None:
    """For each caption the next one that says something else, None where all say the same."""
    if len(set(captions)) < 2:
        return None
    B = len(captions)
    return [next(j % B for j in range(i + 1, i + B) if captions[j % B] != captions[i]) for i in range(B)]


def _marked(index: Tensor, grid: tuple[int, int]) -> np.ndarray:
    marked = torch.zeros(len(index), grid[0] * grid[1], dtype=torch.bool)
    return marked.scatter(1, index.cpu(), True).unflatten(1, grid).numpy()


def _rebuilt(model: Any, images: Tensor, text: Any, selection: Any) -> np.ndarray:
    """The images with their masked patches as the model rebuilds them, (B, H, W, 3) uint8."""
    vision = model.config.vision
    patches = patchify(images.float(), vision.patch_size)
    index = selection.masked[:, :, None].expand(-1, -1, patches.shape[2])
    predicted = model.reconstruct(images, text, selection).float()
    if model.config.loss.tgmim_kind == "mse_normalised":
        predicted = restore_patches(predicted, patches.gather(1, index))
    return denormalise(unpatchify(patches.scatter(1, index, predicted), vision.patch_size, vision.grid)).cpu().numpy()
