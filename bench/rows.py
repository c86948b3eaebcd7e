"""Result rows: one JSON line per measurement, with machine, versions and commit."""

import functools
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@functools.cache
def environment() -> dict[str, Any]:
    """Where and with what a row was measured."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "machine": gpu.name if gpu else _processor(),
        "cores": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def write(file: str, **row: Any) -> dict[str, Any]:
    """Append a row to `bench/results/<file>.jsonl`, or below `BENCH_RESULTS` where that is set."""
    folder = Path(os.environ.get("BENCH_RESULTS", RESULTS))
    folder.mkdir(parents=True, exist_ok=True)
    row = row | environment() | {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    with (folder / f"{file}.jsonl").open("a") as lines:
        lines.write(json.dumps(row) + "\n")
    return row


def read(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All rows of a folder, oldest first within a file."""
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        from importlib.metadata import version

        return version(package)
    except ImportError:
        return None


def _commit() -> str:
    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return run.stdout.strip()

    # Measured rows and the log are what measuring itself writes.
    rooms = "../kernels", "../sycoca", "../train", "../bench", ":!results", ":!../train/log.md"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *rooms)
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+changes" if changed else "")
