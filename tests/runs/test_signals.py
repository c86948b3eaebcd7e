"""Runs that are told to end, whose ranks die or fall silent, and what they leave behind."""

import json
import os
import signal
import time

import psutil
import pytest

from tests.runs.faults import Run, few, finished, rows, sized
from train.run_folder import checkpoint_steps

ENDLESS = ("steps=4000", "save_every=4000")


@pytest.mark.run
def test_a_killed_rank_is_named_and_ends_the_others(tmp_path):
    run = Run(tmp_path / "run", *ENDLESS, *sized("workers=1"), world=2)
    run.wait_for(lambda: run.steps() >= 2)
    run.signal(1, signal.SIGKILL)
    started = time.monotonic()
    run.ranks[0].join(20)
    taken_s = time.monotonic() - started
    assert run.ranks[0].exitcode == 4 and "rank 1 does not answer" in run.text, run.text
    print(f"the other rank ended after {taken_s:.2f} s")
    assert taken_s < 5
    # The loader's workers of the killed rank look for it every few seconds.
    assert run.left_behind() == []


def dead_at_the_start():
    import train.checkpoints

    original = train.checkpoints.prepare

    def prepare(engine, **trusted):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(engine, **trusted)

    train.checkpoints.prepare = prepare


@pytest.mark.run
def test_a_rank_that_dies_before_the_first_step_ends_the_others(tmp_path):
    started = time.monotonic()
    run = Run(tmp_path / "run", *ENDLESS, *sized(), world=2, prepare=dead_at_the_start)
    assert run.wait(30) == [4, -signal.SIGKILL], run.text
    assert "error: rank 0: another rank is gone: " in run.text and "Traceback" not in run.text
    assert time.monotonic() - started < 30 and run.left_behind() == []


class Timeouts:
    """Writes down how long each process group waits."""

    def __init__(self, path) -> None:
        self.path = path

    def __call__(self) -> None:
        import torch
        from torch.distributed import distributed_c10d

        import train.health

        original = train.health.Skips.after

        def after(skips, *rest):
            groups = distributed_c10d._world.pg_map
            waits = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
            self.path.write_text(json.dumps([wait.total_seconds() for wait in waits]))
            return original(skips, *rest)

        train.health.Skips.after = after


@pytest.mark.run
def test_every_group_of_ranks_has_the_timeout_of_the_run(tmp_path):
    finished(Run(tmp_path / "run", "steps=1", *sized("timeout_s=77"), world=2, prepare=Timeouts(tmp_path / "waits")))
    waits = json.loads((tmp_path / "waits").read_text())
    # The default group, the host's for the verdicts, DeepSpeed's own.
    assert len(waits) >= 3 and set(waits) == {77.0}


@pytest.mark.run
@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_rank_is_named_and_ends_the_others(tmp_path, silent):
    run = Run(tmp_path / "run", *ENDLESS, *sized("timeout_s=3"), world=2)
    run.wait_for(lambda: run.steps() >= 2)
    run.signal(silent, signal.SIGSTOP)
    started = time.monotonic()
    other = run.ranks[1 - silent]
    other.join(38)
    taken_s = time.monotonic() - started
    assert other.exitcode == 4, run.text
    assert f"rank {silent} has not answered" in run.text or f"rank {silent} does not answer" in run.text
    print(f"the other rank ended after {taken_s:.2f} s")
    assert taken_s < 3 + 35
    run.kill()


@pytest.mark.parametrize("world", few(1, 2))
def test_a_rank_whose_data_does_not_come_ends(tmp_path, world):
    run = Run(tmp_path / "run", *ENDLESS, *sized("timeout_s=3", "workers=1"), world=world)
    run.wait_for(lambda: run.steps() >= 2)
    (worker,) = psutil.Process(run.ranks[-1].pid).children()
    worker.suspend()
    started = time.monotonic()
    codes = run.wait(3 + 35)
    assert codes == [4] * (world - 1) + [3], run.text
    assert f"error: rank {world - 1}: no data has come for" in run.text and "Traceback" not in run.text
    assert world == 1 or "rank 1 does not answer" in run.text or "rank 1 has not answered" in run.text
    taken_s = time.monotonic() - started
    print(f"all ranks ended after {taken_s:.2f} s")
    assert taken_s < 3 + 35 and run.left_behind() == []


