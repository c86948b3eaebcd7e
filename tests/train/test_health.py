"""When a run is stopped, skipped or told about."""

import os
import signal

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from train.exits import EXIT_LOST_RANK, LostRank, StopRun, guarded
from train.health import Control, Heartbeat, Place, Spikes, StopRequest, broken_weight


def test_a_request_is_noted_and_the_signal_given_back():
    before = signal.getsignal(signal.SIGTERM)
    request = StopRequest()
    assert not request.asked
    os.kill(os.getpid(), signal.SIGTERM)
    assert request.asked
    request.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_ranks_learn_what_all_said_a_step_before():
    def said(rank, world):
        control = Control()
        heard = [control.sums(rank == 1 and step == 1, rank) for step in range(4)]
        return heard, control.settle()

    for heard, last in run_ranks(said, 3):
        assert heard == [[0, 0], [0, 3], [1, 3], [0, 3]] and last == [0, 3]


def test_one_rank_hears_itself_at_once():
    assert run_ranks(lambda rank, world: Control().sums(1, 2.5), 1) == [[1, 2.5]]


def test_a_broken_weight_is_known_to_all_ranks():
    def find(rank, world):
        layer = torch.nn.Linear(2, 2)
        if rank == 1:
            torch.nn.init.constant_(layer.bias, float("inf"))
        return broken_weight(layer)

    assert run_ranks(find, 2) == ["bias", "bias"]


def test_a_loss_leaps_above_the_median_of_those_before():
    spikes = Spikes(2.0)
    assert not any(spikes.leaps(1.0) for _ in range(64))
    assert spikes.leaps(2.1) and not spikes.leaps(1.9) and not spikes.leaps(float("nan"))
    assert not Spikes(None).leaps(100.0)
    fresh = Spikes(2.0)
    assert not fresh.leaps(1.0) and not fresh.leaps(100.0)


def test_a_place_names_a_few_keys():
    assert str(Place(1, 2, ("a", "b"))) == "batch 2 of epoch 1 (a, b)"
    assert str(Place(1, 2, tuple("abcdef"))) == "batch 2 of epoch 1 (a, b, c and 3 more)"


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (StopRun("too much"), 3, "error: too much"),
        (StopRun("saved", 75), 75, "error: saved"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory."), 3, "A smaller train.micro_batch needs less"),
    ],
)
def test_what_a_person_can_act_on_is_one_line(capsys, error, code, told):
    def run():
        raise error

    assert guarded(run) == code
    shown = capsys.readouterr().err
    assert told in shown and shown.count("\n") == 1


def test_other_errors_go_through():
    def run():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        guarded(run)


def test_a_guard_without_other_ranks_changes_nothing():
    def inside(rank, world):
        beat = Heartbeat(5.0)
        try:
            with beat.guard():
                raise RuntimeError("a bug")
        except LostRank:
            return "lost"
        except RuntimeError as error:
            return str(error)
        finally:
            beat.close()

    assert run_ranks(inside, 1) == ["a bug"]
    assert LostRank("x").code == EXIT_LOST_RANK and not dist.is_initialized()
