"""Where the parameters lie that this rank's optimizer updates, under every ZeRO stage."""

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor


class Share(NamedTuple):
    """Values of one parameter that this rank updates.

    Attributes:
        name: of the parameter.
        start: where the values begin in the flattened parameter.
        count: how many they are.
        held: fp32 tensor that the optimizer updates, the key of its state.
        offset: where the values begin in flattened `held`.
    """

    name: str
    start: int
    count: int
    held: Tensor
    offset: int

    def part(self, of: Tensor) -> Tensor:
        """The values in a tensor shaped like `held`, as a view (count,)."""
        return of.view(-1).narrow(0, self.offset, self.count)

    def place(self, whole: Tensor) -> Tensor:
        """The values in the whole contiguous parameter, as a view (count,)."""
        return whole.view(-1).narrow(0, self.start, self.count)


def optimizer_state(engine: Any) -> dict:
    """State of the optimizer inside DeepSpeed's, by the tensors that it updates."""
    return (engine.optimizer.optimizer if engine.zero_optimization() else engine.optimizer).state


def shares(engine: Any) -> list[Share]:
    """This rank's shares of all trained parameters: whole ones without ZeRO, else what its partition holds of each.

    Args:
        engine: DeepSpeed's, of any stage, with a model in fp32 where that is 0.
    """
    if not engine.zero_optimization():
        return [Share(name, 0, p.numel(), p, 0) for name, p in engine.module.named_parameters() if p.requires_grad]
    zero, names = engine.optimizer, engine.param_names
    if hasattr(zero, "fp16_groups"):
        groups = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
        return [share for held, parameters in groups for share in _of_stage_3(held, parameters, names)]
    groups = zip(zero.optimizer.param_groups, zero.bit16_groups, strict=True)
    return [share for group, parameters in groups for share in _of_stage_1_2(group["params"][0], parameters, names)]


def _of_stage_3(held: Tensor, parameters: list, names: dict) -> list[Share]:
    found, offset = [], 0
    for p in parameters:
        # Every rank has as many values of a parameter; the last ones' end in padding.
        size = p.partition_numel()
        start = min(dist.get_rank() * size, p.ds_numel)
        found.append(Share(names[p], start, min(size, p.ds_numel - start), held, offset))
        offset += size
    return found


def _of_stage_1_2(held: Tensor, parameters: list, names: dict) -> list[Share]:
    found = []
    for p in parameters:
        if p._hp_mapping is not None:
            here, there = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
            found.append(Share(names[p], there.start, there.numel, held, here.start))
    return found
