"""Disks that are full, folders that refuse, clocks that jump: the checkpoints that are there stay as they are."""

import ctypes
import io
import os
import resource
import shutil
import signal
import time

import pytest

from tests.runs.faults import Run, few, finished, rows, sized
from train.checkpoints import newest_sound
from train.durable import faults
from train.run_folder import checkpoint_steps

SIX = ("steps=6", "save_every=2", "keep_last=5", *sized())
LONGER = ("--resume", "steps=8", "save_every=2", *sized())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps with checkpoints at 2, 4 and 6."""
    return finished(Run(tmp_path_factory.mktemp("whole") / "run", *SIX)).run_dir


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def no_more_than(size: int) -> None:
    # A write beyond this many bytes fails, as on a full disk.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def little_disk():
    no_more_than(100_000)


def little_disk_of_one():
    if os.environ["RANK"] == "1":
        little_disk()


def no_disk():
    no_more_than(1500)


def plain_rights():
    """Takes from root what makes it stand above the permissions of files."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) == 0


@pytest.mark.run
def test_a_full_disk_leaves_earlier_checkpoints_unharmed(copy):
    run = Run(copy, *LONGER, "keep_last=5", prepare=little_disk)
    assert run.wait() == [3]
    assert "checkpoint step_00000008 could not be written: File too large" in run.text, run.text
    assert "Traceback" not in run.text
    assert newest_sound(copy).step == 6 and not list((copy / "checkpoints").glob(".*"))


@pytest.mark.faults
def test_a_full_disk_of_one_rank_is_known_to_all(tmp_path):
    options = ("save_every=2", *sized())
    finished(Run(tmp_path / "run", "steps=2", *options, world=2))
    run = Run(tmp_path / "run", "--resume", "steps=6", *options, world=2, prepare=little_disk_of_one)
    assert run.wait() == [3, 3], run.text
    assert "warning: checkpoint step_00000004 could not be written: File too large" in run.text
    assert "error: checkpoint step_00000006 could not be written: File too large" in run.text
    assert newest_sound(tmp_path / "run").step == 2 and checkpoint_steps(tmp_path / "run") == [2]
    assert len(rows(tmp_path / "run")) == 6 and "Traceback" not in run.text


@pytest.mark.parametrize("world", few(1, 2))
def test_a_disk_without_room_for_the_configuration_ends_all_ranks(tmp_path, world):
    run = Run(tmp_path / "run", "steps=2", *sized(), world=world, prepare=no_disk)
    assert run.wait() == [3] * world, run.text
    assert f"{tmp_path / 'run' / 'config.json'}: File too large" in run.text and "Traceback" not in run.text
    assert not (tmp_path / "run" / "config.json").exists() and run.text.count("error:") == 1


def no_room_for_rows():
    import train.health

    original = train.health.Skips.after

    def after(self, step, *rest):
        if step == 3:
            for number in os.listdir("/proc/self/fd"):
                if os.path.realpath(f"/proc/self/fd/{number}").endswith("metrics.jsonl"):
                    os.dup2(os.open("/dev/full", os.O_WRONLY), int(number))
        return original(self, step, *rest)

    train.health.Skips.after = after


@pytest.mark.parametrize("world", few(1, 2))
def test_figures_that_cannot_be_written_end_all_ranks(tmp_path, world):
    run = Run(tmp_path / "run", "steps=40", "save_every=2", *sized(), world=world, prepare=no_room_for_rows)
    assert run.wait() == [3] * world, run.text
    assert f"{tmp_path / 'run' / 'metrics.jsonl'}: No space left on device" in run.text
    assert run.text.count("error:") == 1 and "Traceback" not in run.text
    # Others hear of it a step later, so another checkpoint may have come to be.
    assert newest_sound(tmp_path / "run").step in (2, 4)
    finished(Run(tmp_path / "run", "--resume", "steps=6", "save_every=2", *sized(), world=world))
    assert rows(tmp_path / "run")[-1]["step"] == 6


