"""A run's checkpoint as a model folder, by the command of the README."""

import shutil
from pathlib import Path

import pytest

from tests.runs.faults import SMALL, Run, finished
from train.durable import read_manifest, record, write_manifest

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
    # Whoever plants an object can make a manifest that agrees.
    facts = read_manifest(share.parent)
    write_manifest(share.parent, facts, {name: record(share.parent / name) for name in facts.pop("files")})
    done = command(f"python -m train.export {run} {tmp_path / 'out'}")
    assert done.code == 2 and "--allow-pickle" in done.err and len(done.err.splitlines()) == 1, done.err
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_exported(main_job, command, tmp_path):
    run = shutil.copytree(main_job[0], tmp_path / "run")
    newest = max((run / "checkpoints").glob("step_*"))
    share = next(newest.glob("*_optim_states.pt"))
    share.write_bytes(share.read_bytes()[:-1])
    done = command(f"python -m train.export {run} {tmp_path / 'out'} --step {int(newest.name[5:])}")
    assert done.code == 2 and share.name in done.err and len(done.err.splitlines()) == 1, done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("stage", "world"), [(1, 2), (2, 1), (3, 1), (3, 2)])
def test_every_stage_exports_the_weights_it_trained(tmp_path, stage, world):
    import torch
    from safetensors.torch import load_file

    from train.export import consolidated

    run = finished(Run(tmp_path / "run", "steps=2", *SMALL, world=world, stage=stage))
    left = load_file(run.run_dir / "model" / "model.safetensors")
    held = consolidated(run.run_dir / "checkpoints" / "step_00000002")
    assert held.keys() == left.keys() and all(torch.equal(held[name], left[name]) for name in left)
