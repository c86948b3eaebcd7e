"""The grammar of data specifications, and the check of one before anything heavy is imported.

SPEC   = SOURCE ["?" KEY "=" VALUE {"&" KEY "=" VALUE}]
SOURCE = "scenes" | PATH.tsv | PATH.csv | FOLDER with captions.tsv
MIX    = SPEC "=" WEIGHT {"," SPEC "=" WEIGHT}            reserved
"""

import csv
import difflib
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.data.sample import DataError

TABLE_SUFFIXES = (".tsv", ".csv")
FOLDER_TABLE = "captions.tsv"
IMAGE_COLUMNS = ("image", "filepath", "path", "file")
CAPTION_COLUMNS = ("caption", "title", "text")
SPLIT_COLUMN = "split"
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}

# Splits of generated data lie this far apart.
_MOST = 1 << 40
_MIXTURE = re.compile(r"[^,]+=\d*\.?\d+(,[^,]+=\d*\.?\d+)+")


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= _MOST:
        raise ValueError(text)
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 < value < 1.0:
        raise ValueError(text)
    return value


def _flag(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


_OPTIONS = {
    "scenes": {
        "count": (_count, "a whole number of at least 1"),
        "fresh": (_flag, "true or false"),
        "seed": (int, "a whole number"),
    },
    "table": {"images": (str, "a folder"), "val_share": (_share, "a number between 0 and 1")},
}


@dataclass(frozen=True)
class SourceSpec:
    """One parsed source: `kind` is scenes or table, `path` the file of a table."""

    kind: str
    text: str
    path: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)


def quoted_nearest(word: str, known) -> str:
    """The end of an error line about a word that is not known: the one closest to it."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _nearest_path(path: Path) -> str:
    """The end of an error line about a path that is not there: what is, closest to it."""
    fixed = Path(path.anchor) if path.is_absolute() else Path()
    parts = path.parts[1:] if path.is_absolute() else path.parts
    for position, part in enumerate(parts):
        following = fixed / part
        if following.exists():
            fixed = following
            continue
        try:
            names = [] if not fixed.is_dir() else os.listdir(fixed)
        except OSError:
            names = []
        close = difflib.get_close_matches(part, names, n=1, cutoff=0.6)
        if not close:
            # The last name alone may be wrong in its ending only.
            close = [n for n in names if Path(n).stem == Path(part).stem][:1]
        if close:
            whole = fixed.joinpath(close[0], *parts[position + 1 :])
            return f"; did you mean '{whole if whole.exists() else fixed / close[0]}'?"
        return f"; the nearest existing path is '{fixed}'"
    return ""


@contextmanager
def told(path):
    """Turns what the system refuses while a source is opened into one line that names the path."""
    try:
        yield
    except OSError as error:
        raise DataError(f"data source '{error.filename or path}': {error.strerror or error}") from None


def _parse_options(kind: str, text: str, spec: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for item in text.split("&"):
        name, equals, value = item.partition("=")
        known = _OPTIONS[kind]
        if not equals:
            raise DataError(f"data source {spec!r}: option {item!r} is not KEY=VALUE")
        if name not in known:
            suggestion = quoted_nearest(name, known) or f"; known: {', '.join(known)}"
            raise DataError(f"data source {spec!r}: unknown option {name!r}{suggestion}")
        convert, meaning = known[name]
        try:
            options[name] = convert(value)
        except (ValueError, KeyError):
            raise DataError(f"data source {spec!r}: option {name}={value} is not {meaning}") from None
    return options


def parse_spec(spec: str) -> SourceSpec:
    """Reads a specification.

    Args:
        spec: a string of the grammar above.

    Returns:
        The source it names, its path made out but nothing opened.

    Raises:
        DataError: not of the grammar, no such kind of source, no such path, or none that may be looked at.
    """
    if not spec or not spec.strip():
        raise DataError("data source: empty; give 'scenes', a .tsv or .csv file, or a folder that holds captions.tsv")
    with told(spec.strip()):
        return _parsed(spec.strip())


def _parsed(spec: str) -> SourceSpec:
    source, mark, tail = spec.partition("?")
    if mark and not Path(source).exists() and Path(spec).exists():
        source, mark, tail = spec, "", ""
    if source == "scenes":
        return SourceSpec("scenes", spec, options=_parse_options("scenes", tail, spec) if mark else {})
    path = Path(source).expanduser()
    if not path.exists():
        if _MIXTURE.fullmatch(spec):
            raise DataError(f"data source {spec!r}: mixtures of sources are not supported; give one source")
        scenes = difflib.get_close_matches(source.lower(), ["scenes"], cutoff=0.7)
        hint = "; did you mean 'scenes'?" if scenes else _nearest_path(path)
        raise DataError(f"data source not found: {source!r}{hint}")
    if path.is_dir():
        if not (path / FOLDER_TABLE).is_file():
            tables = sorted(p.name for p in path.iterdir() if p.suffix in TABLE_SUFFIXES)
            hint = f"; did you mean '{path / tables[0]}'?" if tables else f"; a folder needs a {FOLDER_TABLE}"
            state = "empty folder" if not any(path.iterdir()) else f"no {FOLDER_TABLE} in folder"
            raise DataError(f"data source: {state} '{path}'{hint}")
        path = path / FOLDER_TABLE
    elif path.suffix.lower() not in TABLE_SUFFIXES:
        raise DataError(f"data source: '{path}' is of no known kind; give 'scenes', a .tsv or .csv file, or a folder")
    return SourceSpec("table", spec, path, _parse_options("table", tail, spec) if mark else {})


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


def check_source(spec: str) -> SourceSpec:
    """Checks that a specification names a source that can be opened, at the cost of reading a header.

    Args:
        spec: a string of the grammar above.

    Returns:
        The parsed specification.

    Raises:
        DataError: one line that names the path and the nearest right one.
    """
    parsed = parse_spec(spec)
    if parsed.kind == "table":
        header_columns(parsed.path)
        images = parsed.options.get("images")
        with told(images):
            if images is not None and not Path(images).is_dir():
                raise DataError(f"data source: no folder '{images}'{_nearest_path(Path(images))}")
    return parsed
