"""Optimizer, learning-rate schedules and the clamp of the logit scale.

The schedules are pure functions of the step, so a resumed run needs no scheduler state.
The clamp acts on what the optimizer updates: under ZeRO that is the fp32 master partition, before it is copied back.
"""

import math
from collections.abc import Callable
from functools import partial

import torch

from train.config import OptimizerConfig, ScheduleConfig
from train.lamb import lamb_class
from train.muon import Muon


def build_optimizer(
    groups: list[dict], config: OptimizerConfig, *, offloaded: bool = False, stage: int = 0
) -> torch.optim.Optimizer:
    """The optimizer of parameter groups; a group's `max_value` bounds its parameters from above after every step.

    Args:
        groups: parameter groups as `torch.optim` takes them, with the optional keys `max_value` and `matrices`.
        config: which one, learning rate, betas, epsilon and the weight decay of groups that set none.
        offloaded: whether what it updates will lie on the host, wherever the parameters are.
        stage: of ZeRO, which cuts what the optimizer is given.

    Returns:
        The optimizer: on CUDA NVIDIA apex's or DeepSpeed's where importable, else torch's, fused.
    """
    for group in groups:
        group.setdefault("max_value", None)
    on_cuda = not offloaded and any(p.is_cuda for group in groups for p in group["params"])
    options = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    if config.name == "muon":
        momentum, sharded = config.matrix_momentum, stage == 3
        rest = partial(adamw_class(on_cuda), **options)
        optimizer = Muon(
            groups, rest, lr=config.lr, momentum=momentum, weight_decay=config.weight_decay, sharded=sharded
        )
    else:
        optimizer = (lamb_class if config.name == "lamb" else adamw_class)(on_cuda)(groups, **options)
    optimizer.register_step_post_hook(_clamp)
    return optimizer


def adamw_class(on_cuda: bool) -> Callable[..., torch.optim.Optimizer]:
    """The fastest AdamW at hand; all take one trajectory, up to rounding."""
    if on_cuda:
        for find in (_apex_adam, _deepspeed_adam):
            if (found := find()) is not None:
                return partial(found, adam_w_mode=True)
    return partial(torch.optim.AdamW, fused=True)


def _apex_adam() -> type[torch.optim.Optimizer] | None:
    try:
        # amp_C is NVIDIA's compiled part; the package that PyPI calls apex is another one.
        import amp_C  # noqa: F401
        from apex.optimizers import FusedAdam
    except ImportError:
        return None
    return FusedAdam


def _deepspeed_adam() -> type[torch.optim.Optimizer] | None:
    from deepspeed.git_version_info import installed_ops

    if not installed_ops.get("fused_adam", False):
        # Not built with DeepSpeed; building it here would take minutes and a compiler.
        return None
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam


def by_layer(groups: list[dict], layers: dict[int, int], depth: int, decay: float) -> list[dict]:
    """Parameter groups, slower layer by layer towards the input.

    Args:
        groups: as `torch.optim` takes them, with the key `name`.
        layers: id of a parameter -> its layer, 0 to `depth` + 1.
        depth: of the encoder; the layer `depth` + 1 has the full rate.
        decay: factor on the learning rate from each layer to the one below.

    Returns:
        Groups of one layer each, with the key `lr_scale`; parameters that `layers` does not hold are left out.
    """
    split = []
    for group in groups:
        for place in sorted({layers[id(p)] for p in group["params"] if id(p) in layers}):
            params = [p for p in group["params"] if layers.get(id(p)) == place]
            scale = decay ** (depth + 1 - place)
            split.append({**group, "name": f"{group['name']}_{place}", "params": params, "lr_scale": scale})
    return split


@torch.no_grad()
def _clamp(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    for group in optimizer.param_groups:
        if group["max_value"] is not None:
            for p in group["params"]:
                p.clamp_(max=group["max_value"])


def learning_rate_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Factor on the peak learning rate at `step` of `total_steps`: linear warm-up, then the schedule's decay.

    Args:
        config: the schedule; `wsd` is warm-up-stable-decay, its decay taking the last `decay_share` of all steps.
        step: 0-based index of the optimizer step about to be taken.
        total_steps: number of steps of the whole run.

    Returns:
        A factor in 0..1.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    start = config.warmup_steps
    if config.name == "wsd":
        start = max(start, round(total_steps * (1 - config.decay_share)))
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
    if config.name == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.name == "constant":
        shape = 1.0
    else:
        shape = 1 - progress
    return config.final_share + (1 - config.final_share) * shape


def set_learning_rate(optimizer, learning_rate: float) -> None:
    """Sets the rate of every group, times the group's `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)
