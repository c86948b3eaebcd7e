"""Statements about two images: NLVR2's files, and pairs of the built-in scenes.

scenes | nlvr2:FILE.json[l]?images=FOLDER

{"images": [LEFT, RIGHT], "sentence", "label": "True" | "False"} in a list or a line each; without "images" their names
are made of "identifier", SPLIT-SET-PAIR-SENTENCE, as in NLVR2's own files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from train.data import DataError, Source, open_dataset
from train.data.order import mix, uniforms
from train.data.sample import Skipped
from train.data.scene_shapes import COLOURS, SHAPES
from train.tasks.annotations import Pictures, complete, parse_annotations, read_json, require_some

KINDS = {"nlvr2": ("images",)}
_LABELS = {"true": True, "false": False}
_STATEMENTS = (
    "{x} is in the left picture and {y} is in the right picture",
    "the left picture shows {x}, the right picture shows {y}",
)
_BOTH = "both pictures show something {color}"


class Statement(NamedTuple):
    """A sentence about two images, and whether it is true of them."""

    sentence: str
    label: bool
    kind: str
    key: str


class StatementSource(Source):
    """A map-style data set of pairs of images with a statement."""

    def statement(self, index: int) -> Statement:
        """The statement, without touching the images."""
        raise NotImplementedError

    def images(self, index: int) -> tuple[Any, Any]:
        """Left and right image; raises BadSample where one cannot be used."""
        raise NotImplementedError

    def image(self, index: int) -> tuple[Any, str]:
        """Both images side by side and the statement's key, for a report."""
        from PIL import Image

        from sycoca.images import as_pil

        left, right = (as_pil(image) for image in self.images(index))
        whole = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), "white")
        whole.paste(left, (0, 0))
        whole.paste(right, (left.width, 0))
        return whole, self.statement(index).key


class SceneStatements(StatementSource):
    """Pairs of scenes; false statements name what is on the other side, or nowhere, so that both images are needed."""

    def __init__(self, scenes: Source) -> None:
        self.name, self.split, self.fresh, self.skipped = scenes.name, scenes.split, scenes.fresh, scenes.skipped
        self._scenes = scenes

    def __len__(self) -> int:
        return len(self._scenes) // 2

    def images(self, index: int) -> tuple[Any, Any]:
        return self._scenes.pair(2 * index, 0)[0], self._scenes.pair(2 * index + 1, 0)[0]

    def statement(self, index: int) -> Statement:
        draws = iter(uniforms(mix(index, *self.split.encode()), 16).tolist())
        left, right = ([(t.color, t.shape) for t in self._scenes.scene(2 * index + side).things] for side in (0, 1))
        only_left, only_right = [t for t in left if t not in right], [t for t in right if t not in left]
        label, kind = next(draws) < 0.5, next(draws)
        colors = [{color for color, _ in side} for side in (left, right)]
        shared, single = sorted(colors[0] & colors[1]), sorted(colors[0] ^ colors[1])
        if kind < 0.25 and (shared if label else single):
            said = _BOTH.format(color=_one(shared if label else single, next(draws)))
            return Statement(said, label, "both", str(index))
        x, y = _one(only_left or left, next(draws)), _one(only_right or right, next(draws))
        way = next(draws)
        if not label and way < 0.6 and only_left and only_right:
            x, y = y, x
        elif not label:
            there = {*left, *right}
            absent = _one([(c, s) for c in COLOURS for s in SHAPES if (c, s) not in there], next(draws))
            x, y = (absent, y) if way < 0.8 else (x, absent)
        names = [f"{'an' if color[0] in 'aeiou' else 'a'} {color} {shape}" for color, shape in (x, y)]
        return Statement(_one(_STATEMENTS, next(draws)).format(x=names[0], y=names[1]), label, "sides", str(index))


def _one(words: Any, draw: float) -> Any:
    return words[int(draw * len(words))]


class Nlvr2(StatementSource):
    """Statements of NLVR2.

    Args:
        path: a JSON list, or JSON lines.
        images: folder of the images; None for that of the file.

    Raises:
        DataError: not such a file, or nothing usable in it.
    """

    def __init__(self, path: Path, images: str | None, split: str) -> None:
        self.name, self.split, self.skipped = str(path), split, Skipped()
        self._pictures = Pictures(images, path)
        self._found: list[tuple[tuple[str, str], Statement]] = []
        fields = {"sentence": str, "label": (str, bool)}
        for number, entry in enumerate(complete(self._entries(path), fields, None, path, self.skipped)):
            where = str(entry.get("identifier", f"{path.name}:{number}"))
            label, names = _LABELS.get(str(entry["label"]).lower()), _names(entry)
            if label is None or not entry["sentence"].strip():
                self.skipped.row("label is neither True nor False, or sentence is empty", where)
            elif names is None:
                self.skipped.row("statement without two images", where)
            elif None in (found := tuple(self._pictures.find(name) for name in names)):
                self.skipped.sample(where, "image of a statement is absent")
            else:
                self._found.append((found, Statement(entry["sentence"].strip(), label, "statement", where)))
        require_some(len(self._found), "statement", path, self.skipped)

    def _entries(self, path: Path) -> list:
        if path.suffix == ".json":
            content = read_json(path)
            if not isinstance(content, list):
                raise DataError(f"data source '{path}': no list of statements")
            return content
        entries = []
        for line in filter(str.strip, path.read_text(encoding="utf-8", errors="replace").splitlines()):
            try:
                entries.append(json.loads(line))
            except (ValueError, RecursionError):
                self.skipped.row("line is damaged", f"{path.name}: {line[:20]}")
        return entries

    def __len__(self) -> int:
        return len(self._found)

    def statement(self, index: int) -> Statement:
        return self._found[index][1]

    def images(self, index: int) -> tuple[Any, Any]:
        left, right = self._found[index][0]
        return self._pictures.read(left), self._pictures.read(right)


def _names(entry: dict[str, Any]) -> tuple[str, str] | None:
    """Names of left and right image."""
    images = entry.get("images")
    if isinstance(images, list) and len(images) == 2 and all(isinstance(name, str) for name in images):
        return images[0], images[1]
    parts = str(entry.get("identifier", "")).split("-")
    return ("-".join([*parts[:3], "img0.png"]), "-".join([*parts[:3], "img1.png"])) if len(parts) == 4 else None


def open_statements(spec: str, split: str, *, image_size: int) -> StatementSource:
    """Opens statements, without importing torch; raises DataError."""
    named = parse_annotations(spec, KINDS)
    if named is not None:
        return Nlvr2(named.path, named.options.get("images"), split)
    if spec.partition("?")[0] == "scenes":
        return SceneStatements(open_dataset(spec, split, image_size=image_size))
    raise DataError(f"data source {spec!r} has no statements; give scenes or nlvr2:FILE?images=FOLDER")
