"""Images with one label each: folders by class, tar files, and single objects of the built-in scenes.

SPEC = scenes | FOLDER | FILE.tar | FILES-{000..009}.tar

A folder is one of `train.data.classes`. A tar file holds `CLASS/NAME.jpg`, or WebDataset's `NAME.jpg` beside
`NAME.cls`, which gives the index or the name of the class.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

from sycoca.config import nearest
from train.data import DataError, Source, open_dataset
from train.data.braces import expand
from train.data.classes import by_class, split_folders
from train.data.paths import nearest_path
from train.data.sample import BadSample, Skipped
from train.data.scene_words import PLACE_WORDS, place
from train.data.tars import IMAGE, LABEL, LARGEST_IMAGE, LARGEST_TEXT, scan
from train.tasks.annotations import require_some
from train.tasks.class_names import SCENE_PLACES, are_numbers

# What is judged on may be called either way.
_INSTEAD = {"val": "test", "test": "val"}
_WORDNET = re.compile(r"n\d{8}")


class LabelSource(Source):
    """A map-style data set of images with a label each; `classes` are its names, by label."""

    classes: tuple[str, ...]

    def label(self, index: int) -> int:
        """The label of an image, without touching it."""
        raise NotImplementedError

    def image(self, index: int) -> tuple[Any, str]:
        """An image and its key; raises BadSample where it cannot be used."""
        raise NotImplementedError

    def pair(self, index: int, pick: int) -> tuple[Any, str, str]:
        """Image, label in digits, and key."""
        image, key = self.image(index)
        return image, str(self.label(index)), key


class SceneObjects(LabelSource):
    """One object of a scene alone on its ground; its class is the place where it stands."""

    classes = SCENE_PLACES

    def __init__(self, scenes: Source, image_size: int) -> None:
        self.name, self.split, self.fresh, self.skipped = scenes.name, scenes.split, scenes.fresh, scenes.skipped
        self._scenes, self._size = scenes, image_size

    def __len__(self) -> int:
        return len(self._scenes)

    def label(self, index: int) -> int:
        return self.classes.index(PLACE_WORDS[place(self._scenes.scene(index).things[0])][0])

    def image(self, index: int) -> tuple[Any, str]:
        from train.data.scenes import draw_scene

        scene = self._scenes.scene(index)
        alone = scene._replace(figures=scene.figures[:1])
        return draw_scene(alone, self._size), f"scenes/{self.split}/{index}"


class ListedLabels(LabelSource):
    """Images listed with the names of their classes."""

    def __init__(self, name: str, split: str, skipped: Skipped, found: list[tuple[Any, str]]) -> None:
        self.name, self.split, self.skipped = name, split, skipped
        require_some(len(found), "labelled image", Path(name), skipped)
        names = sorted({label for _, label in found}, key=lambda n: (not n.isdigit(), int(n) if n.isdigit() else 0, n))
        self.classes = tuple(names)
        place = {label: i for i, label in enumerate(names)}
        self._found = [(where, place[label]) for where, label in found]

    def __len__(self) -> int:
        return len(self._found)

    def label(self, index: int) -> int:
        return self._found[index][1]

    def renamed(self, classes: tuple[str, ...]) -> None:
        """Takes the labels to be those of other classes: by name, or by number where its own names are numbers."""
        known = {name: i for i, name in enumerate(classes)}
        if (
            len(self.classes) == len(classes)
            and all(map(_WORDNET.fullmatch, self.classes))
            and not known.keys() & {*self.classes}
        ):
            known = {name: i for i, name in enumerate(self.classes)}
            if os.environ.get("RANK", "0") == "0":
                told = f"'{self.name}': {len(classes)} WordNet numbers stand for the classes in sorted order"
                print(f"{told}, {self.classes[0]} for {classes[0]!r}", file=sys.stderr, flush=True)
        numbered = not are_numbers(classes) and all(
            name.isdigit() and int(name) < len(classes) for name in self.classes
        )
        kept = []
        for where, label in self._found:
            name = self.classes[label]
            if name in known or numbered:
                kept.append((where, known.get(name, int(name) if numbered else 0)))
            else:
                self.skipped.row("class is not among the class names", f"{name}{nearest(name, classes)}")
        self._found, self.classes = kept, classes
        require_some(len(kept), "labelled image", Path(self.name), self.skipped)

    def image(self, index: int) -> tuple[Any, str]:
        from sycoca.images import ImageError, decode

        where = self._found[index][0]
        key = where if isinstance(where, str) else where[3]
        try:
            return decode(where if isinstance(where, str) else _member(where)), key
        except ImageError as error:
            raise BadSample(error.cause, key) from None


def _member(where: tuple[str, int, int, str]) -> bytes:
    path, offset, size, name = where
    if size > LARGEST_IMAGE:
        raise BadSample("member too large", name)
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def has_split(path: Path, split: str) -> bool:
    """Whether a folder holds a folder for a split."""
    return path.is_dir() and _split_of(path, split) is not None


def _split_of(path: Path, split: str) -> str | None:
    """The split of a folder that is taken for the one asked for; None where it has none."""
    there = set(split_folders(path).values())
    return next((name for name in (split, _INSTEAD.get(split)) if name in there), None)


def _folder(path: Path, split: str, skipped: Skipped) -> list[tuple[Any, str]]:
    taken, there = _split_of(path, split), sorted(set(split_folders(path).values()))
    if there and taken is None:
        raise DataError(f"data source '{path}': no split {split!r}; it has {', '.join(there)}")
    return [(str(path / image), name) for image, name, _ in by_class(path, skipped, taken)]


def _tar(path: Path, skipped: Skipped) -> list[tuple[Any, str]]:
    listing = scan(path)
    for cause, where in listing.faults:
        skipped.row(cause, where)
    found: list[tuple[Any, str]] = []
    with open(path, "rb") as file:
        for key, spans, ending in zip(listing.keys, listing.spans.tolist(), listing.endings, strict=True):
            (offset, size), (label_at, label_size) = spans[IMAGE], spans[LABEL]
            label = os.path.basename(os.path.dirname(key))
            if 0 < label_size <= LARGEST_TEXT:
                file.seek(label_at)
                label = file.read(label_size).decode("utf-8", "replace").strip() or label
            name = f"{key}.{ending}"
            if offset < 0:
                skipped.sample(key, "class without an image")
            elif label:
                found.append(((str(path), offset, size, name), label))
            else:
                skipped.sample(name, "image without a class")
    return found


def open_labels(spec: str, split: str, *, image_size: int, classes: tuple[str, ...] | None = None) -> LabelSource:
    """Opens labelled images, without importing torch.

    Args:
        spec: in the grammar above.
        split: train, val or test.
        image_size: side of generated pictures in pixels.
        classes: names of the classes, by label; None for the source's own.

    Raises:
        DataError: one line that names what is wrong.
    """
    if spec.partition("?")[0] == "scenes":
        return SceneObjects(open_dataset(spec, split, image_size=image_size), image_size)
    skipped, found = Skipped(), []
    for path in (Path(name).expanduser() for name in expand(spec)):
        if not path.exists():
            raise DataError(f"data source not found: '{path}'{nearest_path(path)}")
        if path.is_dir():
            found += _folder(path, split, skipped)
        elif path.suffix == ".tar":
            found += _tar(path, skipped)
        else:
            raise DataError(f"data source '{path}' has no labels; give scenes, a folder by class, or a .tar file")
    source = ListedLabels(spec, split, skipped, found)
    if classes is not None:
        source.renamed(classes)
    return source
