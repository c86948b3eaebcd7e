"""The parameters that pre-training moves, and how fast."""

import re

from sycoca.model import SyCoCa, parameter_groups
from train.config import RunConfig
from train.optim import by_layer

_BLOCK = re.compile(r"blocks\.(\d+)\.")
_ENCODERS = ("vision", "text")


def pretraining_groups(model: SyCoCa, config: RunConfig) -> list[dict]:
    """Parameter groups of a run; those of frozen encoders need no gradient and are in none.

    Args:
        model: whole.
        config: weight decay, frozen encoders and the decay of the rate from layer to layer of the others.

    Returns:
        Groups as `build_optimizer` takes them.
    """
    train = config.train
    for name in train.freeze:
        getattr(model, name).requires_grad_(False)
    groups = parameter_groups(model, config.optimizer.weight_decay)
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    rest, split = groups, []
    if train.layer_decay < 1:
        for encoder in _ENCODERS:
            tower = getattr(model, encoder)
            depth = len(tower.blocks)
            layers = {id(p): _layer(name, depth) for name, p in tower.named_parameters()}
            named = [{**group, "name": f"{encoder}_{group['name']}"} for group in groups]
            split += by_layer(named, layers, depth, train.layer_decay)
            rest = [{**group, "params": [p for p in group["params"] if id(p) not in layers]} for group in rest]
    return [group for group in [*rest, *split] if group["params"]]


def _layer(name: str, depth: int) -> int:
    """Distance of an encoder's parameter from its input, 0 to depth + 1."""
    if block := _BLOCK.match(name):
        return int(block[1]) + 1
    return 0 if name.startswith(("embed.", "sequence.", "ln_pre.")) else depth + 1
