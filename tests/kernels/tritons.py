"""Python processes under the Tritons that the project supports."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# The folder of the second Triton, made by `make test`.
SECOND = os.environ.get("TRITON_ALT", "")
TRITONS = [
    pytest.param("", id="pinned"),
    pytest.param(SECOND, id="second", marks=pytest.mark.skipif(not SECOND, reason="TRITON_ALT is not set")),
]


def rows_of(module: str, *arguments: str, triton: str, interpret: bool = False) -> list[dict]:
    """The JSON lines that `python -m module` prints, under the Triton in a folder ("" for the installed one)."""
    path = [str(pathlib.Path(triton).resolve())] if triton else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*path, str(ROOT)]), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", module, *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
