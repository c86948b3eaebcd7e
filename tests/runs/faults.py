"""Ranks of a training run as processes forked from a warm one, so that a fault costs no start-up."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.runs.conftest import free_port, metric_rows

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--data=scenes?count=64",
    "micro_batch=4",
    "log_every=1",
    "local_group=2",
    "val_pairs=4",
    "workers=0",
    "attentive_start=0.2",
    "warmup_steps=2",
    *(f"model.{part}.depth=1" for part in ("vision", "text", "caption_decoder", "image_decoder")),
    *(f"model.{part}.width=32" for part in ("vision", "text", "image_decoder")),
)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.runs.warm"])


def _rank(script: str, argv: list[str], environment: dict[str, str], output: str, prepare: Callable | None) -> None:
    os.environ.update(environment)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = [f"train/{script}.py", *argv]
    # A group of its own, as under a launcher: what is left of it can be found.
    os.setsid()
    # Loader workers are forked, as in a run that nobody prepared.
    multiprocessing.set_start_method("fork", force=True)
    main = _without_the_end(script)
    if prepare is not None:
        prepare()
    code = 1
    try:
        code = main()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _without_the_end(script: str) -> Callable[[], int]:
    """The script's `main` without the judging of models, which is not the subject."""
    module = importlib.import_module(f"train.{script}")
    if script == "pretrain":
        module.evaluate_at_end = lambda *_: None
    else:
        tuning = importlib.import_module("train.tasks.tuning")
        tuning.judge_untuned = tuning.judge_tuned = lambda *_, **__: None
    return module.main


def few(*cases) -> list:
    """Cases of which the first is run with the whole commands, the others in the full matrix alone."""
    return [pytest.param(case, marks=pytest.mark.faults if n else pytest.mark.run) for n, case in enumerate(cases)]


class Run:
    """The ranks of one run.

    Args:
        run_dir: the run's folder.
        options: of the command line, behind the run's folder.
        world: ranks.
        stage: of ZeRO, naming the shipped JSON.
        prepare: called in every rank before it starts, to plant a fault.
        script: of train/.
    """

    def __init__(
        self, run_dir: Path, *options: str, world: int = 1, stage: int = 2, prepare=None, script: str = "pretrain"
    ) -> None:
        self.run_dir = run_dir
        argv = ["--config", str(ROOT / "train" / f"ds_zero{stage}.json"), "--run-dir", str(run_dir), *options]
        port = free_port()
        self._outputs = [run_dir.parent / f"{run_dir.name}.{port}.{rank}.txt" for rank in range(world)]
        self.ranks = []
        for rank in range(world):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            rank = _context.Process(target=_rank, args=(script, argv, environment, str(self._outputs[rank]), prepare))
            rank.start()
            self.ranks.append(rank)

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.ranks[rank].pid, number)

    def kill(self) -> None:
        """Ends all ranks without a word, as a power cut would, and their workers."""
        for rank in self.ranks:
            if rank.is_alive():
                for child in psutil.Process(rank.pid).children(recursive=True):
                    child.kill()
                rank.kill()
        self.wait()

    def wait(self, timeout_s: float = 60) -> list[int]:
        """Exit codes of the ranks; a negative one is the signal that ended it."""
        deadline = time.monotonic() + timeout_s
        for rank in self.ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        alive = [number for number, rank in enumerate(self.ranks) if rank.is_alive()]
        if alive:
            self.kill_now()
            raise TimeoutError(f"ranks {alive} still run after {timeout_s} s:\n{self.text}")
        return [rank.exitcode for rank in self.ranks]

    def left_behind(self, patience_s: float = 10) -> list[str]:
        """What still runs of the ranks and what they started, after a while."""
        sessions, deadline = {rank.pid for rank in self.ranks}, time.monotonic() + patience_s
        while (left := _of_sessions(sessions)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def kill_now(self) -> None:
        for rank in self.ranks:
            if rank.is_alive():
                os.kill(rank.pid, signal.SIGKILL)

    def wait_for(self, holds: Callable[[], bool], timeout_s: float = 60) -> None:
        """Waits until something is so, while a rank runs."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > deadline or not any(rank.is_alive() for rank in self.ranks):
                self.kill_now()
                raise TimeoutError(f"did not come to be:\n{self.text}")
            time.sleep(0.01)

    def steps(self) -> int:
        """Steps that the run has written."""
        path = self.run_dir / "metrics.jsonl"
        return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0

    @property
    def text(self) -> str:
        """What the ranks have printed."""
        return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in self._outputs if path.exists())


def _of_sessions(sessions: set[int]) -> list[str]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            # Nobody may be there to ask a dead process how it ended.
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {process.name()}")
    return found


def finished(run: Run, timeout_s: float = 120) -> Run:
    """The run, after all its ranks have ended well."""
    codes = run.wait(timeout_s)
    assert codes == [0] * len(codes), f"{codes}\n{run.text}"
    return run


def sized(*options: str) -> tuple[str, ...]:
    """The small run with some of its options replaced or added."""
    given = {option.partition("=")[0] for option in options}
    return (*options, *(option for option in SMALL if option.partition("=")[0] not in given))


def rows(run_dir: Path) -> list[dict]:
    return metric_rows(run_dir)
