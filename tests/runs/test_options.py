"""Frozen encoders, averaged weights, and ranks that do not belong together."""

import os
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.runs.faults import SMALL, Run, finished
from train.export import consolidated

pytestmark = pytest.mark.run


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_average_is_that_of_the_weights_after_each_step(tmp_path, stage):
    run_dir, options = tmp_path / "run", ("save_every=1", "keep_last=5", "ema=0.5", *SMALL)
    finished(Run(run_dir, "steps=3", *options, world=2, stage=stage))
    finished(Run(run_dir, "--resume", "steps=4", *options, world=2, stage=stage))
    after = [consolidated(run_dir / "checkpoints" / f"step_{step:08d}") for step in (1, 2, 3, 4)]
    found = load_file(run_dir / "model_ema" / "model.safetensors")
    for name, average in after[0].items():
        for step, weights in enumerate(after[1:], 2):
            average = average + max(0.5, 9 / (10 + step)) * (weights[name] - average)
        assert torch.allclose(found[name], average, rtol=1e-5, atol=1e-6), name
    assert any(not torch.equal(found[name], after[-1][name]) for name in found)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_frozen_encoder_stays_as_it_was(tmp_path, stage):
    first = finished(Run(tmp_path / "first", *SMALL, "steps=1"))
    options = (*SMALL, f"--init={first.run_dir}", "freeze=vision", "layer_decay=0.5", "global_batch=8")
    run = finished(Run(tmp_path / "second", *options, "steps=2", "save_every=1", stage=stage))
    assert "frozen: vision" in run.text
    finished(Run(tmp_path / "second", *options[:-1], "--resume", "steps=3", stage=stage))
    before, after = (load_file(path / "model" / "model.safetensors") for path in (first.run_dir, run.run_dir))
    for name, tensor in before.items():
        moved = not torch.equal(after[name], tensor)
        assert moved != name.startswith("vision."), name


def another_rate() -> None:
    if os.environ["RANK"] == "1":
        sys.argv.append("lr=0.5")


def test_ranks_of_different_commands_do_not_train(tmp_path):
    run = Run(tmp_path / "run", *SMALL, "steps=2", world=2, prepare=another_rate)
    assert run.wait() == [2, 2]
    assert "error: rank 1 on " in run.text and "optimizer.lr is 0.5, not 0.002" in run.text
    assert run.text.count("error:") == 1 and "Traceback" not in run.text


def absent() -> None:
    if os.environ["RANK"] == "1":
        os._exit(0)


def test_a_rank_that_does_not_come_is_missed(tmp_path):
    run = Run(tmp_path / "run", *SMALL, "steps=2", "timeout_s=3", world=2, prepare=absent)
    assert run.wait() == [2, 0]
    assert "1 of 2 ranks came to 127.0.0.1:" in run.text and "Traceback" not in run.text
