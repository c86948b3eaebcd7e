"""A run that predicts the features of its averaged encoder, from a late start of TG-MIM on."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.runs.conftest import metric_rows
from tests.runs.faults import Run, finished, sized
from train.export import consolidated, export

OPTIONS = sized("tgmim_kind=ema_features", "ema=0.6", "tgmim_start=0.4", "save_every=1", "keep_last=9")


def averages(run_dir, steps):
    """Plain averages of the weights that the checkpoints hold."""
    after = [consolidated(run_dir / "checkpoints" / f"step_{step:08d}") for step in range(1, steps + 1)]
    average = after[0]
    for step, weights in enumerate(after[1:], 2):
        share = max(1 - 0.6, 9 / (10 + step))
        average = {name: old + share * (weights[name] - old) for name, old in average.items()}
    return average


# Ranks and ZeRO stage.
@pytest.mark.parametrize(
    ("world", "stage"),
    [pytest.param(1, 3, marks=pytest.mark.run), *(pytest.param(2, n, marks=pytest.mark.faults) for n in (1, 2, 3))],
)
def test_it_goes_on_as_if_it_had_never_stopped(tmp_path, world, stage):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run = finished(Run(whole, *OPTIONS, "steps=5", world=world, stage=stage))
    rows = metric_rows(whole)
    # TG-MIM starts with the third of five steps.
    assert [row["tgmim"] > 0 for row in rows] == [False, False, True, True, True], run.text
    shutil.copytree(whole, broken)
    for step in (4, 5):
        shutil.rmtree(broken / "checkpoints" / f"step_{step:08d}")
    finished(Run(broken, *OPTIONS, "steps=5", "--resume", world=world, stage=stage))
    assert metric_rows(broken) == rows
    left, expected = (load_file(path / "model_ema" / "model.safetensors") for path in (broken, whole))
    assert left.keys() == expected.keys() and all(torch.equal(left[name], expected[name]) for name in left)
    for name, average in averages(whole, 5).items():
        torch.testing.assert_close(expected[name], average, rtol=1e-5, atol=1e-6)
    # Of any checkpoint, not the last alone.
    assert export(whole, tmp_path / "third", step=3, ema=True) == 3
    third = load_file(tmp_path / "third" / "model.safetensors")
    for name, average in averages(whole, 3).items():
        torch.testing.assert_close(third[name], average, rtol=1e-5, atol=1e-6)


@pytest.mark.faults
def test_the_average_moves_to_other_ranks_and_stages(tmp_path):
    run_dir = tmp_path / "run"
    finished(Run(run_dir, *OPTIONS, "steps=5", world=2, stage=2))
    finished(Run(run_dir, *OPTIONS, "steps=6", "--resume", "--reshape", stage=3))
    found, expected = load_file(run_dir / "model_ema" / "model.safetensors"), averages(run_dir, 6)
    for name, average in expected.items():
        torch.testing.assert_close(found[name], average, rtol=1e-5, atol=1e-6)
    assert metric_rows(run_dir)[-1]["tgmim"] > 0
