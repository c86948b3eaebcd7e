"""Contact sheets of retrieval: every query with what was found, best first, as an HTML page or a figure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sycoca.page import figure, page, picture_uri, stack, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL, _GAP, _LINE, _TOP = 1.5, 0.14, 0.16, 0.5  # inches
_ACROSS, _DPI, _FONT = 6, 110, 8
_WRAP, _MOST_LINES = 26, 4

_STYLE = """
.query { display: flex; gap: 1rem; align-items: center; } .query .stack { width: 9rem; flex: none; }
.found { grid-template-columns: repeat(auto-fill, minmax(min(100%, 11rem), 1fr)); margin-top: 1rem; }
ol { margin: .8rem 0 0; padding-left: 2rem; } li { padding: .15rem 0; overflow-wrap: anywhere; }
.rank { color: var(--quiet); font-variant-numeric: tabular-nums; margin-right: .4em; }
figcaption .rank { display: block; }
"""


@dataclass(frozen=True)
class Item:
    """A query or something found.

    Attributes:
        name: a path, or a text.
        picture: (S, S, 3) uint8, or None for a text.
        score: cosine similarity to the query, or None for the query itself.
    """

    name: str
    picture: np.ndarray | None = None
    score: float | None = None


Ranking = tuple[Item, Sequence[Item]]


def sheet_page(rankings: Sequence[Ranking], *, searched: str) -> str:
    """A page of rankings that needs no other file and no network.

    Args:
        rankings: each query with what was found, best first.
        searched: what was searched, for the heading.
    """
    title = f"Retrieval among {searched}"
    note = '<p class="quiet">Best first; the number is the cosine similarity of query and finding.</p>'
    return page(title, [f"<h1>{text(title)}</h1>", note, *map(_article, rankings)], style=_STYLE)


def _article(ranking: Ranking) -> str:
    query, found = ranking
    shown = "" if query.picture is None else stack((picture_uri(query.picture), ""), alt=query.name)
    head = f'<div class="query">{shown}<h2>{text(query.name)}</h2></div>'
    if found and found[0].picture is None:
        rows = "".join(f'<li><span class="rank">{_score(item)}</span>{text(item.name)}</li>' for item in found)
        return f"<article>{head}<ol>{rows}</ol></article>"
    cells = "".join(
        figure(
            stack((picture_uri(item.picture), ""), alt=item.name),
            f'<span class="rank">{rank}. {_score(item)}</span>{text(item.name)}',
        )
        for rank, item in enumerate(found, 1)
    )
    return f'<article>{head}<div class="grid found">{cells}</div></article>'


def sheet_figure(rankings: Sequence[Ranking], *, searched: str) -> Figure:
    """The same as a matplotlib figure that belongs to no window."""
    from matplotlib.figure import Figure

    heights = [_height(query, found) for query, found in rankings]
    width, height = _GAP + _ACROSS * (_CELL + _GAP), _TOP + sum(heights)
    sheet = Figure(figsize=(width, height), dpi=_DPI)
    _put(sheet, f"Retrieval among {searched}", _GAP, height - _GAP, weight="bold", size=_FONT + 2)
    top = height - _TOP
    for (query, found), used in zip(rankings, heights):
        _draw(sheet, query, found, top)
        top -= used
    return sheet


def _height(query: Item, found: Sequence[Item]) -> float:
    head = 2 * _LINE + (_CELL if query.picture is not None else 0)
    if found and found[0].picture is None:
        return head + _GAP + len(found) * 1.2 * _LINE + _LINE
    return head + -(-len(found) // _ACROSS) * (_CELL + (_MOST_LINES - 1) * _LINE)


def _draw(sheet: Figure, query: Item, found: Sequence[Item], top: float) -> None:
    _put(sheet, textwrap.shorten(query.name, 110, placeholder="..."), _GAP, top, weight="bold", size=_FONT + 1)
    top -= 1.5 * _LINE
    if query.picture is not None:
        _show(sheet, query.picture, _GAP, top)
        top -= _CELL + _GAP
    for rank, item in enumerate(found):
        told = f"{rank + 1}. {_score(item)}"
        if item.picture is None:
            line = textwrap.shorten(item.name, 120, placeholder="...")
            _put(sheet, f"{told}  {line}", _GAP, top - rank * 1.2 * _LINE)
            continue
        row, column = divmod(rank, _ACROSS)
        left, above = _GAP + column * (_CELL + _GAP), top - row * (_CELL + (_MOST_LINES - 1) * _LINE)
        _show(sheet, item.picture, left, above)
        # The end of a path tells more than its beginning.
        name = item.name if len(item.name) <= _WRAP else "..." + item.name[3 - _WRAP :]
        _put(sheet, told, left, above - _CELL - 0.03)
        _put(sheet, name, left, above - _CELL - 0.03 - _LINE * 0.85, size=_FONT - 1)


def _show(sheet: Figure, picture: np.ndarray, left: float, top: float) -> None:
    width, height = sheet.get_size_inches()
    axes = sheet.add_axes((left / width, (top - _CELL) / height, _CELL / width, _CELL / height))
    axes.set_axis_off()
    axes.imshow(picture)


def _put(sheet: Figure, words: str, left: float, top: float, *, weight: str = "normal", size: int = _FONT) -> None:
    width, height = sheet.get_size_inches()
    shown = "".join(c if c.isprintable() else " " for c in words)
    sheet.text(left / width, top / height, shown, va="top", fontsize=size, weight=weight, parse_math=False)


def _score(item: Item) -> str:
    return f"{item.score:.3f}"