def holds_folder(run: Run) -> bool:
    return (run.run_dir / "config.json").exists()


@pytest.mark.parametrize("world", few(1, 2))
def test_a_request_to_stop_before_the_first_step_is_saved(tmp_path, world):
    options = ("steps=4", "save_every=2", *sized())
    expected = finished(Run(tmp_path / "expected", *options, world=world))
    run = Run(tmp_path / "run", *options, world=world)
    run.wait_for(lambda: holds_folder(run))
    run.signal(0, signal.SIGTERM)
    assert run.wait() == [75] * world, run.text
    # Other ranks hear of it a step later.
    assert checkpoint_steps(run.run_dir) == [world] and run.steps() == world
    finished(Run(run.run_dir, "--resume", *options, world=world))
    assert rows(run.run_dir) == rows(expected.run_dir)


def slow_export():
    import train.export

    original = train.export.export

    def export(run_dir, out):
        (run_dir / "exporting").touch()
        time.sleep(60)
        return original(run_dir, out)

    train.export.export = export


@pytest.mark.run
def test_a_request_to_stop_after_the_last_step_ends_at_once(tmp_path):
    options = ("steps=2", *sized())
    run = Run(tmp_path / "run", *options, prepare=slow_export)
    run.wait_for(lambda: (run.run_dir / "exporting").exists())
    started = time.monotonic()
    run.signal(0, signal.SIGTERM)
    assert run.wait() == [75] and time.monotonic() - started < 5
    assert "stopped on request after the last step" in run.text and not (run.run_dir / "model").exists()
    finished(Run(run.run_dir, "--resume", *options))
    assert (run.run_dir / "model" / "model.safetensors").exists() and len(rows(run.run_dir)) == 2


@pytest.mark.faults
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_twice_a_rank_ends_whatever_it_waits_for(tmp_path, number, code):
    run = Run(tmp_path / "run", *ENDLESS, *sized("workers=1"), world=2)
    run.wait_for(lambda: run.steps() >= 2)
    # The other rank now waits in a collective.
    run.signal(1, signal.SIGSTOP)
    time.sleep(1)
    run.signal(0, number)
    time.sleep(1.5)
    assert run.ranks[0].is_alive()
    started = time.monotonic()
    run.signal(0, number)
    run.ranks[0].join(10)
    assert run.ranks[0].exitcode == code and time.monotonic() - started < 2
    run.kill()
    assert run.left_behind() == []


@pytest.mark.run
def test_an_interrupted_run_says_so_and_leaves_nothing(tmp_path):
    run = Run(tmp_path / "run", "steps=4000", "save_every=2", *sized("workers=1"), world=2)
    run.wait_for(lambda: run.steps() >= 3)
    for rank in (0, 1):
        run.signal(rank, signal.SIGINT)
    # The one may find the other gone before it finds itself interrupted.
    codes = run.wait(20)
    assert set(codes) <= {130, 4} and 130 in codes, run.text
    assert "Traceback" not in run.text and run.left_behind() == []
    assert checkpoint_steps(run.run_dir)


class StaleLock:
    """What a launch that was killed while it compiled leaves in the user's cache."""

    def __init__(self, home) -> None:
        self.home = home

    def __call__(self) -> None:
        from torch.utils.cpp_extension import _get_build_directory

        os.environ["HOME"] = str(self.home)
        os.environ.pop("TORCH_EXTENSIONS_DIR", None)
        os.environ.pop("XDG_CACHE_HOME", None)
        for operator in ("deepspeed_shm_comm", "cpu_adam", "utils"):
            (type(self.home)(_get_build_directory(operator, False)) / "lock").touch()


@pytest.mark.run
def test_the_lock_of_a_killed_compilation_stops_nobody(tmp_path):
    started = time.monotonic()
    finished(Run(tmp_path / "run", "steps=2", *sized(), world=2, prepare=StaleLock(tmp_path / "home")), 60)
    assert time.monotonic() - started < 60
    cache = tmp_path / "home" / ".cache" / "torch_extensions"
    left = sorted(path.name for path in cache.rglob("*") if path.is_file())
    assert left == ["lock", "lock", "lock"]
