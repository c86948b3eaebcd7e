"""Schedules, and the clamp of the logit scale."""

import itertools
import math

import pytest
import torch

from train.config import OptimizerConfig, ScheduleConfig
from train.optim import build_optimizer, learning_rate_factor, set_learning_rate


def factors(name, total=100, **options):
    config = ScheduleConfig(name=name, warmup_steps=10, **options)
    return [learning_rate_factor(config, step, total) for step in range(total + 1)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_is_linear_and_starts_above_zero(name):
    assert factors(name)[:10] == [(step + 1) / 10 for step in range(10)]


def test_cosine_is_half_way_at_the_middle_and_ends_at_the_final_share():
    values = factors("cosine", final_share=0.1)
    assert values[55] == pytest.approx(0.55) and values[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))


def test_linear_falls_evenly():
    values = factors("linear")
    assert {round(a - b, 9) for a, b in itertools.pairwise(values[10:])} == {round(1 / 90, 9)}


def test_warm_up_stable_decay_is_flat_and_then_decays_over_its_share():
    values = factors("wsd", decay_share=0.2)
    assert set(values[10:81]) == {1.0} and values[90] == pytest.approx(0.5) and values[100] == 0


def test_constant_stays():
    assert set(factors("constant")[10:]) == {1.0}


def test_learning_rate_respects_the_scale_of_a_group():
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = build_optimizer(
        [{"params": parameters[:1]}, {"params": parameters[1:], "lr_scale": 0.5}], OptimizerConfig()
    )
    set_learning_rate(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]


def test_clamp_acts_after_the_step_and_only_on_its_group():
    scale, other = (torch.nn.Parameter(torch.tensor([value])) for value in (math.log(200.0), 9.0))
    groups = [{"params": [other]}, {"params": [scale], "max_value": math.log(100.0), "weight_decay": 0.0}]
    optimizer = build_optimizer(groups, OptimizerConfig(lr=1e-3))
    (-scale.sum() - other.sum()).backward()
    optimizer.step()
    assert scale.item() == pytest.approx(math.log(100.0)) and scale.item() <= math.log(100.0) + 1e-6
    assert other.item() > 8.9
