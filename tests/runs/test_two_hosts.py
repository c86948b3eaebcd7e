"""Two hosts, rehearsed on one machine: `two_hosts.sh`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs.conftest import metric_rows
from tests.runs.faults import ROOT, SMALL

pytestmark = [pytest.mark.faults, pytest.mark.full]
SCRIPT = Path(__file__).with_name("two_hosts.sh")


def two_hosts(folder, *options: str, **environment: str):
    """What the script said; the test is skipped, with the reason, where this machine permits no namespaces."""
    path = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
    done = subprocess.run(
        [str(SCRIPT), str(folder), *SMALL, *options],
        env={"PATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    return done


def test_two_hosts_of_a_hostfile_train_together(tmp_path):
    done = two_hosts(tmp_path, "steps=2", HOSTFILE="1")
    said = (tmp_path / "one.txt").read_text(errors="replace")
    assert "one ended with 0, two with 0" in done.stdout, said[-2000:]
    assert "2 rank(s)" in said and len(metric_rows(tmp_path / "run")) == 2


def test_a_cut_cable_ends_both_hosts_and_one_goes_on_alone(tmp_path):
    done = two_hosts(tmp_path)
    one, two, alone = ((tmp_path / f"{name}.txt").read_text(errors="replace") for name in ("one", "two", "alone"))
    ended = re.search(r"one ended with (\d+), two with (\d+), (\d+) s after the cut", done.stdout)
    assert ended, done.stdout + done.stderr
    # Each host blames the other, within the timeout of ten seconds and what a lost store costs.
    assert (ended[1], ended[2]) == ("4", "4"), one + two
    assert int(ended[3]) <= 30
    assert re.search(r"rank 1 (has not answered|does not answer)", one), one[-2000:]
    assert re.search(r"rank 0 (has not answered|does not answer)", two), two[-2000:]
    assert "ended with 0" in done.stdout.splitlines()[-1], alone[-2000:]
    assert "1 rank(s)" in alone and "2 micro batches a rank" in alone
    steps = [row["step"] for row in metric_rows(tmp_path / "run")]
    assert steps == list(range(1, steps[-1] + 1))


def test_the_slurm_script_starts_a_run_and_goes_on_with_it(tmp_path):
    """Under a stand-in for SLURM that is this machine alone."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in (("srun", 'shift; exec "$@"'), ("scontrol", "echo 127.0.0.1")):
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:{Path(sys.executable).parent}:/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
        "RUN": str(tmp_path / "run"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
    }
    for steps in (2, 3):
        line = [str(ROOT / "train" / "slurm.sh"), "--config", "ds_zero2.json", f"steps={steps}", *SMALL]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming at step 2" in done.stdout and "2 rank(s)" in done.stdout
    assert [row["step"] for row in metric_rows(tmp_path / "run")] == [1, 2, 3]
