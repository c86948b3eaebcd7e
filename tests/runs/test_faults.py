"""What befalls a run's checkpoints, numbers and data: damage, planted code, steps that are not finite, lost samples."""

import json
import os
import random
import re
import shutil

import pytest
import torch

from tests.runs.faults import SMALL, Run, finished, rows, sized
from tests.runs.plants import BrokenImages, fp32_weights, unreadable
from tests.train.data.folders import sample_members, write_tar
from train.checkpoints import newest_sound
from train.data import open_dataset, readable
from train.data.prepare import main as prepare
from train.durable import faults
from train.run_folder import checkpoint_steps

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


@pytest.mark.run
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(copy, whole):
    damaged = copy / "checkpoints" / "step_00000006" / "mp_rank_00_model_states.pt"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    run = finished(Run(copy, *longer()))
    assert "step_00000006/mp_rank_00_model_states.pt: content differs from its digest" in run.text
    assert "resuming at step 4" in run.text
    assert rows(copy)[:4] == rows(whole)[:4] and len(rows(copy)) == 8


@pytest.mark.run
def test_a_run_whose_checkpoints_are_all_damaged_stops(copy):
    for step in checkpoint_steps(copy):
        os.truncate(copy / "checkpoints" / f"step_{step:08d}" / "mp_rank_00_model_states.pt", 100)
    before = rows(copy)
    run = Run(copy, *longer())
    assert run.wait() == [3]
    assert "every checkpoint is damaged, nothing is resumed" in run.text
    assert "step_00000002/mp_rank_00_model_states.pt: 100 bytes" in run.text and "Traceback" not in run.text
    assert rows(copy) == before


@pytest.mark.run
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


@pytest.mark.run
def test_code_in_a_checkpoint_is_not_run(copy, tmp_path):
    from train.durable import read_manifest, record, write_manifest

    marker, folder = tmp_path / "marker", copy / "checkpoints" / "step_00000006"
    sound = tmp_path / "sound"
    shutil.copytree(folder, sound)
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
    # By way of DeepSpeed's converter, under a name that it alone would read.
    other = tmp_path / "other"
    shutil.copytree(copy, other)
    there = other / "checkpoints" / folder.name
    shutil.copy(there / "mp_rank_00_model_states.pt", there / "mp_rank_99")
    for name in files:
        shutil.copy(sound / name, there / name)
    write_manifest(there, facts, {name: record(there / name) for name in (*files, "mp_rank_99")})
    run = Run(other, *longer("--reshape"), stage=1)
    assert run.wait() == [3] and not marker.exists()
    assert "could run code; refused" in run.text and "Traceback" not in run.text
    run = Run(copy, *longer("--trust-checkpoint"))
    run.wait()
    assert marker.exists()


