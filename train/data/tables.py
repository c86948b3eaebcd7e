"""Image-caption tables: TSV or CSV of image path and caption, one row a caption.

Rows of one image are its captions. Paths are relative to the table's folder or to `images/` in it. Without a column
`split` a fixed hash of the image's name holds out a small share for validation, two images where there are three,
and never all. Rows that cannot be used are counted by cause; images are opened only when their sample is asked for.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import zlib
from collections import deque
from hashlib import blake2b
from pathlib import Path

from train.data.sample import BadSample, DataError, Region, Sample, Skipped, Source
from train.data.spec import SPLITS, header_columns, is_tsv, quoted_nearest, told

VAL_SHARE = 0.02
LONGEST_CAPTION = 10_000
_REGION_FILES = ("regions.jsonl.gz", "regions.jsonl")
_IMAGE_FOLDER = "images"
_LOOKED_AT = 16
_RECORD_LINES = 64
_BOX_SLACK = 1e-3


def _rows(path: Path, skipped: Skipped):
    """(line number, fields) behind the header; bytes that are not UTF-8 become surrogates."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline=None if is_tsv(path) else "") as file:
        lines = enumerate(file, 1)
        # The header is the first line with anything on it.
        next((line for _, line in lines if line.strip()), None)
        if not is_tsv(path):
            yield from _csv_rows(lines, path, skipped)
            return
        for number, line in lines:
            if line.strip():
                yield number, line.rstrip("\n").split("\t")


def _csv_rows(lines, path: Path, skipped: Skipped):
    """Records of a CSV; a quote that does not end within a record's limits costs its own line alone."""
    ahead: deque[tuple[int, str]] = deque()
    before = csv.field_size_limit(1 << 30)
    try:
        while numbered := ahead.popleft() if ahead else next(lines, None):
            number, line = numbered
            if '"' not in line:
                if line.strip():
                    yield number, line.rstrip("\r\n").split(",")
                continue
            record = [numbered]
            row = _csv_record(record, ahead, lines)
            if row is None:
                skipped.row("row is not CSV", f"{path.name}:{number}")
                ahead.extendleft(reversed(record[1:]))
            else:
                yield number, row
    finally:
        csv.field_size_limit(before)


def _csv_record(record: list[tuple[int, str]], ahead: deque, lines) -> list[str] | None:
    """The fields of the record that starts with `record[0]`; takes the lines it needs; None where it is not CSV."""
    ended = True

    def taken():
        nonlocal ended
        yield record[0][1]
        while len(record) < _RECORD_LINES:
            numbered = ahead.popleft() if ahead else next(lines, None)
            if numbered is None:
                break
            record.append(numbered)
            yield numbered[1]
        ended = False

    try:
        row = next(csv.reader(taken()))
        # Over several lines a loose quote is most likely the next record's.
        if len(record) > 1:
            row = next(csv.reader((line for _, line in record), strict=True))
    except csv.Error:
        return None
    return row if ended else None


def _caption_fault(caption: str) -> str | None:
    if not caption or caption.isspace():
        return "empty caption"
    if len(caption) > LONGEST_CAPTION:
        return f"caption over {LONGEST_CAPTION} characters"
    if "\0" in caption:
        return "caption holds NUL"
    if not caption.isascii() and any("\udc80" <= c <= "\udcff" for c in caption):
        return "caption is not UTF-8"
    return None


def _hash_share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") / 2**64


def _held_out(images: list[str], share: float) -> set[str]:
    held = {image for image in images if _hash_share(image) < share}
    # Retrieval among the held-out images needs two.
    least = min(2, len(images) - 1)
    if len(held) < least:
        held = set(sorted(images, key=_hash_share)[:least])
    if len(images) > 1 and len(held) == len(images):
        held.remove(max(images, key=_hash_share))
    return held


def _region(item) -> Region:
    """A region as its file gives it; ValueError says in words that many share why it cannot be used."""
    if not isinstance(item, dict):
        raise ValueError("region is not an object")
    phrase, box, caption = item.get("phrase"), item.get("bbox"), item.get("caption", -1)
    if not isinstance(phrase, str) or not phrase.strip():
        raise ValueError("region without a phrase")
    if "\ufffd" in phrase:
        raise ValueError("phrase of a region is not UTF-8")
    if not isinstance(box, list) or len(box) != 4 or any(type(side) not in (int, float) for side in box):
        raise ValueError("box of a region is not four numbers")
    # A writer's rounding may put a side just outside.
    if not all(-_BOX_SLACK <= side <= 1 + _BOX_SLACK for side in box):
        raise ValueError("box of a region is outside its image")
    x0, y0, x1, y1 = (min(1.0, max(0.0, float(side))) for side in box)
    if x0 >= x1 or y0 >= y1:
        raise ValueError("box of a region has no area")
    if type(caption) is not int:
        raise ValueError("caption of a region is not a whole number")
    return Region(phrase, (x0, y0, x1, y1), caption)


def _nearest_split(unknown: list[str]) -> str:
    """The end of an error line about values of the column `split` that name none."""
    hints = {value: quoted_nearest(value.lower(), SPLITS) for value in unknown}
    value = next((value for value in unknown if hints[value]), unknown[0])
    return f"; unknown split {value!r}{hints[value] or '; there are train, val and test'}"


