"""What DeepSpeed's universal form leaves out when a run changes ranks or ZeRO stage: frozen weights, averages."""

from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from train.config import RunConfig
from train.ema import KEY
from train.export import averaged, consolidated


def carry_over(engine: Any, folder: Path, run: RunConfig, *, trusted: bool) -> None:
    """Gives an engine what its reshaped checkpoint had besides. All ranks call it.

    Args:
        engine: DeepSpeed's, of ZeRO 1 to 3, the rest loaded.
        folder: the checkpoint as it was written.
        run: the configuration.
        trusted: whether objects of any class may be read.
    """
    if frozen := [(name, p) for name, p in engine.module.named_parameters() if not p.requires_grad]:
        weights = consolidated(folder, allow_pickle=trusted)
        for name, p in frozen:
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0), torch.no_grad():
                if not hasattr(p, "ds_id") or dist.get_rank() == 0:
                    p.copy_(weights[name])
    if run.train.ema is not None:
        for held, flat in _shares(engine, averaged(folder, run)):
            engine.optimizer.optimizer.state[held][KEY] = flat


def _shares(engine: Any, whole: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """This rank's flat fp32 weights, and the same places of other values given whole and by name."""
    zero, found = engine.optimizer, []
    if hasattr(zero, "fp16_groups"):
        for held, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            flat, offset = torch.zeros_like(held), 0
            for p in parameters:
                size = p.partition_numel()
                mine = whole[engine.param_names[p]].flatten()[dist.get_rank() * size :][:size]
                flat.narrow(0, offset, mine.numel()).copy_(mine)
                offset += size
            found.append((held, flat))
        return found
    for group, parameters in zip(zero.optimizer.param_groups, zero.bit16_groups, strict=True):
        held = group["params"][0]
        flat = torch.zeros_like(held)
        for p in parameters:
            if p._hp_mapping is not None:
                here, there = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
                mine = whole[engine.param_names[p]].flatten().narrow(0, there.start, there.numel)
                flat.narrow(0, here.start, here.numel).copy_(mine)
        found.append((held, flat))
    return found
