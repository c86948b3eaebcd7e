"""Ranks that fall silent: every process tells the others that it runs, and ends when one of them does not."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from train.exits import EXIT_LOST_RANK, EXIT_STOPPED, LostRank, StopRun, end_at_once

_BEAT_S = 0.5


class Heartbeat:
    """Threads that tell the others that this process runs, and end it when another has fallen silent, or it itself.

    A process that is stopped, or gone, beats no more. One that waits in a collective does; one that works alone for
    too long, because a source or a disk does not answer, ends itself.

    Args:
        timeout_s: silence of another rank, or time alone, after which this process ends.
    """

    def __init__(self, timeout_s: float) -> None:
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._timeout_s = timeout_s
        # Those who wait for this rank have the same timeout; it has to speak before they look for whom to blame.
        self._patience_s = max(timeout_s / 2, timeout_s - 4 * _BEAT_S)
        self._done = threading.Event()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._ticks = self._unanswered = 0
        self._alone: tuple[str, int] | None = None
        self._thread: threading.Thread | None = None
        if self._world > 1:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = dist.TCPStore(host, port, None, False, timedelta(seconds=max(5.0, timeout_s)))
            self._beats = 0
            self._beat()
            dist.barrier()
            self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
            self._thread.start()
        threading.Thread(target=self._watch, daemon=True, name="heartbeat-watch").start()

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self._rank}", str(self._beats))

    def _run(self) -> None:
        # Each watches the next, so that the work does not grow with the number of ranks.
        neighbour = (self._rank + 1) % self._world
        while not self._done.wait(_BEAT_S):
            try:
                self._beat()
                silent_s = self._silence(neighbour)
                self._unanswered = 0
            except RuntimeError:
                # The store ends with rank 0; what waits for it in a collective will say so.
                return
            if silent_s > self._timeout_s:
                self._end(neighbour, silent_s)

    def _watch(self) -> None:
        # Ticks are counted, not time: a process that was itself stopped must accuse nobody.
        while not self._done.wait(_BEAT_S):
            self._ticks += 1
            alone = self._alone
            if alone is not None and (alone_s := (self._ticks - alone[1]) * _BEAT_S) > self._patience_s:
                self._tell(f"{alone[0]} for {alone_s:.0f} s")
                end_at_once(EXIT_STOPPED)
            if self._world == 1:
                continue
            # A store whose rank is stopped answers nothing, and its client waits for ever, whatever its timeout.
            self._unanswered += 1
            if (silent_s := self._unanswered * _BEAT_S) > self._timeout_s:
                self._end(0, silent_s)

    @contextlib.contextmanager
    def alone(self, fault: str) -> Iterator[None]:
        """Marks what this rank does without the others; past the timeout the process ends.

        Args:
            fault: what it then says, to be followed by a time.
        """
        self._alone = fault, self._ticks
        try:
            yield
        finally:
            self._alone = None

    def _silence(self, rank: int) -> float:
        value, now = self._store.get(f"beat/{rank}"), time.monotonic()
        known = self._seen.get(rank)
        if known is None or known[0] != value:
            self._seen[rank] = (value, now)
        return now - self._seen[rank][1]

    def _end(self, rank: int, silent_s: float) -> None:
        self._tell(f"rank {rank} has not answered for {silent_s:.0f} s")
        end_at_once(EXIT_LOST_RANK)

    def _tell(self, text: str) -> None:
        print(f"error: rank {self._rank}: {text}", file=sys.stderr, flush=True)

    def lost(self) -> list[int]:
        """Ranks that do not beat, after looking twice; rank 0 alone where the store is gone."""
        if self._thread is None:
            return []
        others = [rank for rank in range(self._world) if rank != self._rank]
        try:
            before = {rank: self._store.get(f"beat/{rank}") for rank in others}
            time.sleep(3 * _BEAT_S)
            return [rank for rank in others if self._store.get(f"beat/{rank}") == before[rank]]
        except RuntimeError:
            return [0]

    @contextlib.contextmanager
    def guard(self):
        """What fails inside because other ranks are gone becomes a LostRank that names them."""
        try:
            yield
        except StopRun:
            raise
        except RuntimeError as error:
            if lost := self.lost():
                named = ", ".join(map(str, lost))
                raise LostRank(f"rank {named} does not answer: {str(error).splitlines()[0]}") from error
            raise

    def close(self) -> None:
        """Ends the watch. All ranks call it when none needs the others any more."""
        if self._thread is not None:
            dist.barrier()
        self._done.set()
        if self._thread is not None:
            self._thread.join(2 * _BEAT_S)