class Table(Source):
    """A TSV or CSV of images and captions.

    Args:
        path: the table.
        split: train, val or test.
        images: folder of the images; None for the table's own, or `images/` in it.
        val_share: share of the images that validation gets where the table has no column `split`.
        whole: without a column `split`, all images belong to the split asked for.

    Raises:
        DataError: no usable header, or no row of this split.
    """

    def __init__(
        self,
        path: Path,
        split: str,
        *,
        images: str | None = None,
        val_share: float = VAL_SHARE,
        whole: bool = False,
    ) -> None:
        self.name = str(path)
        self.split = split
        self.path = Path(path)
        self.skipped = Skipped()
        self._folders = [Path(images)] if images else [self.path.parent, self.path.parent / _IMAGE_FOLDER]
        self._regions: dict[str, list[Region]] | None = None
        self._images: list[str] = []
        self._captions: list[tuple[str, ...]] = []
        # Positions in the table of the captions kept, where some were left out: regions count as the table does.
        self._kept: dict[str, tuple[int, ...]] = {}
        with told(self.path):
            self._read(val_share, whole)
        # The folder that holds more of the first images is looked into first.
        first = self._images[:_LOOKED_AT]
        self._folders.sort(key=lambda folder: -sum(os.path.isfile(folder / name) for name in first))

    def _read(self, val_share: float, whole: bool) -> None:
        columns = header_columns(self.path)
        image_at, caption_at, split_at = columns["image"], columns["caption"], columns.get("split")
        width = max(columns.values()) + 1
        captions: dict[str, list[str | None]] = {}
        splits: dict[str, str] = {}
        unknown: dict[str, None] = {}
        for number, fields in _rows(self.path, self.skipped):
            where = f"{self.path.name}:{number}"
            if len(fields) < width:
                self.skipped.row("row lacks a column", where)
                continue
            image, caption = fields[image_at].strip(), fields[caption_at]
            if not image or "\0" in image:
                self.skipped.row("empty image name" if not image else "image name holds NUL", where)
                continue
            if split_at is not None:
                split = SPLITS.get(fields[split_at].strip().lower())
                if split is None:
                    self.skipped.row("unknown split", where)
                    unknown.setdefault(fields[split_at].strip())
                    continue
                if splits.setdefault(image, split) != split:
                    self.skipped.row("image is of another split already", where)
                    continue
                if split != self.split:
                    continue
            fault = _caption_fault(caption)
            if fault:
                self.skipped.row(fault, where)
            captions.setdefault(image, []).append(None if fault else caption.strip())
        if split_at is None and not whole:
            usable = [image for image, texts in captions.items() if any(text is not None for text in texts)]
            held = _held_out(usable, val_share)
            if self.split == "test":
                raise DataError(
                    f"data source '{self.path}': no column 'split', so no split 'test'; there are train and val"
                )
            captions = {image: c for image, c in captions.items() if (image in held) == (self.split == "val")}
        for image, texts in captions.items():
            kept = tuple(i for i, text in enumerate(texts) if text is not None)
            if not kept:
                self.skipped.sample(image, "image without a usable caption")
                continue
            self._images.append(image)
            self._captions.append(tuple(texts[i] for i in kept))
            if len(kept) != len(texts):
                self._kept[image] = kept
        if not self._images:
            found = f"; it has: {', '.join(sorted(set(splits.values())))}" if splits else ""
            if unknown:
                found += _nearest_split(list(unknown))
            why = f"; {self.skipped.line()}" if self.skipped else ""
            raise DataError(f"data source '{self.path}': no usable row for split {self.split!r}{found}{why}")

    def __len__(self) -> int:
        return len(self._images)

    def _decode(self, name: str):
        # Imports torch; a table is opened without it.
        from sycoca.images import ImageError, decode

        for folder in self._folders:
            try:
                return decode(folder / name)
            except ImageError as error:
                if error.cause != "missing image":
                    raise BadSample(error.cause, name) from None
        raise BadSample("missing image", name)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self._images):
            raise IndexError(f"sample {index} of {len(self._images)}")
        name = self._images[index]
        return Sample(
            self._decode(name), self._captions[index], name, self._regions_of(name, len(self._captions[index]))
        )

    def pair(self, index: int, pick: int):
        name, captions = self._images[index], self._captions[index]
        return self._decode(name), captions[pick % len(captions)], name

    def texts(self, limit: int | None = None):
        for captions in self._captions[:limit]:
            yield from captions

    def _regions_of(self, name: str, count: int) -> tuple[Region, ...] | None:
        if self._regions is None:
            self._regions = self._read_regions()
        if name not in self._regions:
            return None
        kept = self._kept.get(name, range(count))
        return tuple(
            region._replace(caption=kept.index(region.caption) if region.caption in kept else -1)
            for region in self._regions[name]
        )

    def _read_regions(self) -> dict[str, list[Region]]:
        """The boxes beside the table, for the images of this split; damage costs the boxes it hits, and is counted."""
        path = next((self.path.parent / n for n in _REGION_FILES if os.path.isfile(self.path.parent / n)), None)
        if path is None:
            return {}
        wanted, regions = set(self._images), {}
        reader = gzip.open if path.suffix == ".gz" else open
        number = 0
        try:
            with reader(path, "rt", encoding="utf-8", errors="replace") as file:
                for number, line in enumerate(file, 1):
                    where = f"{path.name}:{number}"
                    try:
                        entry = json.loads(line)
                        name, found = entry["image"], list(entry["regions"])
                        if name not in wanted:
                            continue
                    except (ValueError, KeyError, TypeError, RecursionError):
                        self.skipped.row("line of regions is damaged", where)
                        continue
                    regions[name] = []
                    for item in found:
                        try:
                            regions[name].append(_region(item))
                        except ValueError as error:
                            self.skipped.row(str(error), where)
        except (EOFError, OSError, zlib.error):
            self.skipped.row("file of regions is damaged", f"{path.name}:{number + 1}")
        return regions
