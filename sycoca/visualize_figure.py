"""Views of a model as one matplotlib figure, which is imported when the first is drawn."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import os

    from matplotlib.figure import Figure

    from sycoca.visualize import View

_LEFT_OUT = 232
_HIDDEN = 96
_DPI = 110
_CELL, _TEXT, _GAP, _BAR, _TOP, _LINE = 1.95, 2.75, 0.12, 0.42, 0.62, 0.158  # inches
_WORD = 1.12  # inches
_FONT, _SMALL = 9, 7  # points
_WRAP, _MOST_LINES = 38, 3

# What the maps of the words show, by kind.
WORD_KINDS = {
    "score": "score of each word (cosine, {low:.2f} dark to {high:.2f} bright)",
    "attention": "where the captioner looks for each word (share of attention, {low:.3f} dark to {high:.3f} bright)",
}


def overlay_figure(views: Sequence[View]) -> Figure:
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
    # A few words stand side by side even under a lone picture.
    width = max(_TEXT + len(columns) * (_CELL + _GAP) + has_bar * _BAR, _TEXT + 6 * (_WORD + _GAP))
    rows = [_CELL + _GAP + _words_height(view, width) for view in views]
    height = _TOP + sum(rows)
    figure = Figure(figsize=(width, height), dpi=_DPI)
    for row, view in enumerate(views):
        bottom = height - _TOP - sum(rows[:row]) - _CELL
        _write(figure, view, bottom + _CELL)
        left = _TEXT
        for title, draw in columns:
            axes = figure.add_axes((left / width, bottom / height, _CELL / width, _CELL / height))
            _bare(axes)
            shown = draw(axes, view)
            if row == 0:
                boxed = " (boxes:\nwhat the caption describes)" if title == _SCORES and _any_boxes(views) else ""
                axes.set_title(title + boxed, fontsize=_FONT)
            left += _CELL + _GAP
            if shown is not None:
                beside = (left - 0.6 * _GAP) / width
                bar = figure.add_axes((beside, bottom / height, 0.08 / width, _CELL / height))
                _colour_bar(figure, bar, shown)
                left += _BAR
        _draw_words(figure, view, bottom - _GAP)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a figure as PNG."""
    with warnings.catch_warnings():
        # A script without a font here shows as boxes, which is no concern of who trains.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, format="png")


def _words_across(width: float) -> int:
    return int((width - _GAP) // (_WORD + _GAP))


def _words_height(view: View, width: float) -> float:
    """Inches that the maps of the words take."""
    if view.words is None or not view.words.words:
        return 0.0
    lines = -(-len(view.words.words) // _words_across(width))
    return 2 * _LINE + lines * (_WORD + 2 * _LINE)


def _draw_words(figure: Figure, view: View, top: float) -> None:
    """One small map for each word, all on one scale of colours, from a height in inches downwards."""
    if not _words_height(view, figure.get_size_inches()[0]):
        return
    width, height = figure.get_size_inches()
    kind, words, maps = view.words
    told = WORD_KINDS[kind].format(low=maps.min(), high=maps.max())
    figure.text(_GAP / width, top / height, told, va="top", fontsize=_FONT, weight="bold")
    top -= 2 * _LINE
    across = _words_across(width)
    for i, (word, values) in enumerate(zip(words, maps)):
        row, column = divmod(i, across)
        left, bottom = _GAP + column * (_WORD + _GAP), top - row * (_WORD + 2 * _LINE) - _LINE - _WORD
        axes = figure.add_axes((left / width, bottom / height, _WORD / width, _WORD / height))
        _bare(axes)
        _draw_heat(axes, view, values, float(maps.min()), float(maps.max()))
        title = axes.set_title(_printable(textwrap.shorten(word, 18, placeholder="...")), fontsize=_FONT, pad=3)
        title.set_parse_math(False)


def _any_boxes(views: Sequence[View]) -> bool:
    return any(view.boxes is not None and len(view.boxes) for view in views)


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_heat(axes: Any, view: View, values: np.ndarray, low: float | None, high: float | None) -> Any:
    height, width = view.image.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(_shown(view).mean(axis=2), cmap="gray", vmin=0, vmax=255, extent=extent)
    return axes.imshow(values, cmap="inferno", alpha=0.65, extent=extent, interpolation="nearest", vmin=low, vmax=high)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _shown(view: View) -> np.ndarray:
    return view.image if view.picture is None else view.picture


def painted(image: np.ndarray, marked: np.ndarray, grey: int, strength: float) -> np.ndarray:
    """The image (S, S, 3) uint8 with its marked patches (rows, cols) blended into grey."""
    size = image.shape[0]
    row = np.arange(size) * marked.shape[0] // size
    share = strength * marked[row][:, row, None]
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
    shown = _draw_heat(axes, view, view.scores, None, None)
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
        lines = textwrap.wrap(_printable(text), _WRAP, max_lines=_MOST_LINES, placeholder=" ...") or ["(nothing)"]
        for line, weight in ((name, "bold"), *((line, "normal") for line in lines)):
            # A caption is no mathematics: dollar signs stay what they are.
            drawn = figure.text(_GAP / width, top / height, line, va="top", fontsize=_FONT, weight=weight)
            drawn.set(parse_math=False, clip_on=True, clip_box=column)
            top -= _LINE
        top -= 0.35 * _LINE


_SCORES = "score of each patch"
_COLUMNS = (
    ("image", "image", lambda axes, view: _show(axes, _shown(view))),
    ("scores", _SCORES, _draw_scores),
    (
        "kept",
        "what captioning keeps\nwhen it is masked",
        lambda axes, view: _show(axes, painted(_shown(view), ~view.kept, _LEFT_OUT, 0.85)),
    ),
    (
        "masked",
        "what TG-MIM hides",
        lambda axes, view: _show(axes, painted(_shown(view), view.masked, _HIDDEN, 1.0)),
    ),
    ("rebuilt", "the hidden rebuilt from\nthe rest and the caption", lambda axes, view: _show(axes, view.rebuilt)),
    ("misled", "rebuilt with another\nimage's caption", lambda axes, view: _show(axes, view.misled)),
)
