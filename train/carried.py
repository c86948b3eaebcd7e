"""What DeepSpeed's universal form leaves out when a run changes ranks or ZeRO stage: frozen weights, averages."""

from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from train.config import RunConfig
from train.ema import KEY
from train.export import averaged, consolidated
from train.shares import optimizer_state, shares


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
        whole, state = averaged(folder, run), optimizer_state(engine)
        for held in list(state):
            state[held][KEY] = torch.zeros_like(held)
        for share in shares(engine):
            share.part(state[share.held][KEY]).copy_(share.place(whole[share.name]))
