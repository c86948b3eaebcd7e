"""Two ranks under each ZeRO stage against one process of plain torch, and the clamp of the logit scale."""

import math
import os

import pytest
import torch
import torch.distributed as dist

from sycoca.model import SyCoCa, parameter_groups
from tests.ranks import run_ranks
from tests.sycoca.micro import ATTENTIVE, batch, build, micro
from train.config import OptimizerConfig
from train.engine import compile_blocks, import_deepspeed
from train.optim import build_optimizer

# With so large an epsilon AdamW's step is nearly proportional to the gradient, so that an error in it shows.
OPTIMIZER = OptimizerConfig(lr=0.5, eps=1.0, weight_decay=0.1)
STEPS = 2
LENGTHS = [3, 7, 1, 5]


def _model(scale: float, **changes) -> SyCoCa:
    model = build(micro(**changes))
    with torch.no_grad():
        model.logit_scale.log_scale.fill_(math.log(scale))
    return model


def _plain(scale: float) -> dict[str, torch.Tensor]:
    model = _model(scale)
    optimizer = build_optimizer(parameter_groups(model, OPTIMIZER.weight_decay), OPTIMIZER)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(batch(LENGTHS), ATTENTIVE).total.backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def _under_zero(
    rank: int, world: int, stage: int, scale: float, extra: dict, compiled: bool = False, **changes
) -> tuple[dict, float]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    deepspeed = import_deepspeed()
    from deepspeed.utils import safe_get_full_fp32_param

    model = _model(scale, **changes)
    if compiled:
        # The whole way of a compiled block but the compiler at its end, which takes minutes.
        compile_blocks(model, backend="aot_eager")
    optimizer = build_optimizer(parameter_groups(model, OPTIMIZER.weight_decay), OPTIMIZER)
    share = len(LENGTHS) // world
    config = {
        "train_micro_batch_size_per_gpu": share,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **extra,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    whole = batch(LENGTHS)
    mine = type(whole)(*(None if t is None else t[rank * share : (rank + 1) * share] for t in whole))
    if extra.get("bf16"):
        mine = mine._replace(images=mine.images.bfloat16())
    for _ in range(STEPS):
        engine.backward(engine(mine, ATTENTIVE, dist.group.WORLD).total)
        engine.step()
    master = safe_get_full_fp32_param(engine.module.logit_scale.log_scale)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        found = {name: p.detach().float().clone() for name, p in engine.module.named_parameters()}
    return found, master.item()


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_take_the_steps_of_one_process(stage):
    expected = _plain(scale=14.0)
    for found, _ in run_ranks(_under_zero, 2, stage, 14.0, {}, timeout_s=120):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-5, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}"
            )


def _compiled_under_zero(rank: int, world: int, stage: int) -> dict:
    return _under_zero(rank, world, stage, 14.0, {}, compiled=True, gradient_checkpointing=True)[0]


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.full), 2, 3])
def test_compiled_and_checkpointed_blocks_take_the_same_steps(stage):
    expected = _plain(scale=14.0)
    (found,) = run_ranks(_compiled_under_zero, 1, stage, timeout_s=120)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("extra", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
def test_clamp_holds_on_the_master_when_started_above_the_limit(stage, extra):
    for found, master in run_ranks(_under_zero, 2, stage, 150.0, extra, timeout_s=120):
        assert master <= math.log(100.0) + 1e-6
        rounding = 2**-8 if extra else 0
        assert found["logit_scale.log_scale"].item() <= math.log(100.0) * (1 + rounding) + 1e-6
