"""What the converters share: lists read as a stream, and files of lines written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.data.paths import nearest_path, told
from train.data.region_lines import offsets_file, read_elem
from train.data.sample import DataError, Skipped

_CHUNK = 1 << 20


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
    with told(path), open(require_file(path), encoding="utf-8-sig", errors="replace") as file:
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


def number(value: Any) -> bool:
    """Whether JSON gave a number."""
    return type(value) in (int, float)


def image_size(entry: dict[str, Any]) -> tuple[float, float] | None:
    """Width and height in pixels that an annotation gives an image; None where it gives none."""
    width, height = entry.get("width"), entry.get("height")
    return (width, height) if number(width) and number(height) and width > 0 and height > 0 else None


class Found:
    """Looks whether images are there; counts those that are not. Without a folder all are taken to be.

    Args:
        folder: of the images, or None.
        skipped: the account.
    """

    def __init__(self, folder: Path | None, skipped: Skipped) -> None:
        if folder is not None and not folder.is_dir():
            raise DataError(f"--images: no folder '{folder}'{nearest_path(folder)}")
        self._folder, self._skipped = folder, skipped

    def __call__(self, *names: str) -> str | None:
        """The first of some names of an image that is there."""
        if self._folder is None:
            return names[0]
        found = next((name for name in names if (self._folder / name).is_file()), None)
        if found is None:
            self._skipped.sample(names[0], "image listed but absent")
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
