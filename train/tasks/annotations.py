"""Annotation files of the standard data sets: which one a specification names, its entries, and where its images lie.

SPEC = KIND ":" FILE ["?" KEY "=" VALUE {"&" KEY "=" VALUE}]

Every fault of an entry is counted by cause and named; a file without a single usable entry is an error. Nothing here
imports torch.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sycoca.config import nearest
from train.data.sample import BadSample, DataError, Skipped


class Named(NamedTuple):
    """A file of annotations, and the options that its specification gives."""

    kind: str
    path: Path
    options: dict[str, str]


def parse_annotations(spec: str, kinds: dict[str, tuple[str, ...]]) -> Named | None:
    """The file that a specification names.

    Args:
        spec: the specification.
        kinds: options of each kind of annotations; the first of them is required.

    Returns:
        The file, or None where the specification names another kind of source.

    Raises:
        DataError: no such file, an unknown option, or one that is missing.
    """
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in kinds:
        return None
    source, _, tail = rest.partition("?")
    path, options = Path(source).expanduser(), {}
    for item in filter(None, tail.split("&")):
        name, equals, value = item.partition("=")
        if name not in kinds[kind] or not equals:
            known = nearest(name, kinds[kind]) or f"; known: {', '.join(kinds[kind])}"
            raise DataError(f"data source {spec!r}: unknown option {name!r}{known}")
        options[name] = value
    if not path.exists():
        beside = [str(p) for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise DataError(f"data source not found: '{path}'{nearest(str(path), beside)}")
    for name, value in options.items():
        if not Path(value).expanduser().exists():
            raise DataError(f"data source {spec!r}: {name}={value}: no such file or folder")
    return Named(kind, path, options)


def read_json(path: Path) -> Any:
    """The content of a JSON file; what is wrong with it is one line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"data source '{path}': {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"data source '{path}': not valid JSON: {error}") from None


def listed(content: Any, name: str, path: Path) -> list:
    """The list called `name` in a file's object."""
    found = content.get(name) if isinstance(content, dict) else None
    if not isinstance(found, list):
        has = f"; it has {', '.join(map(str, list(content)[:6]))}" if isinstance(content, dict) else ""
        raise DataError(f"data source '{path}': no list '{name}'{has}")
    return found


def complete(
    entries: list, fields: dict[str, type | tuple[type, ...]], unique: str | None, path: Path, skipped: Skipped
) -> Iterator[dict]:
    """The entries that have every field and a key of their own; the others are counted.

    Args:
        entries: of a file.
        fields: name and type of what each needs.
        unique: the field that no two share; None where any may repeat.
        path: for the account.
        skipped: the account.
    """
    seen = set()
    for number, entry in enumerate(entries):
        where = f"{path.name}[{number}]"
        if not isinstance(entry, dict):
            skipped.row("entry is not an object", where)
            continue
        fault = next((f"field {name} is missing" for name in fields if name not in entry), None) or next(
            (f"field {name} is of another type" for name, kind in fields.items() if not isinstance(entry[name], kind)),
            None,
        )
        if fault:
            skipped.row(fault, where)
            continue
        if unique is not None:
            if entry[unique] in seen:
                skipped.row(f"duplicate {unique}", f"{where} {entry[unique]}")
                continue
            seen.add(entry[unique])
        yield entry


class Pictures:
    """Images of a folder, by the names that annotations give them.

    Args:
        folder: where they lie; None for the folder of the annotations.
        path: the annotations.
    """

    def __init__(self, folder: str | None, path: Path) -> None:
        self.folder = Path(folder).expanduser() if folder else path.parent
        try:
            self._present = set(os.listdir(self.folder))
        except OSError as error:
            raise DataError(f"data source '{path}': images '{self.folder}': {error.strerror}") from None

    def find(self, *names: str) -> str | None:
        """The first of some names that is there."""
        return next((n for n in names if n in self._present or ("/" in n and (self.folder / n).is_file())), None)

    def find_coco(self, image_id: int, subtype: str = "") -> str | None:
        """The file of COCO's image of this number."""
        plain = f"{image_id:012d}.jpg"
        # Questions of test-dev2015 are about images of test2015.
        named = [f"COCO_{part}_{plain}" for part in (subtype, subtype.replace("-dev", ""))]
        return self.find(plain, *named, f"{image_id}.jpg", f"{image_id}.png")

    def read(self, name: str):
        """An image; raises BadSample where it cannot be used."""
        from sycoca.images import ImageError, decode

        try:
            return decode(self.folder / name)
        except ImageError as error:
            raise BadSample(error.cause, name) from None


def require_some(count: int, what: str, path: Path, skipped: Skipped) -> None:
    """Raises DataError where nothing of a file can be used."""
    if not count:
        raise DataError(f"data source '{path}': no usable {what}; {skipped.line() or 'it holds none'}")
