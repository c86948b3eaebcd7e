"""The grammar of data specifications, and the check of one before anything heavy is imported.

SPEC   = SOURCE ["?" KEY "=" VALUE {"&" KEY "=" VALUE}]
SOURCE = "scenes"                                    rendered scenes, no files
       | PATH.tsv | PATH.csv | FOLDER                a table, or a folder with captions.tsv
       | ["coco:"] PATH.json | FOLDER                COCO captions, or a folder with annotations/captions_train*.json
       | ["karpathy:"] PATH.json                     Karpathy's splits
       | ["shards:"] SHARDS | FOLDER                 WebDataset shards, or a folder with the index.json of some
       | ["lines:"] LINES | FOLDER                   JSON lines of images, captions and boxes, or a folder of them
       | ["classes:"] FOLDER                         folders of images by class
SHARDS = PATH.tar | "http(s)://" URL.tar | "pipe:" COMMAND, with {000..099} and {a,b} for several
LINES  = PATH.jsonl                                  likewise; `train.data.region_lines` says what a line holds
MIX    = SPEC "=" WEIGHT {"," SPEC "=" WEIGHT}

Without its prefix a source is known by its ending and its content.
"""

import difflib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.data.braces import expand
from train.data.classes import has_classes
from train.data.coco import annotation_files, check_images, looks_like_karpathy
from train.data.paths import nearest_path, quoted_nearest, told
from train.data.sample import DataError
from train.data.table_header import header_columns

LINES_SUFFIX = ".jsonl"
TABLE_SUFFIXES = (".tsv", ".csv")
FOLDER_TABLE = "captions.tsv"
INDEX = "index.json"
REGIONS_BESIDE = "regions.jsonl"
KINDS = ("scenes", "table", "coco", "karpathy", "shards", "lines", "classes")
REMOTE = ("http://", "https://", "pipe:")
_PREFIX = re.compile(r"(table|coco|karpathy|shards|lines|classes):(.*)", re.DOTALL)
_GIVE = "'scenes', a .tsv, .csv, .json or .jsonl file, .tar shards, or a folder that holds one of them"

# Splits of generated data lie this far apart.
_MOST = 1 << 40
_WEIGHTED = re.compile(r"(.+)=(\d*\.?\d+(?:[eE][-+]?\d+)?)", re.DOTALL)


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


def _template(text: str) -> str:
    if "{}" not in text:
        raise ValueError(text)
    return text


_IMAGES = {"images": (str, "a folder")}
_VAL_SHARE = {"val_share": (_share, "a number between 0 and 1")}
_OPTIONS: dict[str, dict[str, tuple[Any, str]]] = {
    "scenes": {
        "count": (_count, "a whole number of at least 1"),
        "fresh": (_flag, "true or false"),
        "seed": (int, "a whole number"),
    },
    "table": {**_IMAGES, **_VAL_SHARE},
    "coco": {**_IMAGES, **_VAL_SHARE, "year": (str, "a year")},
    "karpathy": _IMAGES,
    "shards": {
        **_VAL_SHARE,
        "index": (str, "a file"),
        "cache": (str, "a folder"),
        "window": (_count, "a whole number of at least 1"),
    },
    "lines": {**_IMAGES, **_VAL_SHARE},
    "classes": {**_VAL_SHARE, "template": (_template, "a caption with {} in it")},
}


@dataclass(frozen=True)
class SourceSpec:
    """One parsed source.

    `path` is the file or folder; `shards` the names of shards or of files of lines, given one by one; `parts` and
    `weights` belong to a mixture.
    """

    kind: str
    text: str
    path: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)
    shards: tuple[str, ...] = ()
    parts: tuple["SourceSpec", ...] = ()
    weights: tuple[float, ...] = ()


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
        raise DataError(f"data source: empty; give {_GIVE}")
    with told(spec.strip()):
        return _parsed(spec.strip())


def _mixture(spec: str) -> list[tuple[str, float]]:
    """The parts of a mixture; empty where it is none."""
    parts: list[tuple[str, float]] = []
    begun = ""
    # A comma may also stand inside braces or a command.
    for piece in re.split(r",(?![^{}]*\})", spec):
        begun += ("," if begun else "") + piece
        if match := _WEIGHTED.fullmatch(begun):
            parts.append((match[1], float(match[2])))
            begun = ""
    return parts if len(parts) > 1 and not begun else []


def _parsed(spec: str) -> SourceSpec:
    if not os.path.exists(spec) and (mixed := _mixture(spec)):
        if wrong := [part for part, weight in mixed if not weight > 0]:
            raise DataError(f"data source {spec!r}: the weight of {wrong[0]!r} is not above 0")
        parts = tuple(_parsed(part) for part, _ in mixed)
        return SourceSpec("mixture", spec, parts=parts, weights=tuple(weight for _, weight in mixed))
    match = None if os.path.exists(spec) else _PREFIX.fullmatch(spec)
    asked, rest = (match[1], match[2]) if match else (None, spec)
    if rest.startswith(REMOTE):
        return _remote(spec, rest)
    source, mark, tail = rest.partition("?")
    if mark and not Path(source).exists() and Path(rest).exists():
        source, mark, tail = rest, "", ""
    if source == "scenes" and asked is None:
        return SourceSpec("scenes", spec, options=_parse_options("scenes", tail, spec) if mark else {})
    path = Path(source).expanduser()
    if not path.exists() and "{" in source:
        return _listed_files(spec, source, tail)
    kind, path = _kind(path, asked, source, spec)
    listed = (kind == "shards" and path.suffix == ".tar") or (kind == "lines" and not path.is_dir())
    shards = (str(path),) if listed else ()
    return SourceSpec(kind, spec, path, _parse_options(kind, tail, spec) if mark else {}, shards)


