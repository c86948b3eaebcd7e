"""Frozen encoders, averaged weights, and ranks that do not belong together."""

import os
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.runs.faults import SMALL, Run, finished
from train.export import consolidated


def split(run: list, faults: list) -> list:
    """Cases of the whole commands, and those of the full matrix alone."""
    marked = [pytest.param(case, marks=pytest.mark.run) for case in run]
    return marked + [pytest.param(case, marks=pytest.mark.faults) for case in faults]


# Ranks and ZeRO stage before and after the run is resumed.
MOVES = [((2, 2), (1, 3)), ((2, 3), (2, 1)), ((2, 1), (2, 1)), ((1, 0), (1, 0))]


@pytest.mark.parametrize("move", split(MOVES[:1], MOVES[1:]))
def test_the_average_is_that_of_the_weights_after_each_step(tmp_path, move):
    run_dir, options = tmp_path / "run", ("save_every=1", "keep_last=5", "ema=0.5", *SMALL)
    plain = tmp_path / "plain.json"
    plain.write_text("{}")
    for steps, (world, stage) in zip((3, 4), move, strict=True):
        resumed = () if steps == 3 else ("--resume", "--reshape") if move[0] != move[1] else ("--resume",)
        config = () if stage else (f"--config={plain}",)
        finished(Run(run_dir, *resumed, f"steps={steps}", *options, *config, world=world, stage=stage))
    after = [consolidated(run_dir / "checkpoints" / f"step_{step:08d}") for step in (1, 2, 3, 4)]
    found = load_file(run_dir / "model_ema" / "model.safetensors")
    for name, average in after[0].items():
        for step, weights in enumerate(after[1:], 2):
            average = average + max(0.5, 9 / (10 + step)) * (weights[name] - average)
        assert torch.allclose(found[name], average, rtol=1e-5, atol=1e-6), name
    assert any(not torch.equal(found[name], after[-1][name]) for name in found)


@pytest.mark.parametrize("stage", split([3], [2]))
def test_a_frozen_encoder_stays_as_it_was(tmp_path, stage):
    first = finished(Run(tmp_path / "first", *SMALL, "steps=1"))
    options = (*SMALL, f"--init={first.run_dir}", "freeze=vision", "layer_decay=0.5", "global_batch=8")
    run = finished(Run(tmp_path / "second", *options, "steps=2", "save_every=1", stage=stage))
    assert "frozen: vision" in run.text
    # The other stage's universal form leaves frozen weights out.
    finished(Run(tmp_path / "second", *options[:-1], "--resume", "--reshape", "steps=3", stage=5 - stage))
    before, after = (load_file(path / "model" / "model.safetensors") for path in (first.run_dir, run.run_dir))
    for name, tensor in before.items():
        moved = not torch.equal(after[name], tensor)
        assert moved != name.startswith("vision."), name


def another_rate() -> None:
    if os.environ["RANK"] == "1":
        sys.argv.append("lr=0.5")


@pytest.mark.run
def test_ranks_of_different_commands_do_not_train(tmp_path):
    run = Run(tmp_path / "run", *SMALL, "steps=2", world=2, prepare=another_rate)
    assert run.wait() == [2, 2]
    assert "error: rank 1 on " in run.text and "optimizer.lr is 0.5, not 0.002" in run.text
    assert run.text.count("error:") == 1 and "Traceback" not in run.text


def absent() -> None:
    if os.environ["RANK"] == "1":
        os._exit(0)


@pytest.mark.run
def test_a_rank_that_does_not_come_is_missed(tmp_path):
    run = Run(tmp_path / "run", *SMALL, "steps=2", "timeout_s=3", world=2, prepare=absent)
    assert run.wait() == [2, 0]
    assert "1 of 2 ranks came to 127.0.0.1:" in run.text and "Traceback" not in run.text
