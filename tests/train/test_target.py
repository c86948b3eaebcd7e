"""The averaged encoder whose features TG-MIM predicts: under every ZeRO stage that of one process of plain torch."""

import copy
import os
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from sycoca.config import ConfigError
from sycoca.contrast import Spread
from sycoca.losses import feature_targets
from sycoca.masking import StepPlan
from sycoca.model import parameter_groups
from tests.ranks import run_ranks
from tests.sycoca.micro import ATTENTIVE, batch, build, micro
from train.command_line import apply_overrides
from train.config import PRESETS, OptimizerConfig
from train.ema import keep_average
from train.engine import import_deepspeed
from train.optim import build_optimizer

# With so large an epsilon AdamW's step is nearly proportional to the gradient, so that an error in it shows.
OPTIMIZER = OptimizerConfig(lr=0.5, eps=1.0, weight_decay=0.1)
CONFIG = micro(loss={"tgmim_kind": "ema_features"})
# TG-MIM begins in the second step: until then its parameters have no gradient.
PLANS = [StepPlan(False, False, reconstruct=False), ATTENTIVE, ATTENTIVE]
LENGTHS = [3, 7, 1, 5, -1, 2, 0, 6]
# So that both of its terms are the larger one once.
DECAY = 0.28


class Case(NamedTuple):
    """ZeRO stage, parts of a step, whether the model is in bf16 and the optimizer's states are offloaded."""

    stage: int
    parts: int
    bf16: bool = False
    offload: bool = False


def average_of(history: list[dict], step: int) -> dict:
    """The average after `step` steps of the weights after each of them."""
    if step == 0:
        return history[0]
    average = history[1]
    for number in range(2, step + 1):
        share = max(1 - DECAY, 9 / (10 + number))
        average = {name: old + share * (history[number][name] - old) for name, old in average.items()}
    return average


def plain() -> list[dict]:
    """Weights before the first step and after each, by plain torch."""
    model = build(CONFIG)
    optimizer = build_optimizer(parameter_groups(model, OPTIMIZER.weight_decay), OPTIMIZER)
    history = [{name: p.detach().clone() for name, p in model.named_parameters()}]
    for step, plan in enumerate(PLANS):
        data, teacher = batch(LENGTHS, salt=5 + step), copy.deepcopy(model)
        teacher.load_state_dict(average_of(history, step))
        with torch.no_grad():
            data = data._replace(targets=feature_targets(teacher.encode_image(data.images).patches))
        optimizer.zero_grad()
        model(data, plan).total.backward()
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        optimizer.step()
        history.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return history


def under_zero(rank: int, world: int, cases: list[Case]) -> list[tuple[list[dict], dict, list[int]]]:
    """For each case the fp32 weights before and after each step, and the encoder's average at the end."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    deepspeed = import_deepspeed()
    return [trained(deepspeed, rank, world, case) for case in cases]


def trained(deepspeed, rank: int, world: int, case: Case):
    from deepspeed.utils import safe_get_full_fp32_param

    from train.target import TargetEncoder
    from train.two_pass import take_step

    model = build(CONFIG)
    optimizer = build_optimizer(parameter_groups(model, OPTIMIZER.weight_decay), OPTIMIZER)
    keep_average(optimizer, DECAY)
    share = len(LENGTHS) // world
    offload = {"offload_optimizer": {"device": "cpu"}} if case.offload else {}
    config = {
        "train_micro_batch_size_per_gpu": share // case.parts,
        "gradient_accumulation_steps": case.parts,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 0, **offload},
        "bf16": {"enabled": case.bf16},
        # As a run has it: the optimizer is the project's own.
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    before, device = torch.get_rng_state(), torch.device("cpu")
    target = TargetEncoder(engine, CONFIG, device)
    assert torch.equal(before, torch.get_rng_state())
    spread = Spread(dist.group.WORLD, [share] * world)

    def weights() -> dict:
        # Without ZeRO they are fp32 themselves.
        whole = safe_get_full_fp32_param if case.stage else lambda p: p
        return {name: whole(p).detach().view(shapes[name]).clone() for name, p in engine.module.named_parameters()}

    shapes = {name: p.shape for name, p in build(CONFIG).named_parameters()}
    history = [weights()]
    for step, plan in enumerate(PLANS):
        whole = batch(LENGTHS, salt=5 + step)
        if case.bf16:
            whole = whole._replace(images=whole.images.bfloat16())
        size = share // case.parts
        starts = range(rank * share, (rank + 1) * share, size)
        parts = [type(whole)(*(None if t is None else t[at : at + size] for t in whole)) for at in starts]
        take_step(engine, parts, plan, spread, device, target)
        history.append(weights())
    target.refresh()
    return history, {f"vision.{name}": p.clone() for name, p in target.vision.named_parameters()}


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (1, [Case(0, 2), Case(1, 1)]),
        (2, [Case(2, 1), Case(3, 1)]),
        pytest.param(1, [Case(2, 2), Case(3, 2)], marks=pytest.mark.full),
        pytest.param(2, [Case(0, 1), Case(1, 2), Case(2, 1, True), Case(3, 1, True)], marks=pytest.mark.full),
        pytest.param(2, [Case(2, 2, offload=True), Case(3, 1, offload=True)], marks=pytest.mark.full),
    ],
)
def test_every_stage_takes_the_steps_and_averages_of_one_process(world, cases):
    expected = plain()
    for ranks in run_ranks(under_zero, world, cases, timeout_s=120):
        for case, (history, average) in zip(cases, ranks, strict=True):
            assert history[0].keys() == expected[0].keys() and len(history) == len(expected)
            if not case.bf16:
                for step, (found, wanted) in enumerate(zip(history, expected)):
                    for name, value in wanted.items():
                        where = f"{case}, step {step}, {name}: "
                        torch.testing.assert_close(
                            found[name], value, rtol=1e-5, atol=4e-6, msg=lambda text, where=where: where + text
                        )
            # Of the fp32 weights, whatever the model computes in.
            wanted = average_of(history, len(PLANS))
            for name, value in average.items():
                torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-7)
            assert any(not torch.equal(value, history[-1][name]) for name, value in average.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "averaged weights sees; train.ema=0.999 keeps the average"),
        ({"train.ema": 0.999, "train.freeze": ["vision"]}, "averaged weights sees; with train.freeze=vision there is"),
    ],
)
def test_features_need_an_average_that_moves(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        apply_overrides(PRESETS["tiny"], {"model.loss.tgmim_kind": "ema_features"} | changes)
    assert str(error.value).startswith("model.loss.tgmim_kind: ") and "\n" not in str(error.value)
    # Without TG-MIM there is nothing to predict.
    apply_overrides(PRESETS["tiny"], {"model.loss.tgmim_kind": "ema_features", "model.loss.tgmim_weight": 0.0})