def _remote(spec: str, rest: str) -> SourceSpec:
    source, _, tail = rest.rpartition("?")
    # An address or a command may have a question mark of its own.
    is_options = source and all(item.partition("=")[0] in _OPTIONS["shards"] for item in tail.split("&"))
    source, options = (source, _parse_options("shards", tail, spec)) if is_options else (rest, {})
    return SourceSpec("shards", spec, options=options, shards=tuple(expand(source)))


def _listed_files(spec: str, source: str, tail: str) -> SourceSpec:
    names = [str(Path(name).expanduser()) for name in expand(source)]
    kind, ending = ("lines", LINES_SUFFIX) if names[0].endswith(LINES_SUFFIX) else ("shards", ".tar")
    options = _parse_options(kind, tail, spec) if tail else {}
    for name in names:
        if not name.endswith(ending):
            raise DataError(f"data source {spec!r}: {kind} end in {ending}, '{name}' does not")
        if not Path(name).is_file():
            raise DataError(f"data source {spec!r}: no file '{name}'{nearest_path(Path(name))}")
    return SourceSpec(kind, spec, Path(names[0]).parent, options, tuple(names))


def _kind(path: Path, asked: str | None, source: str, spec: str) -> tuple[str, Path]:
    """Kind and file of a path that should be there."""
    if not path.exists():
        scenes = difflib.get_close_matches(source.lower(), ["scenes"], cutoff=0.7)
        hint = "; did you mean 'scenes'?" if scenes and asked is None else nearest_path(path)
        if (prefix := source.partition(":"))[1] and not path.is_absolute():
            hint = quoted_nearest(prefix[0], KINDS) or hint
        raise DataError(f"data source not found: {source!r}{hint}")
    if path.is_dir():
        kind, path = _folder_kind(path, asked)
    else:
        suffix = path.suffix.lower()
        kind = {".tar": "shards", LINES_SUFFIX: "lines"}.get(suffix, "table" if suffix in TABLE_SUFFIXES else None)
        if suffix == ".json":
            kind = "shards" if path.name == INDEX or asked == "shards" else None
            kind = kind or asked or ("karpathy" if looks_like_karpathy(path) else "coco")
        if path.name.lower().endswith((".tar.gz", ".tgz", ".tar.zst")):
            raise DataError(
                f"data source: '{path}' is compressed, which forbids reading at any place; unpack it to .tar"
            )
    if kind is None:
        raise DataError(f"data source: '{path}' is of no known kind; give {_GIVE}")
    if asked is not None and asked != kind:
        raise DataError(f"data source {spec!r}: '{path}' is no source of kind {asked!r}; it looks like {kind!r}")
    return kind, path


def _folder_kind(path: Path, asked: str | None) -> tuple[str, Path]:
    if asked in (None, "table") and (path / FOLDER_TABLE).is_file():
        return "table", path / FOLDER_TABLE
    if asked in (None, "shards") and (path / INDEX).is_file():
        return "shards", path / INDEX
    if asked in (None, "coco") and annotation_files(path):
        return "coco", path
    if asked in (None, "lines") and lines_of(path):
        return "lines", path
    if asked in (None, "classes") and has_classes(path):
        return "classes", path
    if asked is not None:
        raise DataError(f"data source: folder '{path}' holds no source of kind {asked!r}")
    names = sorted(path.iterdir())
    tables = [p.name for p in names if p.suffix in TABLE_SUFFIXES]
    tars = [p.name for p in names if p.suffix == ".tar"]
    jsons = [p.name for p in names if p.suffix == ".json"]
    if not names:
        raise DataError(f"data source: empty folder '{path}'; a folder needs a {FOLDER_TABLE}")
    if tars:
        raise DataError(f"data source: no {INDEX} in folder '{path}'; did you mean '{path / brace(tars)}'?")
    near = tables or jsons
    hint = f"; did you mean '{path / near[0]}'?" if near else f"; a folder needs a {FOLDER_TABLE}"
    raise DataError(f"data source: no {FOLDER_TABLE} in folder '{path}'{hint}")


def lines_of(folder: Path) -> list[Path]:
    """The files of JSON lines in a folder, but for the boxes that lie beside a list."""
    return sorted(p for p in folder.glob(f"*{LINES_SUFFIX}") if p.name != REGIONS_BESIDE)


def brace(names: list[str]) -> str:
    """A pattern for numbered names, such as a-{000..009}.tar; else the first of them."""
    match = [re.fullmatch(r"(.*?)(\d+)(\.tar)", name) for name in names]
    if len(names) > 1 and all(match) and len({(m[1], len(m[2])) for m in match}) == 1:
        return f"{match[0][1]}{{{match[0][2]}..{match[-1][2]}}}.tar"
    return names[0]


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
    for part in parsed.parts or (parsed,):
        if part.kind == "table":
            header_columns(part.path)
        if part.kind in ("table", "coco", "karpathy", "lines"):
            check_images(part.path, part.options.get("images"))
    return parsed
