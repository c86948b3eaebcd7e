"""How processes of a run end: their codes, their one line, and what they do when told to."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from sycoca.config import ConfigError
from tests.ranks import run_ranks
from train import exits
from train.data import DataError
from train.exits import EXIT_LOST_RANK, LostRank, StopRun, guarded
from train.heartbeat import Heartbeat
from train.signals import StopRequest
from train.together import agree, together

ROOT = Path(__file__).resolve().parents[2]


def test_a_request_is_noted_and_the_signal_given_back():
    before, files = signal.getsignal(signal.SIGTERM), len(os.listdir("/proc/self/fd"))
    request = StopRequest()
    assert not request.asked
    os.kill(os.getpid(), signal.SIGTERM)
    assert request.asked
    request.close()
    assert signal.getsignal(signal.SIGTERM) == before and signal.set_wakeup_fd(-1) == -1
    deadline = time.monotonic() + 5
    while len(os.listdir("/proc/self/fd")) > files and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize(
    ("numbers", "pause_s", "code"),
    [
        (["SIGTERM", "SIGTERM"], 1.2, 143),
        # Sent twice by launcher and scheduler.
        (["SIGTERM", "SIGTERM"], 0.0, 0),
        (["SIGINT", "SIGINT"], 0.1, 130),
    ],
)
def test_a_second_request_ends_a_process_that_python_does_not_hear(numbers, pause_s, code):
    # A lock of C's holds the main thread as a collective does: no handler of Python's runs until it is free.
    probe = f"""
import ctypes, os, signal, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from train.signals import StopRequest
StopRequest()
def send():
    time.sleep(0.3)
    for name in {numbers!r}:
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep({pause_s})
libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(lock)
free = threading.Timer(2, libc.pthread_mutex_unlock, [lock])
free.daemon = True
free.start()
threading.Thread(target=send, daemon=True).start()
libc.pthread_mutex_lock(lock)
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=30)
    assert done.returncode == code, done.stderr


@pytest.mark.parametrize("killed", ["runner", "launcher"])
def test_the_death_of_a_launcher_is_a_request_to_stop(tmp_path, killed):
    (tmp_path / "deepspeed" / "launcher").mkdir(parents=True)
    for folder in ("deepspeed", "deepspeed/launcher"):
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "deepspeed" / "launcher" / "launch.py").write_text(
        "import subprocess, sys\nsubprocess.run([sys.executable, 'rank.py'])\n"
    )
    (tmp_path / "rank.py").write_text(
        f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from train.signals import StopRequest
request, deadline = StopRequest(), time.monotonic() + 20
time.sleep(1.5)
Path("asked" if request.asked else "ready").touch()
while not request.asked and time.monotonic() < deadline:
    time.sleep(0.05)
Path("asked" if request.asked else "forgotten").touch()
"""
    )
    start = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'deepspeed.launcher.launch'])"
    runner = psutil.Popen([sys.executable, "-c", start], cwd=tmp_path)
    wait_for(tmp_path / "ready")
    (launcher,) = runner.children()
    (rank,) = launcher.children()
    (runner if killed == "runner" else launcher).kill()
    try:
        wait_for(tmp_path / "asked")
    finally:
        for process in (launcher, runner):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        runner.wait()
        psutil.wait_procs([rank], 5)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (StopRun("too much"), 3, "error: too much"),
        (StopRun("saved", 75), 75, "error: saved"),
        (LostRank("rank 1 does not answer"), 4, "error: rank 0: rank 1 does not answer"),
        (RuntimeError("Connection closed by peer [127.0.0.1]:1"), 4, "error: rank 0: another rank is gone"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory."), 3, "A smaller train.micro_batch needs less"),
        (OSError(errno.ENOSPC, "No space left on device", "eval.json"), 3, "eval.json: No space left on device"),
    ],
)
def test_what_a_person_can_act_on_is_one_line(capsys, monkeypatch, error, code, told):
    def run():
        raise error

    # Where destructors would wait for other ranks there is no way back.
    monkeypatch.setattr("os._exit", sys.exit)
    try:
        ended = guarded(run)
    except SystemExit as stop:
        ended = stop.code
    assert ended == code
    shown = capsys.readouterr().err
    assert told in shown and shown.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), FileNotFoundError(errno.ENOENT, "a bug")])
def test_other_errors_go_through(error):
    def run():
        raise error

    with pytest.raises(type(error), match="a bug"):
        guarded(run)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("no such key"), 2, "no such key"),
        (DataError("no such file"), 2, "no such file"),
        (StopRun("damaged", 75), 75, "damaged"),
        (OSError(errno.EROFS, "Read-only file system", "config.json"), 3, "config.json: Read-only file system"),
    ],
)
def test_what_ends_one_rank_ends_all_alike(error, code, text):
    def end(rank, world, failing):
        try:
            with together():
                if rank in failing:
                    raise error
        except StopRun as stop:
            return stop.code, str(stop)
        return None

    assert run_ranks(end, 2, (1,)) == [(code, f"rank 1: {text}")] * 2
    assert run_ranks(end, 2, (0, 1)) == [(code, text)] * 2
    assert run_ranks(end, 2, ()) == [None, None]


def test_ranks_agree_on_the_first_failure():
    assert run_ranks(lambda rank, world: agree(f"rank {rank}" if rank else None), 3) == ["rank 1"] * 3


def test_a_guard_without_other_ranks_changes_nothing():
    def inside(rank, world):
        beat = Heartbeat(5.0)
        try:
            with beat.guard():
                raise RuntimeError("a bug")
        except LostRank:
            return "lost"
        except RuntimeError as error:
            return str(error)
        finally:
            beat.close()

    assert run_ranks(inside, 1) == ["a bug"]
    assert LostRank("x").code == EXIT_LOST_RANK and not dist.is_initialized()


def test_the_page_names_the_codes_and_only_tests_that_exist():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    codes = {value for name, value in vars(exits).items() if name.startswith("EXIT_")}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)} == codes | {0}
    rows = [line for line in page.split("## The faults, and")[1].splitlines() if line.startswith("| ") and "`" in line]
    known = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = {name for row in rows for name in re.findall(r"`(test_\w+)`", row)}
    assert len(named) > 40 and all(f"def {name}(" in known for name in named)
