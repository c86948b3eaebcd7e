"""The parameters that pre-training moves, and how fast."""

import re

from torch import nn

from sycoca.backbones import begins_given
from sycoca.config import ModelConfig
from sycoca.model import SyCoCa, parameter_groups
from train.config import RunConfig
from train.drops import stop_drops
from train.optim import by_layer

_BLOCK = re.compile(r"(?:swin\.encoder\.layers\.(\d+)\.)?(?:blocks\.(\d+)\.|downsample\.)")
_FIRST = ("embed.", "sequence.", "ln_pre.", "swin.embeddings.")
_ENCODERS = ("vision", "text")
# Linear maps that hold several, one above the other.
_STACKED = {"qkv": 3, "kv": 2}
# The maps of heads that another one follows.
_HIDDEN = ("_head.hidden", "_head.dense")


def pretraining_groups(model: SyCoCa, config: RunConfig) -> list[dict]:
    """Parameter groups of a run; those of frozen encoders need no gradient and are in none.

    Args:
        model: whole.
        config: weight decay, frozen encoders, the decay of the rate from layer to layer of the others, and the rate of
            what begins anew beside published encoders; which optimizer takes them.

    Returns:
        Groups as `build_optimizer` takes them.
    """
    train = config.train
    for name in train.freeze:
        encoder = getattr(model, name).requires_grad_(False)
        stop_drops(encoder)
    groups = parameter_groups(model, config.optimizer.weight_decay)
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    rest, split = groups, []
    if train.layer_decay < 1:
        for encoder in _ENCODERS:
            depths = encoder_depths(model.config, encoder)
            depth = sum(depths)
            layers = {id(p): layer_of(name, depths) for name, p in getattr(model, encoder).named_parameters()}
            named = [{**group, "name": f"{encoder}_{group['name']}"} for group in groups]
            split += by_layer(named, layers, depth, train.layer_decay)
            rest = [{**group, "params": [p for p in group["params"] if id(p) not in layers]} for group in rest]
    groups = _faster_anew(model, config, [*rest, *split])
    if config.optimizer.name == "muon":
        groups = _matrices_apart(model, config, groups)
    return [group for group in groups if group["params"]]


def _faster_anew(model: SyCoCa, config: RunConfig, groups: list[dict]) -> list[dict]:
    """The groups, those of parameters without published weights apart, with their own rate."""
    given = config.pretrained
    if not given.any or given.anew_rate == 1:
        return groups
    parts = {"vision": given.vision is not None, "text": given.text is not None}
    known = {id(p) for name, p in model.named_parameters() if begins_given(name, **parts)}
    apart = []
    for group in groups:
        anew = [p for p in group["params"] if id(p) not in known]
        rate = given.anew_rate * group.get("lr_scale", 1.0)
        apart.append({**group, "params": [p for p in group["params"] if id(p) in known]})
        apart.append({**group, "name": f"{group['name']}_anew", "params": anew, "lr_scale": rate})
    return apart


def _matrices_apart(model: SyCoCa, config: RunConfig, groups: list[dict]) -> list[dict]:
    """The groups, the linear maps of blocks and inside of heads in groups of their own, with the rate of matrices."""
    rate, known = config.optimizer.matrix_lr / config.optimizer.lr, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ("blocks." in name or name.endswith(_HIDDEN)):
            known[id(module.weight)] = (_STACKED.get(name.rsplit(".", 1)[-1], 1), *module.weight.shape)
    apart = []
    for group in groups:
        inner = [p for p in group["params"] if id(p) in known]
        scale = {"lr_scale": rate * group.get("lr_scale", 1.0), "matrices": [known[id(p)] for p in inner]}
        apart.append({**group, "params": [p for p in group["params"] if id(p) not in known]})
        apart.append({**group, "name": f"{group['name']}_matrices", "params": inner, **scale})
    return apart


def encoder_depths(model: ModelConfig, encoder: str) -> tuple[int, ...]:
    """Blocks of the stages of an encoder, `vision` or `text`."""
    swin = model.vision.swin
    return swin.depths if encoder == "vision" and swin is not None else (getattr(model, encoder).depth,)


def layer_of(name: str, depths: tuple[int, ...]) -> int:
    """Distance of an encoder's parameter from its input, 0 to the sum of `depths` + 1."""
    if block := _BLOCK.match(name):
        stage, place = int(block[1] or 0), block[2]
        # What makes the grid smaller learns as the last block before it.
        return sum(depths[:stage]) + (depths[stage] if place is None else int(place) + 1)
    return 0 if name.startswith(_FIRST) else sum(depths) + 1
