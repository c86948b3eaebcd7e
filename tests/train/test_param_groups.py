"""Which parameters pre-training moves, and how fast."""

from dataclasses import replace

import pytest

from sycoca.model import parameter_groups
from tests.sycoca.micro import build, micro
from train.config import PRESETS
from train.optim import build_optimizer, set_learning_rate
from train.param_groups import pretraining_groups


def groups_of(**changes):
    model = build(micro())
    config = PRESETS["tiny"]
    config = replace(config, train=replace(config.train, **changes))
    groups = pretraining_groups(model, config)
    names = {id(p): name for name, p in model.named_parameters()}
    return model, groups, {names[id(p)]: group for group in groups for p in group["params"]}


def test_without_options_the_groups_are_the_models():
    model, groups, held = groups_of()
    plain = parameter_groups(model, PRESETS["tiny"].optimizer.weight_decay)
    assert [group["name"] for group in groups] == [group["name"] for group in plain]
    assert held.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("names", [("vision",), ("text",), ("vision", "text")])
def test_frozen_encoders_are_in_no_group(names):
    model, _, held = groups_of(freeze=names)
    prefixes = tuple(f"{name}." for name in names)
    for name, parameter in model.named_parameters():
        assert (name in held) == parameter.requires_grad == (not name.startswith(prefixes)), name


def test_lower_layers_learn_more_slowly():
    model, groups, held = groups_of(layer_decay=0.5)
    assert held.keys() == dict(model.named_parameters()).keys()
    optimizer = build_optimizer(groups, PRESETS["tiny"].optimizer)
    set_learning_rate(optimizer, 1.0)
    rates = {name: group["lr"] for name, group in held.items()}
    assert rates["vision.embed.proj.weight"] == rates["text.sequence.pos"] == 0.125
    assert rates["vision.blocks.0.attn.qkv.weight"] == 0.25 and rates["text.blocks.1.attn.qkv.weight"] == 0.5
    assert rates["vision.ln_post.weight"] == rates["image_projection.weight"] == 1
    assert held["logit_scale.log_scale"]["max_value"] is not None
