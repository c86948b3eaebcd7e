"""The header of a TSV or CSV: which column is the image, the caption, the split. Imports nothing heavy."""

import csv
from pathlib import Path

from train.data.paths import quoted_nearest, told
from train.data.sample import DataError

IMAGE_COLUMNS = ("image", "filepath", "path", "file")
CAPTION_COLUMNS = ("caption", "title", "text")
SPLIT_COLUMN = "split"


def is_tsv(path: Path) -> bool:
    """Whether fields are separated by tabs and quotes mean nothing, rather than as RFC 4180 says."""
    return path.suffix.lower() == ".tsv"


def split_rows(lines, path: Path):
    """Rows of fields, for a .tsv without quoting, for a .csv with it."""
    if is_tsv(path):
        return [line.rstrip("\r\n").split("\t") for line in lines]
    return list(csv.reader(lines))


def header_columns(path: Path) -> dict[str, int]:
    """Positions of the columns of a table.

    Args:
        path: a .tsv or .csv file.

    Returns:
        Position of `image`, of `caption`, and of `split` where there is one.

    Raises:
        DataError: unreadable, empty, or no such columns.
    """
    with told(path), open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        first = next((line for line in iter(lambda: file.readline(1 << 16), "") if line.strip()), "")
        has_rows = any(line.strip() for line in file)
    if not first:
        raise DataError(f"data source '{path}': empty file")
    names = [name.strip().lower() for name in split_rows([first], path)[0]]
    separator = "tabs" if is_tsv(path) else "commas"
    columns: dict[str, int] = {}
    for column, accepted in (("image", IMAGE_COLUMNS), ("caption", CAPTION_COLUMNS)):
        found = [name for name in accepted if name in names]
        if not found:
            suggestion = next((quoted_nearest(name, accepted) for name in names if quoted_nearest(name, accepted)), "")
            raise DataError(
                f"data source '{path}': no column of the header {names} is called "
                f"{' or '.join(accepted)}{suggestion if len(names) > 1 else f'; is it separated by {separator}?'}"
            )
        columns[column] = names.index(found[0])
    if SPLIT_COLUMN in names:
        columns["split"] = names.index(SPLIT_COLUMN)
    if not has_rows:
        raise DataError(f"data source '{path}': a header and no rows")
    return columns
