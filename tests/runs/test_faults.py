"""What befalls a run, one fault of each class: damage, planted code, broken numbers, silent ranks, full disks."""

import json
import os
import resource
import shutil
import signal
import time

import pytest
import torch

from tests.runs.faults import SMALL, Run, finished, rows
from train.checkpoints import newest_sound
from train.run_folder import checkpoint_steps

pytestmark = pytest.mark.run
SIX = ("steps=6", "save_every=2", "keep_last=5", *SMALL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps with checkpoints at 2, 4 and 6."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    finished(Run(run_dir, *SIX))
    return run_dir


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def longer(*options: str) -> tuple[str, ...]:
    return ("--resume", "steps=8", *options, *SIX[1:])


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(copy, whole):
    damaged = copy / "checkpoints" / "step_00000006" / "mp_rank_00_model_states.pt"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    run = finished(Run(copy, *longer()))
    assert "step_00000006/mp_rank_00_model_states.pt: content differs from its digest" in run.text
    assert "resuming at step 4" in run.text
    assert rows(copy)[:4] == rows(whole)[:4] and len(rows(copy)) == 8


def test_a_run_whose_checkpoints_are_all_damaged_stops(copy):
    for step in checkpoint_steps(copy):
        os.truncate(copy / "checkpoints" / f"step_{step:08d}" / "mp_rank_00_model_states.pt", 100)
    before = rows(copy)
    run = Run(copy, *longer())
    assert run.wait() == [3]
    assert "every checkpoint is damaged, nothing is resumed" in run.text
    assert "step_00000002/mp_rank_00_model_states.pt: 100 bytes" in run.text and "Traceback" not in run.text
    assert rows(copy) == before


@pytest.mark.parametrize(
    "content", [None, "", "step_99999999\n", "\x00\xff"], ids=["missing", "empty", "wrong", "junk"]
)
def test_the_pointer_to_the_newest_checkpoint_is_not_trusted(copy, content):
    latest = copy / "checkpoints" / "latest"
    latest.unlink() if content is None else latest.write_text(content, encoding="utf-8")
    assert newest_sound(copy).step == 6


class Planted:
    """Makes a file as soon as it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


def test_code_in_a_checkpoint_is_not_run(copy, tmp_path):
    from train.durable import read_manifest, record, write_manifest

    marker, folder = tmp_path / "marker", copy / "checkpoints" / "step_00000006"
    for file in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        state = torch.load(folder / file, weights_only=False)
        state["planted"] = Planted(marker)
        torch.save(state, folder / file)
        marker.unlink(missing_ok=True)
    facts = read_manifest(folder)
    files = facts.pop("files")
    # Whoever plants code can make a manifest that agrees.
    write_manifest(folder, facts, {name: record(folder / name) for name in files})
    run = Run(copy, *longer())
    assert run.wait() == [3] and not marker.exists()
    assert "could run code; refused" in run.text and "Traceback" not in run.text
    run = Run(copy, *longer("--trust-checkpoint"))
    run.wait()
    assert marker.exists()


def _nan_images(rank: int, steps: range):
    import torch.distributed as dist

    import train.inputs

    original = train.inputs.Inputs.batches

    def batches(self, first, device):
        for number, (batch, place) in enumerate(original(self, first, device), first + 1):
            if number in steps and dist.get_rank() == rank:
                batch = batch._replace(images=torch.full_like(batch.images, float("nan")))
            yield batch, place

    train.inputs.Inputs.batches = batches


def nan_once():
    _nan_images(1, range(3, 4))


def nan_for_ever():
    _nan_images(0, range(3, 100))


def test_a_batch_that_is_not_finite_is_left_out_by_all_ranks(tmp_path):
    run = finished(Run(tmp_path / "run", "steps=5", *SMALL, world=2, prepare=nan_once))
    assert [row["skipped"] for row in rows(tmp_path / "run")] == [0, 0, 1, 1, 1]
    assert "step 3 left out, its gradient is not finite: rank 1, batch 2 of epoch 0 (" in run.text
    assert all(row["loss"] is not None for row in rows(tmp_path / "run")[3:])


def test_ten_steps_in_a_row_that_are_not_finite_end_the_run(tmp_path):
    run = Run(tmp_path / "run", "steps=40", *SMALL, prepare=nan_for_ever)
    assert run.wait() == [3]
    assert "step 12: 10 steps in a row had non-finite gradients" in run.text and "Traceback" not in run.text


def nan_weight():
    import train.health

    original = train.health.Skips.after

    def after(self, step, places, losses):
        if step == 3:
            with torch.no_grad():
                next(iter(self._engine.module.parameters())).fill_(float("nan"))
        return original(self, step, places, losses)

    train.health.Skips.after = after


def test_a_weight_that_is_not_finite_ends_the_run_within_a_step(tmp_path):
    run = Run(tmp_path / "run", "steps=40", *SMALL, prepare=nan_weight)
    assert run.wait() == [3]
    assert "step 4: weight " in run.text and " is not finite" in run.text


@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_rank_is_named_and_ends_the_others(tmp_path, silent):
    run = Run(tmp_path / "run", "steps=4000", "timeout_s=3", *SMALL, world=2)
    run.wait_for(lambda: run.steps() >= 2)
    run.signal(silent, signal.SIGSTOP)
    started = time.monotonic()
    other = run.ranks[1 - silent]
    other.join(38)
    taken_s = time.monotonic() - started
    assert other.exitcode == 4, run.text
    assert f"rank {silent} has not answered" in run.text or f"rank {silent} does not answer" in run.text
    assert taken_s < 3 + 35
    run.kill()


def test_a_killed_rank_is_named_and_ends_the_others(tmp_path):
    run = Run(tmp_path / "run", "steps=4000", *SMALL, world=2)
    run.wait_for(lambda: run.steps() >= 2)
    run.signal(1, signal.SIGKILL)
    started = time.monotonic()
    run.ranks[0].join(20)
    assert time.monotonic() - started < 5
    assert run.ranks[0].exitcode == 4 and "rank 1 does not answer" in run.text, run.text


def little_disk():
    # A write beyond this many bytes fails, as on a full disk.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_full_disk_leaves_earlier_checkpoints_unharmed(copy):
    run = Run(copy, *longer(), prepare=little_disk)
    assert run.wait() == [3]
    assert "checkpoint step_00000008 could not be written" in run.text and "Traceback" not in run.text
    assert newest_sound(copy).step == 6 and not list((copy / "checkpoints").glob(".*"))


def test_two_runs_cannot_write_into_one_folder(tmp_path):
    first = Run(tmp_path / "run", "steps=4000", *SMALL)
    first.wait_for(lambda: first.steps() >= 1)
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True, exist_ok=True)
    second = Run(tmp_path / "run", "--resume", "steps=4000", *SMALL)
    assert second.wait() == [2]
    assert "another process is writing there" in second.text and "Traceback" not in second.text
    first.kill()


def test_a_run_changes_its_ranks_and_its_stage(copy, whole):
    # A large epsilon makes the step a smooth function of the gradient.
    smooth = (*SMALL, "eps=1e-2")
    run_dir = copy.parent / "first"
    finished(Run(run_dir, "steps=2", "save_every=2", *smooth, world=2, stage=2))
    expected = copy.parent / "expected"
    shutil.copytree(run_dir, expected)
    finished(Run(expected, "--resume", "steps=4", "save_every=2", *smooth, world=2, stage=2))
    sizes = [option for option in smooth if not option.startswith("micro_batch")]
    finished(Run(run_dir, "--resume", "--reshape", "steps=3", "save_every=1", *sizes, world=1, stage=3))
    finished(Run(run_dir, "--resume", "--reshape", "steps=4", "save_every=1", *sizes, world=2, stage=1))
    for found, wanted in zip(rows(run_dir), rows(expected), strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6), wanted["step"]


def unreadable():
    import train.data.scenes

    def pair(self, index, pick):
        from train.data.sample import BadSample

        if index % 3 == 0:
            raise BadSample("planted fault", str(index))
        return original(self, index, pick)

    original = train.data.scenes.Scenes.pair
    train.data.scenes.Scenes.pair = pair


def test_a_source_that_loses_too_much_ends_the_run(tmp_path):
    run = Run(tmp_path / "run", "steps=40", *SMALL, prepare=unreadable)
    assert run.wait() == [3]
    assert "training samples cannot be used, data.max_left_out is 0.1" in run.text and "planted fault" in run.text


def test_the_manifest_of_a_run_is_plain_data(whole):
    body = json.loads((whole / "checkpoints" / "step_00000006" / "manifest.json").read_text())["body"]
    assert (body["step"], body["ranks"], body["stage"]) == (6, 1, 2)
