"""Fetched shards on this machine's disk, shared by the processes that read them."""

from __future__ import annotations

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
        keep: how many shards a temporary folder holds.
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
        files = sorted((f for f in self._folder.glob("*.tar") if f != newest), key=lambda f: f.stat().st_mtime)
        # Whoever reads one of them still holds it open.
        for file in files[: max(0, len(files) + 1 - self._keep)]:
            file.unlink(missing_ok=True)

    def ahead(self, shard: Shard) -> None:
        """Begins to fetch a shard in the background."""
        if shard.place in self._asked:
            return
        if self._ahead is None or self._ahead[0] != os.getpid():
            # A thread does not survive the fork of a worker.
            self._asked = set()
            self._ahead = os.getpid(), queue.SimpleQueue()
            threading.Thread(target=_fetch_all, args=(self._ahead[1], self.path), daemon=True).start()
        if len(self._asked) > 1000:
            self._asked.clear()
        self._asked.add(shard.place)
        self._ahead[1].put(shard)


def _fetch_all(waiting: queue.SimpleQueue, path: Callable[[Shard], Path]) -> None:
    while True:
        try:
            path(waiting.get())
        except (FetchError, OSError):
            # Whoever reads the shard is told.
            continue


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
