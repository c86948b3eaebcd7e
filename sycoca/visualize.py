"""Pictures of what a model attends to: patch scores, what captioning keeps, what TG-MIM hides and rebuilds.

matplotlib is imported when the first figure is drawn.
"""

import os
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sycoca.generate import generate_from
from sycoca.images import crop_box, denormalise, eval_transform
from sycoca.vision import patchify, unpatchify

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEFT_OUT = 232
_HIDDEN = 96
_DPI = 110
_CELL, _TEXT, _GAP, _BAR, _TOP, _LINE = 1.95, 2.75, 0.12, 0.42, 0.62, 0.158  # inches
_FONT, _SMALL = 9, 7  # points
_WRAP, _MOST_LINES = 38, 3


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
    """Whether a model of this configuration selects and has what its score space needs."""
    return config.selects and (config.masking.score_space != "local" or config.local_weight > 0)


@torch.no_grad()
def view_pairs(
    model: Any, tokenizer: Any, images: Tensor, captions: Sequence[str], boxes: Sequence[np.ndarray] | None = None
) -> list[View]:
    """Runs a model over images and captions; each image's stranger is the caption of the next.

    Args:
        model: SyCoCa in eval mode.
        tokenizer: the one the model was trained with.
        images: (B, 3, H, W) fp32, normalised, on the model's device.
        captions: B of them.
        boxes: of each image, as in `View`.

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
            parts["rebuilt"] = _rebuilt(model, images, text, selection)
            if len(captions) > 1:
                parts["stranger"] = [*captions[1:], captions[0]]
                parts["misled"] = _rebuilt(model, images, model.encode_text(tokens.roll(-1, 0)), selection)
    return [View(**{name: part[i] for name, part in parts.items()}) for i in range(len(captions))]


def overlay_figure(views: Sequence[View]) -> "Figure":
    """Draws views, one to a row, with only the columns that the model has.

    Args:
        views: at least one, of one model.

    Returns:
        A matplotlib figure that belongs to no window.

    Raises:
        ValueError: no view.
    """
    from matplotlib.figure import Figure

    if not views:
        raise ValueError("overlay_figure: needs at least one view")
    columns = [(title, draw) for name, title, draw in _COLUMNS if getattr(views[0], name) is not None]
    has_bar = views[0].scores is not None
    width = _TEXT + len(columns) * (_CELL + _GAP) + has_bar * _BAR
    height = _TOP + len(views) * (_CELL + _GAP)
    figure = Figure(figsize=(width, height), dpi=_DPI)
    for row, view in enumerate(views):
        bottom = height - _TOP - row * (_CELL + _GAP) - _CELL
        _write(figure, view, bottom + _CELL)
        left = _TEXT
        for title, draw in columns:
            axes = figure.add_axes((left / width, bottom / height, _CELL / width, _CELL / height))
            axes.set_xticks([])
            axes.set_yticks([])
            shown = draw(axes, view)
            if row == 0:
                axes.set_title(title, fontsize=_FONT)
            left += _CELL + _GAP
            if shown is not None:
                beside = (left - 0.6 * _GAP) / width
                bar = figure.add_axes((beside, bottom / height, 0.08 / width, _CELL / height))
                _colour_bar(figure, bar, shown)
                left += _BAR
    return figure


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
    figure = overlay_figure(views)
    with warnings.catch_warnings():
        # A script without a font here shows as boxes, which is no concern of who trains.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, format="png")


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


def _painted(image: np.ndarray, marked: np.ndarray, grey: int, strength: float) -> np.ndarray:
    """The image with its marked patches (rows, cols) blended into grey."""
    size = image.shape[0] // marked.shape[0]
    share = strength * np.kron(marked, np.ones((size, size)))[:, :, None]
    return (image * (1 - share) + grey * share).astype(np.uint8)


def _draw_boxes(axes: Any, view: View) -> None:
    from matplotlib.patches import Rectangle

    height, width = view.image.shape[:2]
    for x0, y0, x1, y1 in view.boxes if view.boxes is not None else ():
        corner = (x0 * width - 0.5, y0 * height - 0.5)
        for colour, line in (("black", 2.0), ("white", 0.9)):
            sides = ((x1 - x0) * width, (y1 - y0) * height)
            axes.add_patch(Rectangle(corner, *sides, fill=False, ec=colour, lw=line))


def _draw_scores(axes: Any, view: View) -> Any:
    height, width = view.image.shape[:2]
    grey = view.image.mean(axis=2)
    axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    shown = axes.imshow(view.scores, cmap="inferno", alpha=0.65, extent=extent, interpolation="nearest")
    _draw_boxes(axes, view)
    return shown


def _colour_bar(figure: Any, axes: Any, shown: Any) -> None:
    figure.colorbar(shown, cax=axes, alpha=1.0)
    low, high = shown.get_clim()
    axes.set_yticks([low, high], [f"{low:.2f}", f"{high:.2f}"], fontsize=_SMALL)
    axes.tick_params(length=0, pad=2)


def _show(axes: Any, picture: np.ndarray) -> None:
    axes.imshow(picture, interpolation="nearest")


def _write(figure: Any, view: View, top: float) -> None:
    """The captions of a view in the text column, from a height in inches downwards."""
    from matplotlib.transforms import Bbox

    width, height = figure.get_size_inches()
    column = Bbox.from_bounds(0, 0, _TEXT * _DPI, height * _DPI)
    told = (("caption", view.caption), ("the model writes", view.written), ("another image's caption", view.stranger))
    for name, text in told:
        if text is None:
            continue
        printable = "".join(c if c.isprintable() else " " for c in text)
        lines = textwrap.wrap(printable, _WRAP, max_lines=_MOST_LINES, placeholder=" ...") or ["(nothing)"]
        for line, weight in ((name, "bold"), *((line, "normal") for line in lines)):
            # A caption is no mathematics: dollar signs stay what they are.
            drawn = figure.text(_GAP / width, top / height, line, va="top", fontsize=_FONT, weight=weight)
            drawn.set(parse_math=False, clip_on=True, clip_box=column)
            top -= _LINE
        top -= 0.35 * _LINE


_COLUMNS = (
    ("image", "image", lambda axes, view: _show(axes, view.image)),
    ("scores", "score of each patch (boxes:\nwhat the caption describes)", _draw_scores),
    (
        "kept",
        "what captioning keeps\nwhen it is masked",
        lambda axes, view: _show(axes, _painted(view.image, ~view.kept, _LEFT_OUT, 0.85)),
    ),
    (
        "masked",
        "what TG-MIM hides",
        lambda axes, view: _show(axes, _painted(view.image, view.masked, _HIDDEN, 1.0)),
    ),
    ("rebuilt", "the hidden rebuilt from\nthe rest and the caption", lambda axes, view: _show(axes, view.rebuilt)),
    ("misled", "rebuilt with another\nimage's caption", lambda axes, view: _show(axes, view.misled)),
)
