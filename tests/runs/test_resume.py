"""An interrupted run continues as if it had never stopped."""

import shutil

import pytest

from tests.runs.conftest import free_port, metric_rows

pytestmark = pytest.mark.run
SIZES = (
    "steps=6 micro_batch=8 save_every=3 log_every=2 local_group=4 val_pairs=8 model.vision.depth=1 model.text.depth=1 "
    "model.caption_decoder.depth=1 model.image_decoder.depth=1 attentive_start=0.2"
)


def final_weights(run_dir):
    import torch

    files = sorted((run_dir / "checkpoints" / "step_00000006").rglob("*model_states.pt"))
    assert files
    states = [torch.load(file, map_location="cpu", weights_only=False)["module"] for file in files]
    return {f"{i}.{name}": tensor for i, state in enumerate(states) for name, tensor in state.items()}


def test_resumed_losses_are_those_of_the_uninterrupted_run(command, tmp_path):
    import torch

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    source = "scenes?count=40&fresh=false"
    base = f"deepspeed --master_port {free_port()} --num_gpus 2 train/pretrain.py --config ds_zero2.json"
    done = command(f"{base} --data '{source}' --run-dir {whole} {SIZES}")
    assert done.code == 0, done.err[-3000:]
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "step_00000006")
    done = command(f"{base} --resume --run-dir {broken}")
    assert done.code == 0, done.err[-3000:]
    rows, resumed = metric_rows(whole), metric_rows(broken)
    assert [row["step"] for row in resumed] == [1, 2, 3, 4, 5, 6]
    assert resumed == rows
    expected, found = final_weights(whole), final_weights(broken)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
