"""The runs of a study as processes, a core each: those that are done are skipped, those that were stopped go on.

    <out>/runs/<digest>/       the run's folder, as `train/pretrain.py` leaves it
    <out>/runs/<digest>.txt    what it printed
    <out>/results/<digest>.json

A run that takes too long, or a study that is told to stop, asks its runs to save and end. A study that is killed takes
its runs along.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from train.exits import EXIT_SAVED
from train.run_folder import checkpoint_steps, is_held
from train.study_plan import Plan, PlannedRun
from train.study_results import ROOT, keep_result, read_result

_LOOK_S = 0.1
# To save and to end; a run answers at the end of a step.
_PATIENCE_S = 60.0
_PR_SET_PDEATHSIG = 1


class Ended(NamedTuple):
    """How a run ended; `reason` is None where its result is kept, `wall_s` the seconds of this start."""

    run: PlannedRun
    reason: str | None
    wall_s: float


class _Active:
    """A run under way."""

    def __init__(self, run: PlannedRun, command: list[str], folder: Path, core: int | None, resumes: bool) -> None:
        self.run, self.folder, self.core, self.resumes = run, folder, core, resumes
        self.started_s, self.asked_s, self.why = time.monotonic(), None, ""
        with output_of(folder).open("a" if resumes else "w", encoding="utf-8") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=_environment(),
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=lambda: _begin(core),
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started_s

    def ask(self, why: str) -> None:
        """Asks the run to save and end."""
        if self.asked_s is None:
            self.asked_s, self.why = time.monotonic(), why
            self.process.send_signal(signal.SIGTERM)
        elif time.monotonic() - self.asked_s > _PATIENCE_S:
            self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def folder_of(out: Path, run: PlannedRun) -> Path:
    """The folder of a run, which plans share."""
    return out / "runs" / run.key


def output_of(folder: Path) -> Path:
    """What the run of a folder printed."""
    return folder.with_name(folder.name + ".txt")


def command_of(plan: Plan, run: PlannedRun, out: Path) -> list[str]:
    """The command that trains a run, or goes on with it."""
    folder = folder_of(out, run)
    script = [sys.executable, str(ROOT / "train" / "pretrain.py"), "--config", "ds_zero1.json"]
    if checkpoint_steps(folder):
        return [*script, "--resume", "--run-dir", str(folder.resolve())]
    restart = ["--restart"] if (folder / "config.json").exists() else []
    return [*script, *run.arguments(plan.base), "--run-dir", str(folder.resolve()), *restart]


def carry_out(
    plan: Plan,
    out: Path,
    *,
    jobs: int,
    limit_s: float | None = None,
    stopped: Callable[[], bool] = lambda: False,
    ended: Callable[[Ended], None] = lambda _: None,
    command: Callable[[Plan, PlannedRun, Path], list[str]] = command_of,
) -> int:
    """Trains what is missing, several runs at a time.

    Args:
        plan: what to train.
        out: folder of the study.
        jobs: runs at a time.
        limit_s: after which runs are asked to save and end; None for no limit.
        stopped: whether to stop, asked all the time.
        ended: is told of every run that ends.
        command: what trains a run.

    Returns:
        The number of runs without a result.
    """
    (out / "runs").mkdir(parents=True, exist_ok=True)
    waiting = deque({run.key: run for run in plan.runs if read_result(out, run) is None}.values())
    missing, began_s, active = {run.key for run in waiting}, time.monotonic(), []
    cores = _cores()
    try:
        while waiting or active:
            stop = "stopped" if stopped() else "the study's time is up" if _over(began_s, limit_s) else ""
            if stop:
                waiting.clear()
            for _ in range(min(len(waiting), jobs - len(active))):
                run = waiting.popleft()
                folder = folder_of(out, run)
                # A run of a killed study needs a moment to end.
                if is_held(folder):
                    waiting.append(run)
                    continue
                core = _free_core(cores, active)
                if _is_finished(folder):
                    missing -= _settle(_at_its_end(out, run, folder, 0.0, None), ended)
                    continue
                resumes = bool(checkpoint_steps(folder))
                active.append(_Active(run, command(plan, run, out), folder, core, resumes))
            for started in list(active):
                code = started.process.poll()
                if code is not None:
                    active.remove(started)
                    missing -= _settle(_end(out, started, code), ended)
                elif stop:
                    started.ask(stop)
                elif _over(started.started_s, None if plan.minutes is None else 60 * plan.minutes):
                    started.ask(f"over {plan.minutes:g} minutes")
            if waiting or active:
                time.sleep(_LOOK_S)
    finally:
        for started in active:
            started.kill()
    return len(missing)


def _settle(end: Ended, ended: Callable[[Ended], None]) -> set[str]:
    ended(end)
    return {end.run.key} if end.reason is None else set()


def _end(out: Path, started: _Active, code: int) -> Ended:
    if code == 0 and _is_finished(started.folder):
        return _at_its_end(
            out, started.run, started.folder, started.seconds, None if started.resumes else started.seconds
        )
    if code == EXIT_SAVED or started.asked_s is not None:
        reason = f"{started.why or 'told to stop'}; the same command goes on with it"
    else:
        reason = f"exit code {code}: {_last_line(output_of(started.folder))} ({output_of(started.folder)})"
    return Ended(started.run, reason, started.seconds)


def _at_its_end(out: Path, run: PlannedRun, folder: Path, seconds: float, wall_s: float | None) -> Ended:
    try:
        keep_result(out, run, folder, wall_s)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Ended(run, f"{folder}: its figures cannot be read: {error}", seconds)
    # Weights and optimizer states of a study would fill a disk; the exported model stays.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return Ended(run, None, seconds)


def _is_finished(folder: Path) -> bool:
    return (folder / "eval.json").exists()


def _over(since_s: float, limit_s: float | None) -> bool:
    return limit_s is not None and time.monotonic() - since_s > limit_s


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _free_core(cores: Sequence[int], active: Sequence[_Active]) -> int | None:
    taken = {started.core for started in active}
    return next((core for core in cores if core not in taken), None)


def _begin(core: int | None) -> None:
    """In the run's process, before it starts: its core, and that it ends with the study."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _environment() -> dict[str, str]:
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in launched}
    return kept | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else "it printed nothing"
