"""Results of a task for machines and for people: JSON, a table on the terminal, one HTML page with examples."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sycoca.locate import Located, draw_boxes
from sycoca.page import figure, page, picture_uri, text
from train.tasks.outcome import Example, Outcome

_THUMBNAIL_PX = 224
_STYLE = """
table { border-collapse: collapse; margin: .6rem 0 } th, td { padding: .15rem .8rem; text-align: left }
th { border-bottom: 2px solid var(--line) } td { border-bottom: 1px solid var(--line) } td.n { text-align: right }
figure img { width: 100%; max-height: 18rem; object-fit: contain } figcaption p { margin: .3rem 0 }
figcaption b { color: var(--quiet); font-weight: 600 }
"""


def chosen_examples(examples: Sequence[Example], each: int) -> dict[str, list[Example]]:
    """The best, median and worst examples, none of them twice; NaN is worst."""
    ranked = sorted(examples, key=lambda e: (-math.inf if math.isnan(e.score) else -e.score, e.index))
    ranked.sort(key=lambda e: math.isnan(e.score))
    each = min(each, len(ranked) // 3) if len(ranked) >= 3 else min(each, 1)
    middle = max(each, (len(ranked) - each) // 2)
    worst = ranked[len(ranked) - each :][::-1] if len(ranked) > 2 * each else []
    return {"best": ranked[:each], "median": ranked[middle : middle + each], "worst": worst}


def write_results(folder: Path, name: str, outcome: Outcome, facts: dict[str, Any], source: Any, each: int) -> None:
    """Writes NAME.json and NAME.html into a folder, made where missing."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = chosen_examples(outcome.examples, each)
    plain = {
        "task": outcome.task,
        **facts,
        "results": _finite(outcome.figures),
        "examples": {
            kind: [_finite({"score": e.score, "key": e.key, "lines": e.lines}) for e in found]
            for kind, found in examples.items()
        },
    }
    (folder / f"{name}.json").write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / f"{name}.html").write_text(_page(outcome, facts, examples, source), encoding="utf-8")


def terminal_lines(outcome: Outcome, earlier: Outcome | None = None, names: tuple[str, str] = ("", "")) -> list[str]:
    """The headline as a table, beside that of an earlier outcome, and what falls into kinds.

    Args:
        outcome: what was found.
        earlier: what was found before, of the same task.
        names: of the columns, where there are two.
    """
    width = max([len(name) for name in outcome.headline] + [8])
    lines = []
    if earlier is not None:
        lines.append(f"{outcome.task:{width}}  {names[0]:>12}  {names[1]:>12}")
    for name, value in outcome.headline.items():
        before = f"  {_number(earlier.headline.get(name)):>12}" if earlier is not None else ""
        lines.append(f"{name:{width}}{before}  {_number(value):>12}")
    if earlier is None:
        for title, (_, rows) in outcome.tables.items():
            if title.startswith("recall") or len(rows) > 12:
                continue
            lines.append(f"{title}: " + ", ".join(f"{row[0]} {_number(row[-1])}" for row in rows))
    return lines


def _number(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "n/a"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    """Plain data without NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _page(outcome: Outcome, facts: dict[str, Any], examples: dict[str, list[Example]], source: Any) -> str:
    title = f"{outcome.task}: {facts.get('model', '')} on {facts.get('data', '')}"
    before = facts.get("before")
    header = ("figure", "before", "after") if before else ("figure", "value")
    rows = [(name, *([before.get(name)] if before else []), value) for name, value in outcome.headline.items()]
    body = [f"<h1>{text(title)}</h1>", _table(header, rows)]
    if facts.get("left_out"):
        body.append(_section("left out, or noted", _table(("cause", "count"), list(facts["left_out"].items()))))
    for kind, found in examples.items():
        if found:
            shown = "".join(_example(example, source) for example in found)
            body.append(_section(kind, f'<div class="grid">{shown}</div>'))
    body += [_section(name, _table(columns, table)) for name, (columns, table) in outcome.tables.items()]
    known = {key: value for key, value in facts.items() if key not in ("before", "left_out", "headline")}
    body.append(_section("how", _table(("", ""), list(known.items()))))
    return page(title, body, style=_STYLE)


def _section(title: str, inner: str) -> str:
    return f"<article><h2>{text(title)}</h2>{inner}</article>"


def _table(header: Sequence[str], rows: Sequence[tuple]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, int | float) or value is None:
            return f'<td class="n">{_number(value)}</td>'
        return f"<td>{text(str(value))}</td>"

    head = "".join(f"<th>{text(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(cell(value) for value in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _example(example: Example, source: Any) -> str:
    lines = "".join(f"<p><b>{text(name)}</b> {text(said)}</p>" for name, said in example.lines)
    note = f'<p class="quiet">{text(example.key)}</p>'
    image = source.image(example.index)[0] if hasattr(source, "image") else source[example.index].image
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image.copy()
    if example.boxes:
        image = draw_boxes(image, [Located(label, box, None) for label, box in example.boxes])
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    return figure(f'<img src="{picture_uri(np.asarray(image))}" alt="{text(example.key)}">', lines + note)
