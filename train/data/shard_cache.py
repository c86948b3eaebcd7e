"""Fetched shards on this machine's disk, shared by the processes that read them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import queue
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from train.data.fetch import FetchError, fetch
from train.data.shard_index import Shard

# After this long a shard that did not come is asked for again.
_AGAIN_S = 600.0


class ShardCache:
    """Brings shards here when they are read.

    Args:
        folder: keeps all of them, for later runs too; None takes a temporary folder that keeps the last `keep`.
        keep: how many shards a temporary folder holds, at least.
    """

    def __init__(self, folder: str | None, keep: int) -> None:
        self._keep = None if folder else keep
        self._folder = Path(folder) if folder else Path(tempfile.mkdtemp(prefix="shards-"))
        if folder:
            self._folder.mkdir(parents=True, exist_ok=True)
        else:
            weakref.finalize(self, _remove, self._folder, os.getpid())
        self._lost: dict[str, tuple[float, str]] = {}
        self._ahead: tuple[int, queue.SimpleQueue] | None = None
        self._asked: set[str] = set()

    def _file(self, shard: Shard) -> Path:
        return self._folder / f"{hashlib.sha256(shard.place.encode()).hexdigest()[:24]}.tar"

    def path(self, shard: Shard) -> Path:
        """The shard's file here, fetched if need be.

        Raises:
            FetchError: it does not come.
        """
        file = self._file(shard)
        if file.exists():
            return file
        if (lost := self._lost.get(shard.place)) and time.monotonic() < lost[0]:
            raise FetchError(lost[1])
        with open(file.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                try:
                    fetch(shard.place, file, size=shard.bytes, sha256=shard.sha256)
                except FetchError as error:
                    self._lost[shard.place] = (time.monotonic() + _AGAIN_S, str(error))
                    raise
                self._make_room(file)
        return file

    def _make_room(self, newest: Path) -> None:
        if self._keep is None:
            return
        files = sorted((f for f in self._folder.glob("*.tar") if f != newest), key=_age)
        # Whoever reads one of them still holds it open.
        for file in files[: max(0, len(files) + 1 - self._keep)]:
            file.unlink(missing_ok=True)

    def room(self, keep: int) -> None:
        """Lets a temporary folder hold at least so many shards."""
        if self._keep is not None:
            self._keep = max(self._keep, keep)

    def ahead(self, shard: Shard) -> None:
        """Begins to fetch a shard in the background."""
        if self._ahead is None or self._ahead[0] != os.getpid():
            # A thread does not survive the fork of a worker.
            self._asked = set()
            self._ahead = os.getpid(), queue.SimpleQueue()
            threading.Thread(target=_fetch_all, args=(self._ahead[1], self._asked, self.path), daemon=True).start()
        if shard.place not in self._asked and not self._wanted(self._file(shard)):
            self._asked.add(shard.place)
            self._ahead[1].put(shard)

    def _wanted(self, file: Path) -> bool:
        """Whether a file is here; a temporary one then is the last to go."""
        if self._keep is None:
            return file.exists()
        with contextlib.suppress(FileNotFoundError):
            os.utime(file)
            return True
        return False


def _fetch_all(waiting: queue.SimpleQueue, asked: set[str], path: Callable[[Shard], Path]) -> None:
    while True:
        shard = waiting.get()
        # Whoever reads a shard that does not come is told.
        with contextlib.suppress(FetchError, OSError):
            path(shard)
        asked.discard(shard.place)


def _age(file: Path) -> float:
    # Another process may have deleted it.
    with contextlib.suppress(FileNotFoundError):
        return file.stat().st_mtime
    return 0.0


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
