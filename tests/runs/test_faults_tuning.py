"""What befalls a fine-tuning: sudden death, steps that are not finite, lost samples."""

import signal

import pytest
import torch

from tests.runs.faults import Run, finished, rows, sized
from tests.runs.plants import BrokenImages, fp32_weights, killed_behind_step_5, unreadable
from train.run_folder import checkpoint_steps

pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """What a short run left."""
    return finished(Run(tmp_path_factory.mktemp("whole") / "run", "steps=2", *sized())).run_dir / "model"


@pytest.fixture
def tune(model, tmp_path):
    """Fine-tunes the model."""
    options = ("steps=6", "save_every=3", "micro_batch=4", "log_every=1", "workers=0", "warmup_steps=2")
    known = ("--model", str(model), "--data", "scenes?count=60&fresh=false")

    def run(*more: str, name: str = "tuned", prepare=None) -> Run:
        argv = ("retrieval", *known, *options, *more)
        return Run(tmp_path / name, *argv, prepare=prepare, script="finetune")

    return run


def test_a_killed_fine_tuning_resumes_bit_for_bit(tune):
    whole, killed = finished(tune()), tune(name="killed", prepare=killed_behind_step_5)
    assert killed.wait() == [-signal.SIGKILL] and checkpoint_steps(killed.run_dir) == [3]
    resumed = finished(tune("--resume", name="killed"))
    assert "resuming at step 3" in resumed.text and rows(resumed.run_dir) == rows(whole.run_dir)
    expected, found = (fp32_weights(run.run_dir, 6) for run in (whole, resumed))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_fine_tuning_leaves_out_the_same_steps_and_names_them(tune):
    run = finished(tune(prepare=BrokenImages(0, 2, 3)))
    assert [row["skipped"] for row in rows(run.run_dir)] == [0, 0, 1, 1, 1, 1]
    assert "step 3 left out, its gradient is not finite: rank 0, batch 2 of epoch 0 (" in run.text


def test_fine_tuning_ends_where_its_source_loses_too_much(tune):
    run = tune("max_left_out=0.02", prepare=unreadable)
    assert run.wait() == [3], run.text
    assert "training samples cannot be used, data.max_left_out is 0.02" in run.text and "planted fault" in run.text
