"""Convolutions in front of the ViT."""

from dataclasses import replace

import pytest
import torch

from sycoca.config import ConfigError, VisionConfig
from sycoca.stem import stem_convs
from sycoca.vision import VisionTransformer
from tests.sycoca.micro import MICRO
from tests.sycoca.micro_xvlm import MICRO_XVLM, micro_xvlm
from train.plan_work import stem_flops, stem_parameters


@pytest.mark.parametrize(("patch", "width", "expected"), [
    (2, 32, [(3, 32, 2), (32, 32, 1)]),
    (8, 96, [(3, 32, 2), (32, 48, 2), (48, 96, 2), (96, 96, 1)]),
    (16, 768, [(3, 96, 2), (96, 192, 2), (192, 384, 2), (384, 768, 2), (768, 768, 1)]),
])  # fmt: skip
def test_sizes(patch, width, expected):
    assert [tuple(conv) for conv in stem_convs(patch, width)] == expected


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_a_patch_knows_its_surroundings_and_nothing_far_away(patch):
    config = micro_xvlm(vision={"stem": "conv", "patch_size": patch, "image_size": 8 * patch})
    torch.manual_seed(0)
    embed = VisionTransformer(config).embed
    images = torch.randn(1, 3, 8 * patch, 8 * patch, requires_grad=True)
    out = embed(images)
    assert out.shape == (1, 64, 32)
    (grad,) = torch.autograd.grad(out[0, 3 * 8 + 4].square().sum(), images)
    reached = grad[0].abs().sum(0).view(8, patch, 8, patch).amax((1, 3)) > 0
    assert reached[3, 4] and reached[2, 4] and reached[3, 3], "its own pixels and its neighbours'"
    rows, cols = reached.nonzero().unbind(1)
    assert (rows - 3).abs().max() <= 2 and (cols - 4).abs().max() <= 2


def test_values_begin_at_the_scale_of_a_linear_map():
    torch.manual_seed(0)
    images = torch.randn(16, 3, 64, 64)
    vision = {"patch_size": 8, "image_size": 64, "width": 96, "heads": 4}
    spread = {}
    for stem in ("patch", "conv"):
        spread[stem] = VisionTransformer(micro_xvlm(vision={**vision, "stem": stem})).embed(images).std().item()
    assert 0.2 < spread["conv"] / spread["patch"] < 5, spread


def test_weights_and_work_are_counted():
    vision = MICRO_XVLM.vision
    conv = replace(vision, stem="conv")
    for config in (vision, conv):
        embed = VisionTransformer(replace(MICRO_XVLM, vision=config)).embed
        assert stem_parameters(config) == sum(p.numel() for p in embed.parameters() if p.ndim > 1)
    assert stem_flops(vision) == 2 * 16 * 48 * 32
    # 16 pixels to 8 to 4, then once more at 4.
    assert stem_flops(conv) == 2 * (9 * (3 * 32 * 64 + 32 * 32 * 16 + 32 * 32 * 16) + 32 * 32 * 16)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="patch_size 12 is no power"):
        VisionConfig(image_size=48, patch_size=12, width=32, depth=1, heads=2, stem="conv")
    with pytest.raises(ConfigError, match="'tgmim' hides patches, which the convolutions"):
        replace(MICRO, vision=replace(MICRO.vision, stem="conv"))
