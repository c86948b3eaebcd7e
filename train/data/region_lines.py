"""JSON lines of images with captions, with phrases and boxes, or with both, as X-VLM publishes them.

    {"image_rpath": PATH | "binary": BASE64, "caption": TEXT | [TEXT], "width": W, "height": H,
     "elems": [{"caption": TEXT | [TEXT], "attributes": TEXT | [TEXT], "bb": [x, y, w, h], "caption_index": I}],
     "detections": [[x, y, w, h]]}

`image` is another name of `image_rpath`; everything but the image is optional, and a line needs a caption or a box.
Boxes are in pixels of an image of W x H, or of the stored one where the line does not say. A region is called
"ATTRIBUTE CAPTION" by each of its captions and attributes; `caption_index` is the caption in which its phrase occurs.
`detections` are boxes of a detector, among which a model chooses that has learned no boxes.

A file's line breaks are looked for once; `FILE.offsets.npy`, which converters leave, spares that.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.data.box_augment import Box
from train.data.image_list import VAL_SHARE, hash_share
from train.data.order import held_out_rows, mix_array
from train.data.paths import told
from train.data.region_elems import LARGEST_SIDE, phrases_of, read_box, read_elem, texts_of
from train.data.sample import BadSample, DataError, Region, Sample, Skipped, Source, caption_fault

_OPEN_FILES = 64
_LARGEST_LINE = 128 << 20
_CHUNK = 1 << 24
_IMAGE_KEYS = ("image_rpath", "image")


def offsets_file(path: Path) -> Path:
    """Where the line breaks of a file are kept."""
    return path.with_name(path.name + ".offsets.npy")


def scan_lines(path: Path) -> np.ndarray:
    """Where the lines of a file begin, and its size behind them: (n + 1,) int64; blank lines are passed over."""
    found, done = [np.zeros(1, dtype=np.int64)], 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            found.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == 10) + (done + 1))
            done += len(chunk)
    starts = np.concatenate(found)
    if starts[-1] != done:
        starts = np.append(starts, done)
    # What is shorter than {} and its break.
    return np.append(starts[:-1][np.diff(starts) > 2], done)


def line_offsets(path: Path) -> np.ndarray:
    """`scan_lines`, read from the file beside it where that still fits."""
    try:
        known = np.load(offsets_file(path))
        if known.dtype == np.int64 and known.ndim == 1 and known[-1] == path.stat().st_size:
            return known
    except (OSError, ValueError, EOFError, IndexError):
        pass
    return scan_lines(path)


class Lines(Source):
    """A map-style data set of JSON lines.

    Args:
        name: as the user wrote it.
        paths: the files.
        split: train, val or test; files whose names begin with a split are of that split.
        images: folder of the images; None for that of the files, or `images` beside them.
        val_share: share of the lines that validation gets where no file's name says its split.
        whole: without splits, all lines belong to the split asked for.

    Raises:
        DataError: nothing in this split.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        split: str,
        *,
        images: str | None = None,
        val_share: float = VAL_SHARE,
        whole: bool = False,
    ) -> None:
        self.name, self.split, self.skipped = name, split, Skipped()
        self._files: OrderedDict[int, Any] = OrderedDict()
        splits = {path: _split_of(path) for path in paths}
        # A single file is used for what it is asked for, whatever its name.
        has_splits = len(paths) > 1 and any(splits.values())
        self._paths = [path for path in paths if not has_splits or splits[path] == split]
        if not self._paths:
            found = ", ".join(sorted({said for said in splits.values() if said}))
            raise DataError(f"data source '{name}': no file of split {split!r}; it has: {found}")
        near = self._paths[0].parent
        self._folders = [Path(images).expanduser()] if images else [near, near / "images"]
        with told(name):
            self._offsets = [line_offsets(path) for path in self._paths]
        self._starts = np.concatenate([[0], np.cumsum([len(offsets) - 1 for offsets in self._offsets])])
        self._rows = None if has_splits or whole else self._part(val_share)
        if not len(self):
            raise DataError(f"data source '{name}': no line for split {split!r}")

    def _part(self, val_share: float) -> np.ndarray:
        """Rows of this split, by a hash of each line's file and number."""
        if self.split == "test":
            raise DataError(
                f"data source '{self.name}': it names no splits, so no split 'test'; there are train and val"
            )
        words = [
            mix_array(int(hash_share(path.name) * 2**63), np.arange(len(offsets) - 1))
            for path, offsets in zip(self._paths, self._offsets)
        ]
        return np.flatnonzero(held_out_rows(np.concatenate(words), val_share) == (self.split == "val"))

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._rows is None else len(self._rows)

    def _entry(self, index: int) -> tuple[dict, str]:
        """A line's object and where it stands."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        row = index if self._rows is None else int(self._rows[index])
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        inner = row - int(self._starts[number])
        begin, end = self._offsets[number][inner : inner + 2].tolist()
        where = f"{self._paths[number].name}#{inner}"
        if end - begin > _LARGEST_LINE:
            raise BadSample("line too large", where)
        try:
            # Reads name their place, so a descriptor may be shared with forked workers.
            if number not in self._files:
                self._files[number] = open(self._paths[number], "rb")  # noqa: SIM115
                if len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)[1].close()
            self._files.move_to_end(number)
            data = os.pread(self._files[number].fileno(), end - begin, begin)
        except OSError:
            raise BadSample("unreadable file of lines", where) from None
        try:
            entry = json.loads(data.decode("utf-8", "surrogateescape").removeprefix("\ufeff"))
        except (ValueError, RecursionError):
            raise BadSample("line is damaged", where) from None
        if not isinstance(entry, dict):
            raise BadSample("line is not an object", where)
        return entry, where

    def _captions(self, entry: dict, where: str) -> tuple[str, ...]:
        kept = []
        for place, text in enumerate(texts_of(entry.get("caption"))):
            if fault := caption_fault(text):
                self.skipped.part(f"{where} caption {place}", fault, where)
            else:
                kept.append(text.strip())
        return tuple(kept)

    def _stored(self, entry: dict, where: str) -> tuple[bytes, str]:
        """The image's bytes and what it is called."""
        name = next((entry[key] for key in _IMAGE_KEYS if isinstance(entry.get(key), str) and entry[key]), None)
        if isinstance(entry.get("binary"), str):
            try:
                return base64.b64decode(entry["binary"], validate=True), name or where
            except (binascii.Error, ValueError):
                raise BadSample("image is not base64", name or where) from None
        if name is None:
            raise BadSample("line without an image", where)
        if "\0" in name:
            raise BadSample("image name holds NUL", where)
        for folder in self._folders:
            try:
                return (folder / name).read_bytes(), name
            except FileNotFoundError:
                continue
            except OSError:
                raise BadSample("unreadable image", name) from None
        raise BadSample("missing image", name)

    def _image(self, entry: dict, where: str) -> tuple[Any, str]:
        # Imports torch; lines are opened without it.
        from sycoca.images import ImageError, decode

        data, key = self._stored(entry, where)
        if not data:
            raise BadSample("empty file", key)
        try:
            return decode(data), key
        except ImageError as error:
            raise BadSample(error.cause, key) from None

    def __getitem__(self, index: int) -> Sample:
        entry, where = self._entry(index)
        captions = self._captions(entry, where)
        image, key = self._image(entry, where)
        regions = None
        if isinstance(entry.get("elems"), list):
            regions = tuple(self._regions(entry, image.size, len(captions), where))
        if not captions and not regions:
            raise BadSample("line without a usable caption or box", key)
        detections = None
        if isinstance(entry.get("detections"), list):
            detections = tuple(self._detections(entry, image.size, where))
        return Sample(image, captions, key, regions, detections=detections)

    def file_of(self, index: int) -> str:
        """The file that a sample is of, without its ending, such as testA."""
        row = index if self._rows is None else int(self._rows[index])
        return self._paths[int(np.searchsorted(self._starts, row, side="right")) - 1].stem

    def _detections(self, entry: dict, stored: tuple[int, int], where: str) -> Iterable[Box]:
        for place, box in enumerate(entry["detections"]):
            try:
                yield read_box(box, *_size(entry, stored))
            except ValueError as error:
                self.skipped.part(f"{where} detection {place}", f"detection: {error}", where)

    def _regions(self, entry: dict, stored: tuple[int, int], captions: int, where: str) -> Iterable[Region]:
        for place, elem in enumerate(entry["elems"]):
            try:
                region = read_elem(elem, *_size(entry, stored))
            except ValueError as error:
                self.skipped.part(f"{where} elem {place}", str(error), where)
                continue
            yield region if region.caption < captions else region._replace(caption=-1)

    def region_count(self, index: int) -> int:
        elems = self._entry(index)[0].get("elems")
        return len(elems) if isinstance(elems, list) else 0

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions(*self._entry(index))

    def captioned(self, index: int):
        entry, where = self._entry(index)
        captions = self._captions(entry, where)
        if not captions:
            raise BadSample("line without a usable caption", where)
        image, key = self._image(entry, where)
        return image, captions, key

    def pair(self, index: int, pick: int):
        image, captions, key = self.captioned(index)
        return image, captions[pick % len(captions)], key

    def encoded(self, index: int) -> tuple[bytes, str]:
        data, key = self._stored(*self._entry(index))
        return data, Path(key).suffix.lstrip(".").lower() or "jpg"

    def texts(self, limit: int | None = None):
        for index in range(min(len(self), limit or len(self))):
            try:
                entry, where = self._entry(index)
            except BadSample:
                continue
            yield from self._captions(entry, where)
            for elem in entry["elems"] if isinstance(entry.get("elems"), list) else ():
                if phrases := phrases_of(elem):
                    yield phrases[0]


def _size(entry: dict, stored: tuple[int, int]) -> tuple[float, float]:
    """Width and height in pixels of what a line's boxes are measured in."""
    size = tuple(entry.get(name) for name in ("width", "height"))
    return size if all(type(side) in (int, float) and 0 < side < LARGEST_SIDE for side in size) else stored


def _split_of(path: Path) -> str | None:
    return next((split for split in ("train", "val", "test") if path.name.lower().startswith(split)), None)
