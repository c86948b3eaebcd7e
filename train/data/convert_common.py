"""What the converters share: lists read as a stream, and files of lines written whole or not at all."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.data.paths import nearest_path, told
from train.data.region_elems import LARGEST_SIDE, read_elem
from train.data.region_lines import offsets_file
from train.data.sample import DataError, Skipped, caption_fault

_CHUNK = 1 << 20
# EXIF's tag of the orientation, and its values for pictures that lie on their side.
_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)


class Line(NamedTuple):
    """An image with what is known of it, as it is written: its split ("" where there is one file) and its object."""

    split: str
    entry: dict[str, Any]


def require_file(path: Path) -> Path:
    """The path; raises DataError where no file is there."""
    if not path.is_file():
        raise DataError(f"no file '{path}'{nearest_path(path)}")
    return path


def read_json(path: Path) -> Any:
    """The content of a JSON file; what is wrong with it is one line."""
    with told(path), open(require_file(path), encoding="utf-8-sig") as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise DataError(f"'{path}': not valid JSON: {error}") from None


def stream_list(path: Path) -> Iterator[Any]:
    """The elements of a JSON file that holds one list, one after the other, without the whole of it in memory.

    Raises:
        DataError: the file is not a list, or ends early.
    """
    decoder, buffer, begun = json.JSONDecoder(), "", False
    with told(path), open(require_file(path), encoding="utf-8-sig", errors="surrogateescape") as file:
        while True:
            chunk = file.read(_CHUNK)
            buffer += chunk
            if not begun:
                buffer = buffer.lstrip()
                if buffer and buffer[0] != "[":
                    raise DataError(f"'{path}': no list of images; it begins with {buffer[:20]!r}")
                begun, buffer = bool(buffer), buffer[1:]
            place = 0
            while True:
                while place < len(buffer) and buffer[place] in " \t\r\n,":
                    place += 1
                if place < len(buffer) and buffer[place] == "]":
                    return
                try:
                    value, end = decoder.raw_decode(buffer, place)
                except (ValueError, RecursionError):
                    break
                # A number at the end of what was read may go on.
                if end == len(buffer) and chunk:
                    break
                place = end
                yield value
            buffer = buffer[place:]
            if not chunk:
                raise DataError(f"'{path}': the list of images ends early, near {buffer[:40]!r}")


def fits(elem: dict[str, Any], width: float, height: float, skipped: Skipped, where: str) -> bool:
    """Whether a region can be used; counted where it cannot."""
    try:
        read_elem(elem, width, height)
    except ValueError as error:
        skipped.row(str(error), where)
        return False
    return True


def key_of(value: Any) -> int | str | None:
    """What annotations call an image or an object by, a whole number or a text; None for anything else."""
    if type(value) is float and value.is_integer():
        return int(value)
    return value if type(value) in (int, str) else None


def plain_texts(value: Any) -> Any:
    """A text, or the texts of a list; None for anything else."""
    if isinstance(value, list):
        return [text for text in value if isinstance(text, str)]
    return value if isinstance(value, str) else None


def file_named(value: Any) -> bool:
    """Whether a value may be the name of a file."""
    return isinstance(value, str) and caption_fault(value) is None


def image_size(entry: dict[str, Any]) -> tuple[float, float] | None:
    """Width and height in pixels that an annotation gives an image; None where it gives none."""
    width, height = entry.get("width"), entry.get("height")
    return (width, height) if all(type(s) in (int, float) and 0 < s < LARGEST_SIDE for s in (width, height)) else None


def stored_size(path: Path) -> tuple[int, int] | None:
    """Width and height of an image as it is decoded, upright, from its header; None where that cannot be read."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path) as image:
                sideways = image.getexif().get(_ORIENTATION) in _SIDEWAYS
                return image.size[::-1] if sideways else image.size
        except Exception:
            # What cannot be decoded is counted by whoever reads the lines, by cause.
            return None


def alike(stored: tuple[float, float], size: tuple[float, float]) -> bool:
    """Whether an image may be a copy of another size: of its proportions, but for the rounding of pixels."""
    across, down = stored[0] / size[0], stored[1] / size[1]
    return abs(across - down) <= 1 / size[0] + 1 / size[1]


class Found:
    """Looks whether images are there, of the proportions that their boxes were drawn in; counts those that are not.
    Without a folder all are taken to be.

    Args:
        folder: of the images, or None.
        skipped: the account.
    """

    def __init__(self, folder: Path | None, skipped: Skipped) -> None:
        if folder is not None and not folder.is_dir():
            raise DataError(f"--images: no folder '{folder}'{nearest_path(folder)}")
        self._folder, self._skipped = folder, skipped

    def __call__(self, size: tuple[float, float], *names: str) -> str | None:
        """The first of some names of an image of this width and height that is there."""
        if self._folder is None:
            return names[0]
        found = next((name for name in names if os.path.isfile(self._folder / name)), None)
        if found is None:
            self._skipped.sample(names[0], "image listed but absent")
            return None
        stored = stored_size(self._folder / found)
        if stored is not None and not alike(stored, size):
            self._skipped.sample(names[0], "image of other proportions than its annotations say")
            return None
        return found


class _File:
    """A file of lines that grows beside its place."""

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(path.name + ".part")
        self.file, self.offsets = open(self.part, "wb"), [0]  # noqa: SIM115

    def add(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        self.file.write(line)
        self.offsets.append(self.offsets[-1] + len(line))

    def finish(self) -> None:
        self.file.close()
        # Offsets that name another size than the file's are not used, so they may come first.
        with open(offsets_file(self.path), "wb") as file:
            np.save(file, np.array(self.offsets, dtype=np.int64))
        os.replace(self.part, self.path)

    def drop(self) -> None:
        self.file.close()
        self.part.unlink(missing_ok=True)


@contextmanager
def lines_writer(out: Path):
    """Writes lines into a file or, by split, into a folder; nothing is left in place of it where that fails.

    Args:
        out: FILE.jsonl, or a folder for FOLDER/SPLIT.jsonl.

    Yields:
        A function that takes a `Line`.
    """
    files: dict[str, _File] = {}
    single = out.suffix == ".jsonl"
    (out.parent if single else out).mkdir(parents=True, exist_ok=True)

    def write(line: Line) -> None:
        name = "" if single else line.split
        if name not in files:
            files[name] = _File(out if single else out / f"{line.split}.jsonl")
        files[name].add(line.entry)

    try:
        yield write
    except BaseException:
        for file in files.values():
            file.drop()
        raise
    for file in files.values():
        file.finish()
