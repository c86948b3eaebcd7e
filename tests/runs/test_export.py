"""A run's checkpoint as a model folder, by the command of the README."""

import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.run


class _Planted:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_export_is_what_the_run_left(main_job, command, tmp_path):
    out = tmp_path / "exported"
    done = command(f"python -m train.export {main_job[0]} {out}")
    assert done.code == 0 and str(out) in done.out and done.err == "", done.err
    for name in ("model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json"):
        assert (out / name).read_bytes() == (main_job[0] / "model" / name).read_bytes(), name


def test_a_planted_object_is_refused_and_never_made(main_job, command, tmp_path):
    import torch

    run, marker = tmp_path / "run", tmp_path / "ran"
    newest = max((main_job[0] / "checkpoints").glob("step_*"))
    (run / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(main_job[0] / name, run)
    shutil.copytree(newest, run / "checkpoints" / newest.name)
    share = next((run / "checkpoints" / newest.name).glob("*_optim_states.pt"))
    torch.save({"optimizer_state_dict": _Planted(marker)}, share)
    done = command(f"python -m train.export {run} {tmp_path / 'out'}")
    assert done.code == 2 and "--allow-pickle" in done.err and len(done.err.splitlines()) == 1, done.err
    assert not marker.exists() and not (tmp_path / "out").exists()
