"""Which checkpoints count, and which are kept."""

from train.checkpoints import newest_checkpoint
from train.run_folder import checkpoint_steps


def test_only_complete_checkpoints_count(tmp_path):
    for name in ("step_00000010", "step_00000002", ".partial", "step_7", "latest"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint_steps(tmp_path) == [2, 10]
    assert newest_checkpoint(tmp_path) == 10


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert checkpoint_steps(tmp_path) == []
