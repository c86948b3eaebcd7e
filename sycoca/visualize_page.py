"""Views of a model as one HTML page; pointing at a word of a caption shows where it lies."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sycoca.page import cells_uri, figure, heat, page, picture_uri, stack, text

if TYPE_CHECKING:
    from sycoca.visualize import View

_LEFT_OUT = (128, 128, 128, 225)
_HIDDEN = (110, 110, 118, 255)
_TITLE = "What the model attends to"

_WORDS = {
    "score": (
        "Score of each word",
        "How alike each word and each patch are (cosine). The score of a patch is its best word's; [EOT] is the end "
        "of the caption, which is a token too.",
    ),
    "attention": (
        "Where the captioner looks for each word",
        "Its attention to every patch just before it writes the word, averaged over layers and heads.",
    ),
}

_STYLE = """
.said { font-size: 1.2rem; line-height: 2; margin: .5rem 0 .2rem; max-width: none; }
.word { font: inherit; color: inherit; background: none; border: 0; border-bottom: 2px solid var(--line);
  padding: 0 .15em; margin-right: .25em; cursor: pointer; border-radius: .2rem .2rem 0 0; }
.word:hover, .word:focus-visible, .word[aria-pressed=true] { border-color: var(--accent); color: var(--accent); }
.words > .ramp, .words > .ends { max-width: 16rem; } .words > .ends { margin-bottom: .6rem; }
.large { display: grid; gap: 1.2rem; grid-template-columns: minmax(0, 26rem) minmax(0, 1fr); margin-top: .6rem; }
.large .grid { grid-template-columns: repeat(auto-fill, minmax(min(100%, 9.5rem), 1fr)); align-content: start; }
@media (max-width: 50rem) { .large { grid-template-columns: 1fr; } }
"""

_SCRIPT = """
for (const article of document.querySelectorAll("article")) {
  const layer = article.querySelector("[data-layer]"), told = article.querySelector(".told");
  if (!layer) continue;
  const ends = article.querySelector(".ends"), wordEnds = article.querySelector(".words .ends");
  const rest = { uri: layer.src, told: told.textContent, ends: ends.innerHTML };
  let held = null;
  const show = (word) => {
    layer.src = word ? article.querySelector(`[data-map="${word.dataset.word}"] .cells`).src : rest.uri;
    told.textContent = word ? word.dataset.told : rest.told;
    ends.innerHTML = word ? wordEnds.innerHTML : rest.ends;
  };
  for (const word of article.querySelectorAll(".word")) {
    word.addEventListener("pointerenter", () => show(word));
    word.addEventListener("pointerleave", () => show(held));
    word.addEventListener("focus", () => show(word));
    word.addEventListener("blur", () => show(held));
    word.addEventListener("click", () => {
      held?.setAttribute("aria-pressed", "false");
      held = held === word ? null : word;
      held?.setAttribute("aria-pressed", "true");
      show(held ?? word);
    });
  }
}
"""


def overlay_page(views: Sequence["View"]) -> str:
    """Draws views on one page that needs no other file and no network.

    Args:
        views: at least one.

    Returns:
        HTML.

    Raises:
        ValueError: no view.
    """
    if not views:
        raise ValueError("overlay_page: needs at least one view")
    hint = ""
    if any(view.words for view in views):
        hint = '<p class="quiet">Point at a word of a caption to see where it lies; click to hold it.</p>'
    return page(_TITLE, [f"<h1>{_TITLE}</h1>", hint, *(_article(view) for view in views)], style=_STYLE, script=_SCRIPT)


def _article(view: "View") -> str:
    picture = picture_uri(view.image if view.picture is None else view.picture)
    heading = f"<h2>{text(view.source)}</h2>" if view.source else ""
    parts = [heading, _caption(view)]
    if view.written is not None and view.written == view.caption:
        parts.append('<p class="quiet">the model\'s own caption</p>')
    elif view.written is not None:
        parts.append(f'<p class="quiet">the model writes: {text(view.written) or "(nothing)"}</p>')
    if view.stranger is not None:
        parts.append(f'<p class="quiet">another image\'s caption: {text(view.stranger)}</p>')
    parts.append(f'<div class="large"><div>{_main(view)}</div><div class="grid">{_panels(view)}</div></div>')
    if view.words is not None:
        parts.append(_words(view))
    return f'<article style="--picture:url({picture})">' + f"{''.join(parts)}</article>"


def _caption(view: "View") -> str:
    if view.words is None:
        return f'<p class="said">{text(view.caption) or "(no caption)"}</p>'
    shown = "".join(
        f'<button class="word" type="button" aria-pressed="false" data-word="{i}" data-told="{text(_told(view, i))}">'
        f"{text(word)}</button>"
        for i, word in enumerate(view.words.words)
    )
    return f'<p class="said">{shown}</p>'


def _told(view: "View", i: int) -> str:
    kind = "score" if view.words.kind == "score" else "attention"
    return f"{kind} of \u201c{view.words.words[i]}\u201d"


def _main(view: "View") -> str:
    """The large picture: scores where there are any, else the first word's map waits for a pointer."""
    if view.scores is None and view.words is None:
        return figure(stack((None, ""), alt="the image"), "the image")
    if view.scores is not None:
        values, told = view.scores, "score of each patch under the caption"
    else:
        values, told = view.words.maps.mean(0), "attention, mean over the words"
    low, high = _range(values)
    shown = stack((None, "grey"), (cells_uri(heat(values, low, high)), "cells"), alt="the image, scores over it")
    shown = shown.replace('class="cells"', 'class="cells" data-layer', 1)
    return figure(f"{shown}{_legend(low, high)}", f'<span class="told">{text(told)}</span>')


