"""open_clip's CoCa weights in our models: the same numbers out, the same tensors back."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from sycoca.cache import Cached, Recomputed
from sycoca.model import SyCoCa
from sycoca.openclip import from_openclip, openclip_config, to_openclip
from sycoca.visualize_words import word_maps
from sycoca.weights import WeightsError, load_into
from tests.sycoca.open_clip_models import coca_class, randomised

SHARED = {"layers": 2, "heads": 2}


def small(attentional_pool, *, width: int = 128, embed_dim: int = 128) -> dict:
    """A CoCa of open_clip in which as few sizes as possible are equal."""
    return {
        "embed_dim": embed_dim,
        "vision_cfg": {
            "image_size": 24,
            "patch_size": 8,
            "width": width,
            "layers": 2,
            "attentional_pool": attentional_pool,
            "attn_pooler_queries": 7,
            "attn_pooler_heads": 4,
            "output_tokens": True,
        },
        "text_cfg": {
            "context_length": 10,
            "vocab_size": 49408,
            "width": 128,
            "embed_cls": True,
            "output_tokens": True,
            **SHARED,
        },
        "multimodal_cfg": {"context_length": 10, "vocab_size": 49408, "width": 128, **SHARED},
    }


def named(name: str, depth: int | None) -> dict:
    folder = Path(next(iter(importlib.util.find_spec("open_clip").submodule_search_locations)))
    config = json.loads((folder / "model_configs" / f"{name}.json").read_text())
    config.pop("custom_text")
    for part in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        config[part]["layers"] = depth or config[part]["layers"]
    return config


def pair(config: dict, correct: bool):
    theirs = randomised(coca_class()(**config))
    theirs.text.correct_cls_mask = correct
    ours = SyCoCa(openclip_config(config, correct_cls_mask=correct))
    load_into(ours, from_openclip(theirs.state_dict(), ours.config), source="open_clip")
    return theirs, ours.eval()


def captions(vocab_size: int, T: int) -> torch.Tensor:
    """Captions of no word up to a full context; the third holds "!", whose id is that of padding."""
    tokens = torch.zeros(4, T, dtype=torch.int64)
    for row, words in zip(tokens, (0, 3, 5, T - 2)):
        row[0], row[words + 1] = 49406, 49407
        row[1 : words + 1] = torch.arange(words) * 977 % (vocab_size - 2) + 1
    tokens[2, 2] = 0
    return tokens


@torch.no_grad()
def assert_equal_outputs(theirs, ours) -> None:
    size, text = ours.config.vision.image_size, ours.config.text
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    tokens = captions(49408, text.context_length)
    wanted = theirs(images, tokens, output_labels=False)
    image, found = ours.encode_image(images), ours.encode_text(tokens)
    logits = ours.caption_logits(image, tokens)
    for mine, other in (
        (image.features, wanted["image_features"].reshape(image.features.shape)),
        (found.features, wanted["text_features"]),
        (logits, wanted["logits"]),
        (ours.logit_scale(), wanted["logit_scale"].reshape(1)),
    ):
        assert mine.shape == other.shape
        assert (mine - other).abs().max() <= 1e-5


@pytest.mark.parametrize("correct", [False, True], ids=["released mask", "corrected mask"])
@pytest.mark.parametrize(
    "config",
    [
        small(False),
        small(True, width=192),
        small(True),
        small("parallel"),
        small("cascade"),
    ],
    ids=["no pooler", "single pooler", "single pooler of one width", "parallel poolers", "cascade"],
)
def test_same_numbers_out_and_same_tensors_back(config, correct):
    theirs, ours = pair(config, correct)
    assert_equal_outputs(theirs, ours)
    back, state = to_openclip(ours.state_dict(), ours.config), theirs.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("name", ["coca_base", "coca_ViT-B-32", "coca_ViT-L-14"])
def test_named_models_of_one_layer(name):
    theirs, ours = pair(named(name, depth=1), correct=False)
    assert_equal_outputs(theirs, ours)


@pytest.mark.full
@pytest.mark.parametrize("name", ["coca_base", "coca_ViT-B-32", "coca_ViT-L-14"])
def test_named_models(name):
    theirs, ours = pair(named(name, depth=None), correct=False)
    assert_equal_outputs(theirs, ours)
    back, state = to_openclip(ours.state_dict(), ours.config), theirs.state_dict()
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("correct", [False, True], ids=["released mask", "corrected mask"])
def test_the_cache_sees_what_the_model_sees(correct):
    """Padding's id is a word of CLIP's, which the text encoder does not see wherever it stands."""
    _, ours = pair(small(True, width=192), correct)
    images = ours.encode_image(torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(2)))
    tokens = torch.tensor([[49406, 320, 0, 1125, 539, 0, 7], [49406, 0, 0, 5, 0, 9, 11]])
    cached, anew = Cached(ours, images, 10), Recomputed(ours, images, 10)
    with torch.no_grad():
        for part in (tokens[:, :3], *tokens[:, 3:].repeat_interleave(2, dim=0).split(1, dim=1)):
            torch.testing.assert_close(cached.advance(part), anew.advance(part), rtol=0, atol=1e-5)
            for session in (cached, anew):
                session.select(torch.tensor([0, 0, 1, 1] if len(part) == 2 else [1, 0, 3, 2]))
    assert word_maps(ours, None, images, ours.encode_text(tokens), ["a"] * 2, scored=False) is None


def test_what_has_no_place_here_is_named():
    with pytest.raises(WeightsError, match="embed_cls"):
        openclip_config({"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}})
    config = small(False)
    config["vision_cfg"]["ls_init_value"] = 1e-5
    with pytest.raises(WeightsError, match=r"vision_cfg\.ls_init_value"):
        openclip_config(config)