@pytest.mark.run
def test_events_that_cannot_be_written_end_the_run(tmp_path):
    run = Run(tmp_path / "run", "steps=40", *sized(), prepare=events_on_a_full_device)
    assert run.wait() == [3], run.text
    assert f"{tmp_path / 'run' / 'tensorboard'}: No space left on device" in run.text
    assert "Traceback" not in run.text and run.text.count("error:") == 1


def events_on_a_full_device():
    import torch.utils.tensorboard

    def fresh(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self._get_file_writer().event_writer._async_writer._writer._writer = full

    full = io.FileIO("/dev/full", "w")
    original = torch.utils.tensorboard.SummaryWriter.__init__
    torch.utils.tensorboard.SummaryWriter.__init__ = fresh


@pytest.mark.run
def test_a_folder_that_cannot_be_written_is_refused(copy):
    before = rows(copy)
    copy.chmod(0o555)
    run = Run(copy, *LONGER, prepare=plain_rights)
    assert run.wait() == [2]
    assert f"--run-dir {copy}: no permission to write" in run.text and run.text.count("\n") == 1
    copy.chmod(0o755)
    assert newest_sound(copy).step == 6 and rows(copy) == before


@pytest.mark.faults
def test_a_folder_that_turns_read_only_costs_no_earlier_checkpoint(copy):
    (copy / "checkpoints").chmod(0o555)
    run = Run(copy, *LONGER, prepare=plain_rights)
    assert run.wait() == [3]
    assert "error: checkpoint step_00000008 could not be written: Permission denied" in run.text
    (copy / "checkpoints").chmod(0o755)
    assert newest_sound(copy).step == 6 and "Traceback" not in run.text


@pytest.mark.run
def test_what_fails_beside_a_checkpoint_is_told_and_the_run_goes_on(copy):
    checkpoints = copy / "checkpoints"
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").mkdir()
    (checkpoints / "step_00000002").chmod(0o555)
    run = finished(Run(copy, *LONGER, "keep_last=1", prepare=plain_rights))
    assert "warning: checkpoints/latest does not name step_00000008: Is a directory" in run.text
    assert "warning: checkpoint step_00000002 could not be removed: Permission denied" in run.text
    assert checkpoint_steps(copy) == [2, 8] and newest_sound(copy).step == 8
    (checkpoints / "step_00000002").chmod(0o755)
    assert faults(checkpoints / "step_00000002") == []


@pytest.mark.run
def test_two_runs_cannot_write_into_one_folder(tmp_path):
    first = Run(tmp_path / "run", "steps=4000", *sized())
    first.wait_for(lambda: first.steps() >= 1)
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True, exist_ok=True)
    second = Run(tmp_path / "run", "--resume", "steps=4000", *sized())
    assert second.wait() == [2]
    assert "another process is writing there" in second.text and "Traceback" not in second.text
    first.kill()


@pytest.mark.run
def test_checkpoints_come_by_the_clock_and_every_so_many_stay(tmp_path):
    finished(Run(tmp_path / "clock", "steps=8", "save_minutes=1e-5", "save_every=1000", "keep_last=20", *sized()))
    # The clock asks behind the first step, and behind each again.
    assert checkpoint_steps(tmp_path / "clock") == list(range(1, 9))
    finished(Run(tmp_path / "kept", "steps=10", "save_every=2", "keep_every=4", "keep_last=1", *sized()))
    assert checkpoint_steps(tmp_path / "kept") == [4, 8, 10]


def jumping_clock():
    import train.health

    offset_s, real = 0.0, time.time
    time.time = lambda: real() + offset_s
    original = train.health.Skips.after

    def after(self, step, *rest):
        nonlocal offset_s
        offset_s = {2: -3e8, 4: 3e8, 5: -3e8}.get(step, offset_s)
        return original(self, step, *rest)

    train.health.Skips.after = after


@pytest.mark.faults
def test_a_clock_that_jumps_changes_nothing(tmp_path):
    options = ("steps=6", "save_every=3", "save_minutes=60", *sized("timeout_s=20"))
    expected = finished(Run(tmp_path / "expected", *options, world=2))
    run = finished(Run(tmp_path / "run", *options, world=2, prepare=jumping_clock))
    assert rows(run.run_dir) == rows(expected.run_dir) and checkpoint_steps(run.run_dir) == [3, 6]
