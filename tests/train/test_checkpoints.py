"""Which checkpoints count, and which are kept."""

import pytest

from train.checkpoints import CheckpointError, Kept, newest_sound, tag
from train.durable import record, write_manifest
from train.run_folder import checkpoint_steps


def checkpoint(run_dir, step: int, content: bytes = b"state"):
    folder = run_dir / "checkpoints" / tag(step)
    folder.mkdir(parents=True)
    (folder / "model.pt").write_bytes(content)
    write_manifest(folder, {"step": step, "ranks": 2, "stage": 3}, {"model.pt": record(folder / "model.pt")})
    return folder


def test_only_complete_checkpoints_count(tmp_path):
    for name in ("step_00000010", "step_00000002", ".partial", "step_7", "latest"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint_steps(tmp_path) == [2, 10]


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert checkpoint_steps(tmp_path) == []
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        newest_sound(tmp_path)


def test_the_newest_sound_one_is_chosen_and_damaged_ones_are_named(tmp_path):
    for step in (3, 6, 9):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoints" / tag(9) / "model.pt").write_bytes(b"stats")
    chosen = newest_sound(tmp_path)
    assert (chosen.step, chosen.ranks, chosen.stage) == (6, 2, 3)
    assert [str(fault) for fault in chosen.damaged[9]] == ["model.pt: content differs from its digest"]


def test_a_checkpoint_under_another_name_is_not_taken(tmp_path):
    checkpoint(tmp_path, 3).rename(tmp_path / "checkpoints" / tag(4))
    with pytest.raises(CheckpointError, match="is that of step 3"):
        newest_sound(tmp_path)


@pytest.mark.parametrize(
    ("kept", "dropped"),
    [(Kept(2), [10, 20, 30]), (Kept(2, every=20), [10, 30]), (Kept(5), []), (Kept(1, every=1), [])],
)
def test_the_last_and_every_so_many_are_kept(kept, dropped):
    assert kept.dropped([10, 20, 30, 40, 50]) == dropped
