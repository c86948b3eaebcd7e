"""A run whose batches come in parts takes the steps of one that takes them at once, whatever ZeRO moves where."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.runs.faults import ROOT, SMALL, Run, finished, rows

pytestmark = pytest.mark.run
# With a large epsilon the step is a smooth function of the gradient, and rounding is not amplified.
OPTIONS = (
    *(option for option in SMALL if option != "micro_batch=4"),
    *("steps=2", "eps=1e-2", "model.loss.label_smoothing=0.1"),
)


@pytest.fixture(scope="module")
def at_once(tmp_path_factory):
    """Sixteen pairs by one rank, in one part."""
    return finished(Run(tmp_path_factory.mktemp("at_once") / "run", *OPTIONS, "micro_batch=16")).run_dir


@pytest.mark.parametrize(
    ("stage", "world", "schedule"),
    [
        (0, 2, "gather"),
        (1, 1, "gather"),
        (2, 2, "ring"),
        (3, 2, "gather"),
        ("ds_zero2_offload.json", 2, "gather"),
        ("ds_zero3_offload.json", 1, "gather"),
    ],
)
def test_parts_take_the_steps_of_the_whole(at_once, tmp_path, stage, world, schedule):
    config = ROOT / "train" / str(stage)
    if isinstance(stage, int):
        config = tmp_path / "zero.json"
        config.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}))
    options = [*OPTIONS, "micro_batch=4", "global_batch=16", f"itc_schedule={schedule}", f"--config={config}"]
    run = finished(Run(tmp_path / "run", *options, world=world))
    assert f"16 pairs in {4 // world} micro batches a rank, contrasted as one batch" in run.text
    for found, expected in zip(rows(run.run_dir), rows(at_once), strict=True):
        # DeepSpeed tells no norm without ZeRO; it clips by it all the same.
        for name in ("loss", "itc", "caption", "tgmim", "local", *(["grad_norm"] if stage else [])):
            assert found[name] == pytest.approx(expected[name], rel=2e-5), name
    found, expected = (load_file(folder / "model" / "model.safetensors") for folder in (run.run_dir, at_once))
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-6), name
