"""A checkpoint brought to another ZeRO stage or number of ranks, by way of DeepSpeed's universal form.

DeepSpeed converts a checkpoint into files of one parameter each, but what it writes for stages 1 and 2 cannot be read
under stage 3, nor the reverse. Both are made alike here: shaped tensors under one key, a step beside them, the states
of the optimizer under the names of both, and the file of model states under both names.
"""

import contextlib
import os
import shutil
from argparse import Namespace
from pathlib import Path
from types import MethodType
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.constants import (
    DS_VERSION,
    OPTIMIZER_STATE_DICT,
    PARAM,
    PARAM_GROUPS,
)
from deepspeed.utils.tensor_fragment import map_to_flat_opt_states

_STATES = ("fp32", "exp_avg", "exp_avg_sq")


def convert(source: Path, target: Path, module: torch.nn.Module) -> None:
    """Writes the universal form of a checkpoint.

    Args:
        source: folder of a checkpoint of any stage, known to hold data only.
        target: folder to write, replaced.
        module: the model, for the shapes of its parameters.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    options = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        ds_to_universal.main(options)
    optimizer = _optimizer_state(source, target / "zero" / "optimizer_state.pt")
    step = optimizer[OPTIMIZER_STATE_DICT]["state"][0]["step"]
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        folder = target / "zero" / name
        torch.save(step, folder / "step.pt")
        for state in _STATES:
            _shape(folder / f"{state}.pt", getattr(p, "ds_shape", p.shape))
    states = sorted(target.glob("*model_states.pt"))[0]
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        if not (target / name).exists():
            shutil.copy(states, target / name)


def mend_loading(optimizer: Any) -> None:
    """Lets DeepSpeed's optimizer of stages 1 and 2 read the universal form where a rank holds nothing of a group.

    Args:
        optimizer: the engine's; other stages are left as they are.
    """
    if hasattr(optimizer, "bit16_groups"):
        optimizer.load_hp_checkpoint_state_from_checkpoint_dir = MethodType(_load_groups, optimizer)


def _load_groups(optimizer: Any, lp_groups_name: str, checkpoint_dir: str) -> None:
    folder = Path(checkpoint_dir) / "zero"
    state = torch.load(folder / "optimizer_state.pt", weights_only=False)
    optimizer._load_global_state(state)
    step = state[OPTIMIZER_STATE_DICT]["state"][0]["step"]
    for group, parameters in zip(optimizer.optimizer.param_groups, getattr(optimizer, lp_groups_name), strict=True):
        held, keys = group["params"][0], set()
        for p in parameters:
            if p._hp_mapping is not None:
                p.load_hp_checkpoint_state(str(folder / optimizer.param_names[p]), 0, 1)
                keys.update(p._hp_mapping.get_optim_state_keys())
        if keys:
            map_to_flat_opt_states(held, parameters, optimizer.optimizer.state, keys)
        moments = {key: torch.zeros_like(held) for key in _STATES[1:] if key not in keys}
        optimizer.optimizer.state[held].update(moments, step=step)


def _shape(path: Path, shape: torch.Size) -> None:
    held = torch.load(path, weights_only=True)
    tensor = held[PARAM] if isinstance(held, dict) else held
    torch.save({PARAM: tensor.reshape(shape)}, path)


def _optimizer_state(source: Path, path: Path) -> dict[str, Any]:
    state = torch.load(path, weights_only=False)
    if OPTIMIZER_STATE_DICT not in state:
        one = torch.load(sorted(source.glob("*optim_states.pt"))[0], weights_only=False)[OPTIMIZER_STATE_DICT]
        step = next(iter(one["base_optimizer_state"]["state"].values()))["step"]
        state[OPTIMIZER_STATE_DICT] = {"state": {0: {"step": step}}, PARAM_GROUPS: state[PARAM_GROUPS]}
    state.setdefault(DS_VERSION, deepspeed.__version__)
    torch.save(state, path)
    return state
