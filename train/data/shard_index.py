"""The index of a set of shards: their places, splits, counts, sizes and hashes, in one JSON file.

{"format": "sycoca-shards-1", "shards": [{"file", "split", "samples", "bytes", "sha256"}], ...}

`file` is a path relative to the index, a URL, or `pipe:` and a command; `split` may be null.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from train.data.fetch import FetchError, fetch
from train.data.paths import told
from train.data.sample import DataError

FORMAT = "sycoca-shards-1"
REMOTE = ("http://", "https://", "pipe:")
_FIELDS = {"file": str, "samples": int, "bytes": int, "sha256": str}


class Shard(NamedTuple):
    """One entry: `place` is a path or location that can be opened from here; counts may be None for one not indexed."""

    place: str
    split: str | None
    samples: int | None
    bytes: int | None
    sha256: str | None

    @property
    def remote(self) -> bool:
        """Whether it has to be fetched."""
        return self.place.startswith(REMOTE)

    @property
    def name(self) -> str:
        """Its last name, for messages."""
        return self.place.rpartition("/")[2] if not self.place.startswith("pipe:") else self.place


def _beside(location: str, file: str) -> str:
    if file.startswith(REMOTE) or os.path.isabs(file):
        return file
    if location.startswith(REMOTE):
        return location.rpartition("/")[0] + "/" + file
    return str(Path(location).parent / file)


def read_index(location: str) -> list[Shard]:
    """The shards that an index lists.

    Args:
        location: path or URL of the index.

    Raises:
        DataError: not there, or not an index.
    """
    try:
        if location.startswith(REMOTE):
            with tempfile.TemporaryDirectory() as folder:
                fetch(location, Path(folder) / "index.json")
                data = json.loads((Path(folder) / "index.json").read_bytes())
        else:
            with told(location):
                data = json.loads(Path(location).read_bytes())
    except FetchError as error:
        raise DataError(f"data source '{location}': {error}") from None
    except ValueError:
        raise DataError(f"data source '{location}': not a JSON file") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("shards"), list):
        raise DataError(f"data source '{location}': not an index of shards, which say format {FORMAT!r}")
    shards = []
    for number, entry in enumerate(data["shards"]):
        for name, kind in _FIELDS.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
                raise DataError(f"data source '{location}': shards[{number}].{name} is missing or no {kind.__name__}")
        place = _beside(location, entry["file"])
        shards.append(Shard(place, entry.get("split"), entry["samples"], entry["bytes"], entry["sha256"]))
    return shards


def write_index(path: Path, entries: list[dict[str, Any]], **more: Any) -> None:
    """Writes an index; the file is replaced at once."""
    data = {"format": FORMAT, **more, "shards": entries}
    write_json(path, data)


def write_json(path: Path, data: Any) -> None:
    """Writes a JSON file that is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
