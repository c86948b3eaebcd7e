"""Two ranks and one rank see the same global batches and take the same steps."""

import pytest

from tests.runs.conftest import free_port, metric_rows
from tests.runs.test_resume import SIZES

pytestmark = pytest.mark.run


def test_evaluation_ends_on_every_rank_of_a_partitioned_model(command, tmp_path):
    config = '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}'
    (tmp_path / "partitioned.json").write_text(config)
    line = f"deepspeed --master_port {free_port()} --num_gpus 2 train/pretrain.py --config {tmp_path}/partitioned.json"
    done = command(f"{line} {SIZES} --run-dir {tmp_path}/run", timeout_s=200)
    assert done.code == 0, done.err[-2000:]
    assert (tmp_path / "run" / "overview.png").stat().st_size > 0


def test_two_ranks_log_the_losses_of_one(command, tmp_path):
    # With a large epsilon the step is a smooth function of the gradient, and rounding is not amplified.
    sizes = SIZES.replace("steps=6", "steps=3").replace("save_every=3", "save_every=9").replace("micro_batch=8", "")
    common = f"train/pretrain.py --config ds_zero2.json --data 'scenes?count=64' {sizes} eps=1e-2"
    one = command(f"python {common} --run-dir {tmp_path}/one micro_batch=64")
    two = command(
        f"deepspeed --master_port {free_port()} --num_gpus 2 {common} --run-dir {tmp_path}/two micro_batch=32"
    )
    assert one.code == 0 and two.code == 0, one.err[-2000:] + two.err[-2000:]
    for expected, found in zip(metric_rows(tmp_path / "one"), metric_rows(tmp_path / "two"), strict=True):
        for name in ("loss", "itc", "caption", "tgmim", "local", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=2e-5), (expected["step"], name)