def _panels(view: "View") -> str:
    panels = [figure(stack((None, ""), alt="the image"), "the image as the model is given it")]
    if view.kept is not None:
        cover = cells_uri(_covered(~view.kept, _LEFT_OUT))
        shown = stack((None, ""), (cover, "cells"), alt="the image, dropped patches covered")
        panels.append(figure(shown, "what captioning keeps when it is masked"))
    if view.masked is not None:
        cover = cells_uri(_covered(view.masked, _HIDDEN))
        shown = stack((None, ""), (cover, "cells"), alt="the image, masked patches covered")
        panels.append(figure(shown, "what TG-MIM hides: the patches that score highest"))
    if view.rebuilt is not None:
        shown = stack((picture_uri(view.rebuilt), _sharp(view)), alt="the image, hidden patches rebuilt")
        panels.append(figure(shown, "the hidden, rebuilt from the rest and the caption"))
    if view.misled is not None:
        shown = stack((picture_uri(view.misled), _sharp(view)), alt="the image, rebuilt with another caption")
        panels.append(figure(shown, "rebuilt with another image's caption"))
    return "".join(panels)


def _words(view: "View") -> str:
    kind, words, maps = view.words
    if not words:
        return ""
    title, told = _WORDS[kind]
    low, high = _range(maps)
    small = "".join(
        f'<div data-map="{i}">'
        + figure(stack((None, "grey"), (cells_uri(heat(values, low, high)), "cells"), alt=f"map of {word}"), text(word))
        + "</div>"
        for i, (word, values) in enumerate(zip(words, maps))
    )
    return (
        f'<section class="words"><h3>{title}</h3><p class="quiet">{told}</p>{_legend(low, high)}'
        f'<div class="grid small">{small}</div></section>'
    )


def _legend(low: float, high: float) -> str:
    return f'<div class="ramp"></div><div class="ends"><span>{low:.3g}</span><span>{high:.3g}</span></div>'


def _range(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def _covered(marked: np.ndarray, colour: tuple[int, int, int, int]) -> np.ndarray:
    return np.where(marked[:, :, None], np.array(colour), 0).astype(np.uint8)


def _sharp(view: "View") -> str:
    # A picture of few pixels is shown as what it is.
    return "cells" if max(view.image.shape[:2]) <= 128 else ""
