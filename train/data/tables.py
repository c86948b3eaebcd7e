"""Image-caption tables: TSV or CSV of image path and caption, one row a caption.

Rows of one image are its captions. Paths are relative to the table's folder or to `images/` in it.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from train.data.image_list import VAL_SHARE, ImageList, Listed
from train.data.sample import Skipped
from train.data.table_header import header_columns, is_tsv

_IMAGE_FOLDER = "images"
_RECORD_LINES = 64


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


class Table(ImageList):
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
        path = Path(path)
        folders = [Path(images)] if images else [path.parent, path.parent / _IMAGE_FOLDER]
        super().__init__(path, split, folders, val_share=val_share, whole=whole)

    def listed(self) -> Iterator[Listed]:
        columns = header_columns(self.path)
        image_at, caption_at, split_at = columns["image"], columns["caption"], columns.get("split")
        width = max(columns.values()) + 1
        for number, fields in _rows(self.path, self.skipped):
            where = f"{self.path.name}:{number}"
            if len(fields) < width:
                self.skipped.row("row lacks a column", where)
                continue
            yield Listed(where, fields[image_at], None if split_at is None else fields[split_at], fields[caption_at])
