"""What ends or skips a step: gradients that are not finite, losses that leap.

Ranks agree over a group of their own on the host, one step behind, so that no step waits for an answer.
"""

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from train.exits import StopRun

MOST_SKIPPED_IN_A_ROW = 10
_SPIKE_WINDOW = 64


class Place(NamedTuple):
    """Where a batch stands in the order of the data, and the keys of this rank's samples."""

    epoch: int
    index: int
    keys: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(self.keys[:3]) + (f" and {len(self.keys) - 3} more" if len(self.keys) > 3 else "")
        return f"batch {self.index} of epoch {self.epoch} ({shown})"


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
        # Rewards have losses of either sign, which no factor measures.
        leapt = full and 0 < self._factor * median(self._recent) < loss
        if not leapt:
            self._recent.append(loss)
        return leapt
