"""When a step is skipped or told about."""

import torch

from tests.ranks import run_ranks
from train.health import Control, Place, Spikes, broken_weight


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
    negative = Spikes(2.0)
    assert not any(negative.leaps(-1.0) for _ in range(65)) and not negative.leaps(-0.5)


def test_a_place_names_a_few_keys():
    assert str(Place(1, 2, ("a", "b"))) == "batch 2 of epoch 1 (a, b)"
    assert str(Place(1, 2, tuple("abcdef"))) == "batch 2 of epoch 1 (a, b, c and 3 more)"
