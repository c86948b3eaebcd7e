"""Batches made ahead by workers, and an account of what making them left out.

A maker is asked for the batch of a ticket (epoch, index) and depends on nothing else, so that workers change who does
the work, never the result.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from train.data.sample import DataError, Skipped, Source

_PREFETCH = 3
# Global batches between asking a far source for samples and using them, at most.
_AHEAD = 32
Fault = tuple[str, str, int]


class Made(NamedTuple):
    """A batch, or why there is none, and what making it found unusable: (key, cause, index) of samples, and parts."""

    batch: Any
    faults: list[Fault]
    parts: dict[str, tuple[str, str]]


class Maker(Dataset):
    """Makes the batch of a (epoch, index); holds no state that a batch could depend on."""

    def __init__(self, source: Source, seed: int) -> None:
        self.source, self.seed = source, seed
        self._told = len(source.skipped.parts)

    def __getitem__(self, ticket: tuple[int, int]) -> Made:
        faults: list[Fault] = []
        # Raised in a worker, an error would come out as the text of its traceback.
        try:
            batch = self.make(*ticket, faults)
        except DataError as error:
            batch = error
        parts = self.source.skipped.parts_from(self._told)
        self._told += len(parts)
        return Made(batch, faults, parts)

    def make(self, epoch: int, index: int, faults: list[Fault]) -> Any:
        """The batch; samples that cannot be used are added to `faults`. Raises DataError where there is none."""
        raise NotImplementedError

    def look_ahead(self, epoch: int, positions: np.ndarray, step: int) -> None:
        """Tells a far source what will be wanted; `step` is how many positions of an epoch a global batch has."""
        if not self.source.far:
            return
        # Whole batches, because a rank reads its own places of each.
        ahead = min(_AHEAD, max(1, -(-self.source.reach // step)))
        worker = get_worker_info()
        self.source.spans((ahead + (worker.num_workers if worker else 1)) * step)
        epochs, later = np.divmod(positions + ahead * step, len(self.source))
        if epochs.max(initial=0) < 2:
            for turn in (0, 1):
                self.source.prefetch(self.source.order(epoch + turn, later[epochs == turn], self.seed))


class Tickets(Sampler):
    """(epoch, index) from a starting place on."""

    def __init__(self, epoch: int, start: int, per_epoch: int, epochs: int | None) -> None:
        self.epoch, self.start, self.per_epoch, self.epochs = epoch, start, per_epoch, epochs

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, index = self.epoch, self.start
        while self.epochs is None or epoch < self.epochs:
            if index < self.per_epoch:
                yield epoch, index
                index += 1
            else:
                epoch, index = epoch + 1, 0


def _as_is(made):
    return made


def _end_with_parent() -> None:
    """On Linux, lets the kernel kill this process when the one that started it dies."""
    death_signal = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(death_signal, int(signal.SIGKILL))


def _tell_of_others(kind: type, error: BaseException, trace: Any) -> None:
    """What a worker's threads run into when its rank ends before it has taken the last batch is no news."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _start_worker(_: int) -> None:
    # A worker that outlives its rank holds the rank's connections open, and the other ranks would wait for it.
    _end_with_parent()
    sys.excepthook = _tell_of_others
    # Signals are the main process's to handle; a fork of a process that used threads must not use them again.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


class Loader:
    """An iterator of batches; `skipped` accounts for what was left out so far.

    Args:
        maker: of the batches.
        tickets: which, in order.
        workers: processes that make batches ahead; 0 makes each when it is asked for.
        pin_memory: page-locked tensors; None where CUDA is.
    """

    def __init__(self, maker: Maker, tickets: Tickets, workers: int, pin_memory: bool | None) -> None:
        self.skipped = Skipped()
        self.batches_per_epoch = tickets.per_epoch
        with warnings.catch_warnings():
            # More workers than cores, forking beside threads: chosen, and safe with workers that run one thread.
            warnings.simplefilter("ignore")
            loader = DataLoader(
                maker,
                batch_size=None,
                sampler=tickets,
                num_workers=workers,
                collate_fn=_as_is,
                pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
                worker_init_fn=_start_worker,
                prefetch_factor=_PREFETCH if workers else None,
                persistent_workers=False,
                # A generator of its own keeps the process's random state out of the loader's hands.
                generator=torch.Generator(),
            )
            self._made = iter(loader)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Any:
        if self._made is None:
            raise StopIteration
        made = next(self._made)
        for key, cause, index in made.faults:
            self.skipped.sample(key, cause, index)
        self.skipped.add_parts(made.parts)
        if isinstance(made.batch, DataError):
            raise made.batch
        return made.batch

    def close(self) -> None:
        """Ends the workers."""
        made, self._made = self._made, None
        shutdown = getattr(made, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()