@pytest.mark.parametrize(
    ("stage", "accumulation"),
    [
        pytest.param(*case, marks=pytest.mark.run if case == (2, 1) else pytest.mark.faults)
        for case in ((2, 1), (1, 2), (3, 1), (3, 2))
    ],
)
def test_a_batch_that_is_not_finite_is_left_out_by_all_ranks(tmp_path, stage, accumulation):
    options = ("steps=5", "save_every=1", "keep_last=5", f"accumulation={accumulation}", *SMALL)
    number = 2 * accumulation
    prepare = BrokenImages(1, number, number + 1)
    run = finished(Run(tmp_path / "run", *options, world=2, stage=stage, prepare=prepare))
    assert [row["skipped"] for row in rows(tmp_path / "run")] == [0, 0, 1, 1, 1]
    assert "step 3 left out, its gradient is not finite: rank 1, batch 2 of epoch 0 (" in run.text
    assert all(row["loss"] is not None for row in rows(tmp_path / "run")[3:])
    before, left_out, after = (fp32_weights(tmp_path / "run", step) for step in (2, 3, 4))
    assert all(torch.equal(before[name], left_out[name]) for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.run
def test_ten_steps_in_a_row_that_are_not_finite_end_the_run(tmp_path):
    run = Run(tmp_path / "run", "steps=40", *SMALL, prepare=BrokenImages(0, 2, 100))
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


@pytest.mark.run
def test_a_weight_that_is_not_finite_ends_the_run_within_a_step(tmp_path):
    run = Run(tmp_path / "run", "steps=40", *SMALL, prepare=nan_weight)
    assert run.wait() == [3]
    assert "step 4: weight " in run.text and " is not finite" in run.text


@pytest.mark.run
def test_a_run_changes_its_ranks_and_its_stage(copy, whole):
    # A large epsilon makes the step a smooth function of the gradient.
    smooth = (*SMALL, "eps=1e-2")
    run_dir = copy.parent / "first"
    finished(Run(run_dir, "steps=2", "save_every=2", *smooth, world=2, stage=2))
    expected = copy.parent / "expected"
    shutil.copytree(run_dir, expected)
    finished(Run(expected, "--resume", "steps=5", "save_every=2", *smooth, world=2, stage=2))
    sizes = [option for option in smooth if not option.startswith("micro_batch")]
    finished(Run(run_dir, "--resume", "--reshape", "steps=3", "save_every=1", *sizes, world=1, stage=3))
    # The second step's loss is that of weights which the moments of the first one moved.
    finished(Run(run_dir, "--resume", "--reshape", "steps=5", "save_every=1", *sizes, world=2, stage=1))
    for found, wanted in zip(rows(run_dir), rows(expected), strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6), wanted["step"]


@pytest.mark.run
def test_a_source_that_loses_too_much_ends_the_run(tmp_path):
    run = Run(tmp_path / "run", "steps=40", *SMALL, prepare=unreadable)
    assert run.wait() == [3]
    assert "training samples cannot be used, data.max_left_out is 0.1" in run.text and "planted fault" in run.text


@pytest.mark.run
def test_ranks_share_shards_of_unequal_size_and_damage(tmp_path):
    first, sizes = 0, (30, 3, 15)
    for number, size in enumerate(sizes):
        members = [m for n in range(first, first + size) for m in sample_members(n)]
        write_tar(tmp_path / "shards" / f"{number:03d}.tar", members)
        first += size
    shards = f"{tmp_path / 'shards'}/{{000..002}}.tar"
    assert prepare(["--index", shards, str(tmp_path / "shards" / "index.json"), "--workers", "1"]) == 0
    last = tmp_path / "shards" / "002.tar"
    os.truncate(last, last.stat().st_size // 2)
    write_tar(tmp_path / "val.tar", [m for n in range(100, 104) for m in sample_members(n)])
    options = ("steps=12", "max_left_out=0.5", f"data.val={tmp_path / 'val.tar'}", *sized(f"--data={shards}"))
    run = finished(Run(tmp_path / "run", *options, world=2))
    assert len(rows(tmp_path / "run")) == 12
    # Two epochs of six steps of two ranks show every sample.
    good = len(list(readable(open_dataset(shards, whole=True))))
    # The first such line tells what was seen when the shards were opened.
    line = [line for line in run.text.splitlines() if line.startswith("left out: ")][-1]
    assert good < sum(sizes) and good + sum(map(int, re.findall(r"(\d+) x lost", line))) == sum(sizes), line


@pytest.mark.run
def test_a_run_without_a_checkpoint_is_started_anew_when_asked(tmp_path):
    run_dir = tmp_path / "run"
    first = Run(run_dir, "steps=4000", "save_every=4000", *SMALL)
    first.wait_for(lambda: first.steps() >= 1)
    first.kill()
    for option in ("--resume", None):
        refused = Run(run_dir, *filter(None, (option,)), "steps=2", *SMALL)
        assert refused.wait() == [2] and "--restart" in refused.text and refused.text.count("\n") == 1
    (run_dir / "tokenizer.json").write_text("{")
    finished(Run(run_dir, "--restart", "steps=2", *SMALL))
    assert [row["step"] for row in rows(run_dir)] == [1, 2] and checkpoint_steps(run_dir) == [2]
    refused = Run(run_dir, "--restart", "steps=2", *SMALL)
    assert refused.wait() == [2] and "already holds a run; use --resume" in refused.text


@pytest.mark.run
def test_damage_of_every_file_of_a_checkpoint_is_seen(copy):
    folder, draw = copy / "checkpoints" / "step_00000006", random.Random(0)
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 3
    for name in names:
        content = (folder / name).read_bytes()
        for size in (0, len(content) // 2, len(content) - 1):
            (folder / name).write_bytes(content[:size])
            assert [fault.file for fault in faults(folder)] == [name], size
        for bit in draw.sample(range(8 * len(content)), 8):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(damaged)
            assert [fault.file for fault in faults(folder)] == [name], bit
        (folder / name).write_bytes(content)
    assert faults(folder) == []


@pytest.mark.run
def test_the_manifest_of_a_run_is_plain_data(whole):
    body = json.loads((whole / "checkpoints" / "step_00000006" / "manifest.json").read_text())["body"]
    assert (body["step"], body["ranks"], body["stage"]) == (6, 1, 2)
