"""Whole commands, run in a fresh copy of the checkout, as a newcomer would."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (
    "kernels",
    "sycoca",
    "train",
    "bench",
    "tests",
    "docs",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "Makefile",
    "mkdocs.yml",
)


# What starts whole programs takes every core; the others share the machine, a core each, so that no thread of one waits
# for a core that another holds.
PROGRAMS = {"command", "main_job", "place"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if PROGRAMS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("alone")


def keep_to_one_core() -> None:
    """Pins a worker of pytest-xdist, and all that it starts, to a core of its own."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"][2:]) % len(cores)]})


if "PYTEST_XDIST_WORKER" in os.environ and os.environ.get("ONE_CORE_EACH") == "1":
    keep_to_one_core()


HALF_TRAINED = "half/model"


class Done(NamedTuple):
    """What a finished command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout without runs, caches and environments."""
    target = tmp_path_factory.mktemp("checkout")
    for name in ROOMS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", ".benchmarks"))
        elif source.exists():
            shutil.copy(source, target / name)
    return target


@pytest.fixture(scope="session")
def command(checkout):
    """Runs a shell command in the copy and returns its exit code and output."""

    def run(line: str, *, timeout_s: float = 300, cwd: Path = checkout, env: dict | None = None) -> Done:
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OMP_NUM_THREADS")}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        environment.update(env or {})
        done = subprocess.run(
            line, shell=True, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def main_job(command, checkout):
    """The command on the README's first page: its run's folder, what it left behind, when it started."""
    started = time.time()
    done = command("deepspeed train/pretrain.py --config ds_zero2.json", timeout_s=900)
    assert done.code == 0, done.err[-3000:]
    # At once: other commands of the README write into the same folder.
    exported = command(f"python -m train.export runs/tiny {HALF_TRAINED} --step 360")
    assert exported.code == 0, exported.err[-3000:]
    return checkout / "runs" / "tiny", done, started


@pytest.fixture(scope="session")
def half_trained(main_job, checkout) -> Path:
    """The model of the main job's checkpoint in the middle."""
    return checkout / HALF_TRAINED


def free_port() -> int:
    """A port for the launcher, so that two runs on one machine do not meet."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def metric_rows(run_dir: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
