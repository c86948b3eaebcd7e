"""Files that survive a crash, and a manifest by which damage is seen.

    write beside -> fsync the file -> rename -> fsync the folder

A manifest lists every file of a folder with its size and SHA-256, and carries a digest of itself. Nothing here imports
torch.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

MANIFEST = "manifest.json"
_CHUNK = 1 << 22
_THREADS = 4


class FileRecord(NamedTuple):
    """Size in bytes and SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


class Fault(NamedTuple):
    """A file of a folder that is not what the manifest says, and why."""

    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


def sync(path: Path) -> None:
    """Hands a file's or a folder's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Replaces a file by another, so that a crash leaves the one or the other whole.

    Yields:
        Where to write the other one.

    Raises:
        OSError: names `path`; the file is as it was.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        yield beside
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def write_atomically(path: Path, text: str) -> None:
    """Replaces a text file, as `replaced` does."""
    with replaced(path) as beside:
        beside.write_text(text, encoding="utf-8")


def record(path: Path) -> FileRecord:
    """Size and digest of a file as it reads back."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
            size += len(block)
    return FileRecord(size, digest.hexdigest())


def write_manifest(folder: Path, facts: dict[str, Any], files: dict[str, FileRecord]) -> None:
    """Writes the manifest of a folder.

    Args:
        folder: where it goes.
        facts: plain data to come back with it.
        files: name within the folder to record; every file of the folder but the manifest.
    """
    body = {**facts, "files": {name: list(files[name]) for name in sorted(files)}}
    write_atomically(folder / MANIFEST, _signed(body))


def _signed(body: dict[str, Any]) -> str:
    plain = json.dumps(body, sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(plain.encode()).hexdigest(), "body": body}, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The facts of a folder's manifest, `files` among them.

    Raises:
        ValueError: there is none, or it is not as it was written.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        body = json.loads(text)["body"]
    except FileNotFoundError:
        raise ValueError("missing") from None
    except OSError as error:
        raise ValueError(error.strerror) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("unreadable") from None
    if not isinstance(body, dict) or "files" not in body or text != _signed(body):
        raise ValueError("its own digest differs")
    return body


def faults(folder: Path) -> list[Fault]:
    """What is wrong with a folder: files missing, of another size, of other content, or unknown to the manifest."""
    try:
        listed = read_manifest(folder)["files"]
    except ValueError as error:
        return [Fault(MANIFEST, str(error))]
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    found = [Fault(name, "not in the manifest") for name in sorted(present - {MANIFEST} - listed.keys())]

    def check(item: tuple[str, list]) -> Fault | None:
        name, (size, digest) = item
        try:
            held = (folder / name).stat().st_size
            if held != size:
                return Fault(name, f"{held} bytes, {size} were written")
            return None if record(folder / name).sha256 == digest else Fault(name, "content differs from its digest")
        except OSError as error:
            return Fault(name, "missing" if isinstance(error, FileNotFoundError) else error.strerror)

    with ThreadPoolExecutor(_THREADS) as pool:
        return found + [fault for fault in pool.map(check, sorted(listed.items())) if fault]
