"""Runs that are killed anywhere go on as if they had not been."""

import itertools
import os
import random
import signal

import pytest
import torch

from tests.runs.faults import SMALL, Run, finished, rows
from tests.runs.plants import fp32_weights
from train.run_folder import checkpoint_steps

STEPS, EVERY = 12, 3
RANDOM = random.Random(0)
FORMS = list(itertools.product((1, 2, 3), (1, 2), (0, 2)))
# (killed behind this step, ZeRO stage, accumulation, loader workers, ranks)
POINTS = [(RANDOM.randint(4, 11), *FORMS[i % 12], 1 + (i + i // 12) % 2) for i in range(20)]
FEW = {0, 2, 4, 7, 8, 10}
# ZeRO stage, accumulation, workers and ranks of the run that is killed while it saves, and the places of the save.
SAVED = (2, 1, 0, 1)
PLACES = 13


def options(accumulation: int, workers: int) -> list[str]:
    sizes = [option for option in SMALL if not option.startswith("workers")]
    return [f"steps={STEPS}", f"save_every={EVERY}", f"accumulation={accumulation}", f"workers={workers}", *sizes]


def weights(run_dir) -> dict[str, torch.Tensor]:
    """The fp32 weights of the last checkpoint, without the padding of their partitions."""
    return fp32_weights(run_dir, STEPS)


@pytest.fixture(scope="module")
def folders():
    """Where the runs of `fault_free` lie."""
    return {}


@pytest.fixture(scope="module")
def fault_free(tmp_path_factory, folders):
    """Rows and final weights of runs that nothing befalls, one for each configuration."""
    known: dict[tuple, tuple] = {}

    def get(stage: int, accumulation: int, workers: int, world: int):
        key = (stage, accumulation, workers, world)
        if key not in known:
            run_dir = folders[key] = tmp_path_factory.mktemp("whole") / "run"
            counts = DieAt(None) if key == SAVED else None
            finished(Run(run_dir, *options(accumulation, workers), world=world, stage=stage, prepare=counts))
            known[key] = rows(run_dir), weights(run_dir)
        return known[key]

    return get


def _few(numbers, most):
    return [pytest.param(n, marks=pytest.mark.run if n in most else pytest.mark.faults) for n in numbers]


@pytest.mark.parametrize("number", _few(range(len(POINTS)), FEW))
def test_a_killed_run_resumes_bit_for_bit(tmp_path, fault_free, number):
    point, stage, accumulation, workers, world = POINTS[number]
    expected, expected_weights = fault_free(stage, accumulation, workers, world)
    run_dir = tmp_path / "run"
    run = Run(run_dir, *options(accumulation, workers), world=world, stage=stage)
    run.wait_for(lambda: run.steps() >= point)
    run.kill()
    finished(Run(run_dir, "--resume", *options(accumulation, workers), world=world, stage=stage))
    assert rows(run_dir) == expected
    found = weights(run_dir)
    assert found.keys() == expected_weights.keys() and found
    assert all(torch.equal(found[name], expected_weights[name]) for name in found)


class DieAt:
    """Ends the process before one of the calls by which its second checkpoint comes to the disk.

    Args:
        place: of the call, from 0; None lets the process live and writes down how many calls there were.
    """

    def __init__(self, place: int | None) -> None:
        self.place = place

    def __call__(self) -> None:
        import train.checkpoints

        calls = 0
        original = train.checkpoints.save_checkpoint

        def counted(function):
            def wrapper(*args, **kwargs):
                nonlocal calls
                if calls == self.place:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1
                return function(*args, **kwargs)

            return wrapper

        def save(engine, run_dir, *, step, **kwargs):
            if step != 2 * EVERY:
                return original(engine, run_dir, step=step, **kwargs)
            real = torch.save, os.fsync, os.replace
            torch.save, os.fsync, os.replace = map(counted, real)
            saved = original(engine, run_dir, step=step, **kwargs)
            torch.save, os.fsync, os.replace = real
            (run_dir / "calls").write_text(str(calls))
            return saved

        train.checkpoints.save_checkpoint = save


@pytest.mark.parametrize("place", _few(range(PLACES), {4}))
def test_a_run_killed_while_it_saves_resumes_from_a_sound_checkpoint(tmp_path, fault_free, place):
    expected, expected_weights = fault_free(*SAVED)
    run_dir = tmp_path / "run"
    run = Run(run_dir, *options(1, 0), prepare=DieAt(place))
    assert run.wait() == [-signal.SIGKILL]
    assert checkpoint_steps(run_dir)[-1] in (EVERY, 2 * EVERY)
    finished(Run(run_dir, "--resume", *options(1, 0)))
    assert rows(run_dir) == expected
    found = weights(run_dir)
    assert found and all(torch.equal(found[name], expected_weights[name]) for name in found)
    assert not list((run_dir / "checkpoints").glob(".*"))


@pytest.mark.run
def test_a_save_has_all_the_places_at_which_it_is_killed(fault_free, folders):
    fault_free(*SAVED)
    assert int((folders[SAVED] / "calls").read_text()) == PLACES


@pytest.mark.run
def test_a_request_to_stop_is_saved_at_most_a_step_later(tmp_path, fault_free):
    expected, expected_weights = fault_free(2, 1, 0, 2)
    run_dir = tmp_path / "run"
    run = Run(run_dir, *options(1, 0), world=2)
    run.wait_for(lambda: run.steps() >= 4)
    run.signal(1, signal.SIGTERM)
    seen = run.steps()
    assert run.wait() == [75, 75], run.text
    assert "stopped on request after step" in run.text
    # The step under way may end, and one more may follow.
    assert checkpoint_steps(run_dir)[-1] == run.steps() <= seen + 3
    finished(Run(run_dir, "--resume", *options(1, 0), world=2))
    assert rows(run_dir) == expected
    found = weights(run_dir)
    assert found and all(torch.equal(found[name], expected_weights[name]) for name in found)


@pytest.mark.faults
def test_a_long_run_keeps_its_memory_and_its_files(tmp_path):
    import psutil

    run_dir = tmp_path / "run"
    run = Run(run_dir, "steps=2000", "save_every=250", "keep_last=2", *SMALL)
    process = psutil.Process(run.ranks[0].pid)

    def held() -> tuple[int, int]:
        return process.memory_info().rss, process.num_fds()

    run.wait_for(lambda: run.steps() >= 600, timeout_s=300)
    early = held()
    run.wait_for(lambda: run.steps() >= 1900, timeout_s=600)
    late = held()
    finished(run, timeout_s=300)
    mib = [round(rss / 2**20, 1) for rss, _ in (early, late)]
    print(f"MiB at steps 600 and 1900: {mib}, open files {early[1]} and {late[1]}")
    assert late[0] < 1.02 * early[0] and late[1] == early[1], (early, late)
    assert checkpoint_steps(run_dir) == [1750, 2000]
