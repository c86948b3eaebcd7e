"""Rows of features in a file that grows batch by batch and survives an interruption.

`OUT.part` holds the rows behind a NumPy header, `OUT.journal` a line per batch: which inputs it took, which were left
out. A batch counts once its line is whole; rows without a line are cut off when the work goes on.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sycoca.commands.inputs import UserError

_HEADER_BYTES = 128
_CHUNK_ROWS = 65536


class Rows:
    """Features that are being written.

    Args:
        path: of the finished file, `.npy` or `.parquet`.
        identity: plain data that an interrupted file must share to be continued.
        width: E, values of a row.
        dtype: of a value, as NumPy names it.

    Raises:
        UserError: an interrupted file is there that is not of this identity.
    """

    def __init__(self, path: Path, identity: dict[str, Any], width: int, dtype: str) -> None:
        self.path, self._width, self._dtype = path, width, np.dtype(dtype)
        self._part, self._journal = beside(path, ".part"), beside(path, ".journal")
        self.records: list[dict[str, str]] = []
        self.skipped: list[tuple[str, str]] = []
        self._identity = identity | {"width": width, "dtype": dtype}
        if self._journal.exists():
            self._take_up()
        else:
            self._part.write_bytes(_header(0, width, self._dtype))
            self._write_journal([self._identity], "w")
        self._data = self._part.open("r+b")
        self._data.truncate(_HEADER_BYTES + len(self.records) * self._row_bytes)
        self._data.seek(0, os.SEEK_END)

    @property
    def _row_bytes(self) -> int:
        return self._width * self._dtype.itemsize

    def add(self, features: np.ndarray, records: Sequence[dict[str, str]], skipped: Sequence[tuple[str, str]]) -> None:
        """Appends rows (n, E), what they are of, and what was left out since the last batch."""
        self._data.write(np.ascontiguousarray(features, dtype=self._dtype).tobytes())
        self._data.flush()
        os.fsync(self._data.fileno())
        self._write_journal([{"records": list(records), "skipped": list(skipped)}], "a")
        self.records += records
        self.skipped += skipped

    def finish(self) -> list[Path]:
        """Turns what was written into the finished file; returns the files that are there now."""
        self._data.seek(0)
        self._data.write(_header(len(self.records), self._width, self._dtype))
        self._data.flush()
        os.fsync(self._data.fileno())
        self._data.close()
        if self.path.suffix == ".parquet":
            _write_parquet(self.path, self._part, self.records)
            written = [self.path]
        else:
            keys = keys_path(self.path)
            _replace(keys, "".join(_line(record) for record in self.records))
            self._part.replace(self.path)
            written = [self.path, keys]
        self._journal.unlink()
        self._part.unlink(missing_ok=True)
        return written

    def close(self) -> None:
        """Leaves the interrupted file as it is."""
        self._data.close()

    def _take_up(self) -> None:
        lines = _whole_lines(self._journal)
        identity = next(lines, None)
        if identity != self._identity:
            names = [name for name in self._identity if (identity or {}).get(name) != self._identity[name]]
            raise UserError(
                f"--out {self.path}: {self._part.name} was begun with another {names[0]}; "
                "finish it with the command that began it, or start again with --restart"
            )
        kept = [identity]
        held = max(0, self._part.stat().st_size - _HEADER_BYTES) // self._row_bytes if self._part.exists() else 0
        for entry in lines:
            if len(self.records) + len(entry["records"]) > held:
                break
            kept.append(entry)
            self.records += entry["records"]
            self.skipped += [(source, cause) for source, cause in entry["skipped"]]
        if held == 0:
            self._part.write_bytes(_header(0, self._width, self._dtype))
        self._write_journal(kept, "w")

    def _write_journal(self, entries: Sequence[dict[str, Any]], mode: str) -> None:
        text = "".join(_line(entry) for entry in entries)
        if mode == "w":
            _replace(self._journal, text)
            return
        with open(self._journal, "a", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def beside(path: Path, suffix: str) -> Path:
    """The file of unfinished work beside a finished one."""
    return path.with_name(path.name + suffix)


def keys_path(path: Path) -> Path:
    """The file that says, line by line, what the rows of a `.npy` are of."""
    return path.with_name(path.stem + ".keys.jsonl")


def read_rows(path: Path) -> tuple[np.ndarray, list[dict[str, str]]]:
    """Features (N, E), mapped into memory, and what they are of.

    Raises:
        UserError: no such file, or its keys are missing or do not fit.
    """
    keys = keys_path(path)
    try:
        features = np.load(path, mmap_mode="r", allow_pickle=False)
        records = [json.loads(line) for line in keys.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: {error}") from None
    if features.ndim != 2 or len(features) != len(records):
        raise UserError(f"{path}: holds {features.shape}, and {keys.name} names {len(records)} rows")
    return features, records


def _header(rows: int, width: int, dtype: np.dtype) -> bytes:
    # NumPy's format 1.0: magic, version, length of the text, text padded with blanks.
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
    return b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little") + f"{text:<117}\n".encode()


def _line(entry: Any) -> str:
    # ASCII escapes keep file names that are no valid text.
    return json.dumps(entry) + "\n"


def _replace(path: Path, text: str) -> None:
    temporary = beside(path, ".tmp")
    with open(temporary, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="ascii", errors="replace") as file:
        for line in file:
            try:
                if not line.endswith("\n"):
                    return
                yield json.loads(line)
            except ValueError:
                return


def _write_parquet(path: Path, part: Path, records: list[dict[str, str]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = np.load(part, mmap_mode="r")
    names = list(records[0])
    value = pa.list_(pa.from_numpy_dtype(features.dtype), features.shape[1])
    schema = pa.schema([*((name, pa.string()) for name in names), ("embedding", value)])
    temporary = beside(path, ".tmp")
    with pq.ParquetWriter(temporary, schema) as writer:
        for start in range(0, len(features), _CHUNK_ROWS):
            part_of = slice(start, start + _CHUNK_ROWS)
            flat = pa.array(np.asarray(features[part_of]).reshape(-1))
            columns = [pa.array([record[name] for record in records[part_of]], pa.string()) for name in names]
            columns.append(pa.FixedSizeListArray.from_arrays(flat, features.shape[1]))
            writer.write_table(pa.table(columns, schema=schema))
    temporary.replace(path)
