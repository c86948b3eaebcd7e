"""Muon under DeepSpeed: the pieces that ZeRO makes of matrices take the steps of a single process."""

import pytest

from tests.runs.faults import SMALL, Run, finished, rows

pytestmark = pytest.mark.run
# A rate at which a wrong step is seen in the next loss.
SHARED = (option for option in SMALL if not option.startswith("micro_batch"))
ADAMW = (*SHARED, "--preset=tiny", "matrix_lr=0.1", "train.steps=4", "eps=1e-2")
OPTIONS = (*ADAMW, "optimizer.name=muon")


def test_every_stage_takes_the_steps_of_one_process(tmp_path):
    whole = tmp_path / "ds_zero0.json"
    whole.write_text('{"zero_optimization": {"stage": 0}, "gradient_clipping": 1.0}')
    found = {}
    for world, stage in ((1, 0), (1, 2), (2, 1), (2, 2), (2, 3)):
        options = [*OPTIONS, f"micro_batch={4 // world}", *([f"--config={whole}"] if stage == 0 else [])]
        run = Run(tmp_path / f"{world}_{stage}", *options, world=world, stage=stage or 2)
        found[world, stage] = [row["loss"] for row in rows(finished(run).run_dir)]
    plain = found.pop((1, 0))
    assert max(plain) > 1.001 * min(plain)
    for key, losses in found.items():
        assert losses == pytest.approx(plain, rel=2e-5), key
    adamw = finished(Run(tmp_path / "adamw", *ADAMW, "micro_batch=4"))
    assert rows(adamw.run_dir)[-1]["loss"] != pytest.approx(plain[-1], rel=1e-3), "another optimizer is seen"
