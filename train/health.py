"""What ends or skips a step: requests to stop, gradients that are not finite, losses that leap, ranks that fall silent.

Ranks agree over a group of their own on the host, one step behind, so that no step waits for an answer.
"""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from train.exits import EXIT_LOST_RANK, LostRank, StopRun

MOST_SKIPPED_IN_A_ROW = 10
_SPIKE_WINDOW = 64
_BEAT_S = 0.5


class Place(NamedTuple):
    """Where a batch stands in the order of the data, and the keys of this rank's samples."""

    epoch: int
    index: int
    keys: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(self.keys[:3]) + (f" and {len(self.keys) - 3} more" if len(self.keys) > 3 else "")
        return f"batch {self.index} of epoch {self.epoch} ({shown})"


class StopRequest:
    """SIGTERM, noted for the end of the step."""

    def __init__(self) -> None:
        self.asked = False
        self._before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True

    def close(self) -> None:
        """Gives the signal back."""
        signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)


class Control:
    """Sums over the ranks of a few host numbers, without waiting: a call returns what all said in their call before.

    With one rank it returns what it is given.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._sent: tuple[torch.Tensor, Any] | None = None

    def sums(self, *mine: float) -> list[float]:
        """All ranks call it, once a step, with equally many numbers."""
        if self._group is None:
            return list(mine)
        before = self.settle() or [0.0] * len(mine)
        values = torch.tensor(mine, dtype=torch.float64)
        self._sent = values, dist.all_reduce(values, group=self._group, async_op=True)
        return before

    def settle(self) -> list[float] | None:
        """What all said last, waited for; None where that is known already."""
        if self._sent is None:
            return None
        (values, work), self._sent = self._sent, None
        work.wait()
        return values.tolist()


class Skips:
    """An account of the steps whose gradients were not finite. DeepSpeed leaves them out on all ranks alike."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._before = engine.skipped_steps
        # DeepSpeed's own count comes back with a checkpoint.
        self.total, self.in_a_row = engine.skipped_steps, 0

    def after(self, step: int, places: list[Place], losses: Sequence[torch.Tensor] = ()) -> str:
        """Looks at a finished optimizer step.

        Args:
            step: its number, from 1.
            places: the batches it was made of, of this rank.
            losses: of each of them.

        Returns:
            A line for people where the step was left out, else nothing.

        Raises:
            StopRun: the weights themselves are not finite, or too many steps in a row were left out.
        """
        skipped = self._engine.skipped_steps > self._before
        self._before = self._engine.skipped_steps
        if not skipped:
            self.in_a_row = 0
            # Without ZeRO nothing is left out: what was not finite is in the weights already.
            if self._engine.zero_optimization_stage() == 0 and (name := broken_weight(self._engine.module)):
                raise StopRun(f"step {step}: weight {name} is not finite; ZeRO stage 0 leaves no step out")
            return ""
        self.total += 1
        self.in_a_row += 1
        where = _culprits(places, losses)
        if name := broken_weight(self._engine.module):
            raise StopRun(f"step {step}: weight {name} is not finite; last batch: {where}")
        if self.in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise StopRun(f"step {step}: {self.in_a_row} steps in a row had non-finite gradients; last batch: {where}")
        return f"step {step} left out, its gradient is not finite: {where}"


def _culprits(places: Sequence[Place], losses: Sequence[torch.Tensor]) -> str:
    """The batches whose own loss is not finite, on whatever rank; all of them where none is. All ranks call it."""
    finite = [bool(torch.isfinite(loss).all()) for loss in losses] or [True] * len(places)
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, [(str(place), ok) for place, ok in zip(places, finite, strict=True)])
    named = [(f"rank {rank}, {place}", ok) for rank, part in enumerate(told) for place, ok in part]
    chosen = [text for text, ok in named if not ok] or [text for text, _ in named]
    return "; ".join(chosen[:4]) or "no keys"


def broken_weight(module: torch.nn.Module) -> str:
    """Name of a parameter that is not finite on any rank, empty if there is none. All ranks call it."""
    mine = ""
    for name, p in module.named_parameters():
        held = getattr(p, "ds_tensor", p)
        if held.numel() and not bool(torch.isfinite(held.detach()).all()):
            mine = name
            break
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    return next((name for name in told if name), "")


class Spikes:
    """Losses that leap above the median of those before.

    Args:
        factor: a loss above this many times the median counts as a leap; None notes none.
    """

    def __init__(self, factor: float | None) -> None:
        self._factor = factor
        self._recent: deque[float] = deque(maxlen=_SPIKE_WINDOW)

    def leaps(self, loss: float) -> bool:
        """Whether this loss leaps; it counts towards the median if it does not."""
        if self._factor is None or not math.isfinite(loss):
            return False
        full = len(self._recent) == _SPIKE_WINDOW
        leapt = full and loss > self._factor * median(self._recent)
        if not leapt:
            self._recent.append(loss)
        return leapt


class Heartbeat:
    """A thread that tells the others that this process runs, and ends it when another has fallen silent.

    A process that is stopped, or gone, beats no more; one that waits in a collective does.

    Args:
        timeout_s: silence of another rank after which this process ends.
    """

    def __init__(self, timeout_s: float) -> None:
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._timeout_s = timeout_s
        self._done = threading.Event()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._thread: threading.Thread | None = None
        if self._world > 1:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = dist.TCPStore(host, port, None, False, timedelta(seconds=max(5.0, timeout_s)))
            self._beats = self._unanswered = 0
            self._beat()
            dist.barrier()
            self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
            self._thread.start()
            threading.Thread(target=self._watch_store, daemon=True, name="heartbeat-watch").start()

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

    def _watch_store(self) -> None:
        # A store whose rank is stopped answers nothing, and its client waits for ever, whatever its timeout. Ticks are
        # counted, not time: a process that was itself stopped must not accuse another.
        while not self._done.wait(_BEAT_S):
            self._unanswered += 1
            if (silent_s := self._unanswered * _BEAT_S) > self._timeout_s:
                self._end(0, silent_s)

    def _silence(self, rank: int) -> float:
        value, now = self._store.get(f"beat/{rank}"), time.monotonic()
        known = self._seen.get(rank)
        if known is None or known[0] != value:
            self._seen[rank] = (value, now)
        return now - self._seen[rank][1]

    def _end(self, rank: int, silent_s: float) -> None:
        print(
            f"error: rank {self._rank}: rank {rank} has not answered for {silent_s:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_LOST_RANK)

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
            self._thread.join(2 * _BEAT_S)
