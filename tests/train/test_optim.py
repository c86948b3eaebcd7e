"""Schedules, and the clamp of the logit scale."""

import itertools
import math
import sys
import types

import pytest
import torch

from train.config import OptimizerConfig, ScheduleConfig
from train.lamb import Lamb, lamb_class
from train.optim import adamw_class, build_optimizer, learning_rate_factor, set_learning_rate


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


def _trajectory(make, steps: int = 20) -> list[torch.Tensor]:
    """Parameters after AdamW steps on a quadratic whose minimum moves."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (7, 64)]
    optimizer = make([{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}])
    for step in range(steps):
        optimizer.zero_grad()
        sum((p - math.sin(step)).square().sum() for p in parameters).backward()
        optimizer.step()
    return [p.detach() for p in parameters]


def test_the_fused_optimizer_takes_the_trajectory_of_the_plain_one():
    options = {"lr": 0.05, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
    plain = _trajectory(lambda groups: torch.optim.AdamW(groups, foreach=False, fused=False, **options))
    config = OptimizerConfig(lr=0.05, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    for got, expected in zip(_trajectory(lambda groups: build_optimizer(groups, config)), plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def _modules(monkeypatch, **members) -> type:
    """Stand-ins for compiled packages; the class that they hand out."""
    fused = type("FusedAdam", (torch.optim.AdamW,), {})
    for name in members["names"]:
        module = types.ModuleType(name)
        module.FusedAdam = fused
        monkeypatch.setitem(sys.modules, name, module)
    return fused


def test_on_cuda_nvidias_apex_comes_first_and_its_namesake_is_not_taken(monkeypatch):
    fused = _modules(monkeypatch, names=["apex", "apex.optimizers"])
    monkeypatch.setitem(sys.modules, "amp_C", None)
    assert adamw_class(on_cuda=True).func is torch.optim.AdamW
    monkeypatch.setitem(sys.modules, "amp_C", types.ModuleType("amp_C"))
    assert adamw_class(on_cuda=True).func is fused
    assert adamw_class(on_cuda=False).func is torch.optim.AdamW


def test_on_cuda_deepspeeds_is_taken_where_it_was_built(monkeypatch):
    monkeypatch.setitem(sys.modules, "amp_C", None)
    built = types.ModuleType("deepspeed.git_version_info")
    built.installed_ops = {"fused_adam": True}
    monkeypatch.setitem(sys.modules, "deepspeed.git_version_info", built)
    fused = _modules(monkeypatch, names=["deepspeed.ops.adam"])
    assert adamw_class(on_cuda=True).func is fused
    built.installed_ops = {"fused_adam": False}
    assert adamw_class(on_cuda=True).func is torch.optim.AdamW


@pytest.mark.gpu
def test_every_optimizer_at_hand_takes_the_trajectory_of_the_plain_one_on_cuda():
    options = {"lr": 0.05, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
    plain = _trajectory(lambda groups: torch.optim.AdamW(groups, foreach=False, fused=False, **options))

    def on_cuda(groups):
        for group in groups:
            for p in group["params"]:
                p.data = p.data.cuda()
        return adamw_class(on_cuda=True)(groups, **options)

    for got, expected in zip(_trajectory(on_cuda), plain, strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-6)


def _lamb(groups, steps: int) -> list[torch.Tensor]:
    """Algorithm 2, written out in fp64: groups are (start, gradients of each step, weight decay)."""
    lr, b1, b2, eps = 0.05, 0.9, 0.98, 1e-6
    found = []
    for p, gradients, wd in groups:
        p, m, v = p.double(), 0.0, 0.0
        for t in range(1, steps + 1):
            g = gradients[t - 1].double()
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            u = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps) + wd * p
            ratio = p.norm() / u.norm() if wd and p.norm() > 0 and u.norm() > 0 else 1.0
            p = p - lr * ratio * u
        found.append(p)
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_lamb_takes_the_steps_of_its_paper(device):
    generator = torch.Generator().manual_seed(0)
    # The second starts at nothing, the third has no decay: neither is scaled at first.
    starts = [torch.randn(7, 3, generator=generator), torch.zeros(5), torch.randn(4, generator=generator)]
    decays, steps = [0.1, 0.1, 0.0], 12
    gradients = [[torch.randn(p.shape, generator=generator) for _ in range(steps)] for p in starts]
    params = [torch.nn.Parameter(p.clone().to(device)) for p in starts]
    groups = [{"params": [p], "weight_decay": wd} for p, wd in zip(params, decays)]
    config = OptimizerConfig(name="lamb", lr=0.05, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    optimizer = build_optimizer(groups, config)
    for step in range(steps):
        for p, of_step in zip(params, gradients):
            p.grad = of_step[step].to(device)
        optimizer.step()
    for p, expected in zip(params, _lamb(zip(starts, gradients, decays), steps), strict=True):
        torch.testing.assert_close(p.detach().cpu().double(), expected, rtol=1e-5, atol=1e-6)


def test_nvidias_lamb_is_taken_on_cuda_and_clips_nothing(monkeypatch):
    module = types.ModuleType("apex.optimizers")
    module.FusedLAMB = type("FusedLAMB", (Lamb,), {})
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    monkeypatch.setitem(sys.modules, "amp_C", None)
    assert lamb_class(on_cuda=True) is Lamb
    monkeypatch.setitem(sys.modules, "amp_C", types.ModuleType("amp_C"))
    taken = lamb_class(on_cuda=True)
    assert taken.func is module.FusedLAMB and taken.keywords == {"max_grad_norm": math.inf}
    assert lamb_class(on_cuda=False) is Lamb
