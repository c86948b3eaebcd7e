"""What a process of a run does when it is told to end."""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from train.exits import EXIT_INTERRUPTED, EXIT_SAVED, EXIT_TERMINATED, end_at_once

# A launcher and a scheduler may both pass on what was sent once.
_TWICE_S = 1.0
_LOOK_S = 1.0


def launched_by() -> list[int]:
    """Process ids of this process's launcher, torchrun or DeepSpeed's, and of what started the latter; else none."""
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process().parent()
        command = parent.cmdline() if parent is not None else []
        if "deepspeed.launcher.launch" in command:
            return [parent.pid, parent.ppid()]
        if any(Path(word).name == "torchrun" or word == "torch.distributed.run" for word in command[:4]):
            return [parent.pid]
    return []


class StopRequest:
    """SIGTERM, or the death of the launcher, noted for the end of the step.

    A second SIGTERM ends the process at once, as does a second Ctrl-C. Python runs its own handlers between two
    instructions, so never while a collective waits: a thread is told as well.
    """

    def __init__(self) -> None:
        self.asked = False
        self._first_s: float | None = None
        self._interrupts = 0
        self._finished = ""
        self._launcher = launched_by()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = signal.signal(signal.SIGTERM, self._note)
        self._told_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True, name="signals").start()

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True

    def _watch(self) -> None:
        while True:
            if not select.select([self._reader], [], [], _LOOK_S)[0]:
                # A launcher that is killed leaves its ranks running: nobody else would end them.
                self.asked = self.asked or launched_by() != self._launcher
            elif number := os.read(self._reader, 1):
                self._take(number[0], time.monotonic())
            else:
                break
        os.close(self._reader)

    def _take(self, number: int, now_s: float) -> None:
        if number == signal.SIGTERM:
            if self._finished:
                print(self._finished, file=sys.stderr, flush=True)
                end_at_once(EXIT_SAVED)
            if self._first_s is None:
                self._first_s = now_s
            elif now_s - self._first_s > _TWICE_S:
                end_at_once(EXIT_TERMINATED)
        elif number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                end_at_once(EXIT_INTERRUPTED)

    def finish(self, text: str) -> None:
        """From here on there is nothing to save: SIGTERM ends the process at once.

        Args:
            text: what it then says.
        """
        self._finished = text

    def close(self) -> None:
        """Gives the signals back."""
        signal.set_wakeup_fd(self._told_before)
        signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)
        os.close(self._writer)
