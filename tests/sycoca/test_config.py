"""Configuration: what is refused, in which words, and what the presets add up to."""

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from sycoca.config import (
    ConfigError,
    LossConfig,
    MaskingConfig,
    ModelConfig,
    from_dict,
    to_dict,
)
from sycoca.presets import MODEL_PRESETS, PRESET_PARAMETERS
from sycoca.xvlm import build_model


def changed(path: str, value) -> dict:
    data = copy.deepcopy(to_dict(MODEL_PRESETS["tiny"]))
    *owners, key = path.split(".")
    owner = data
    for name in owners:
        owner = owner[name]
    owner[key] = value
    return data


SWIN = {"embed_width": 48, "depths": [2, 2], "heads": [2, 4], "window": 3}


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_round_trip(name):
    assert from_dict(ModelConfig, to_dict(MODEL_PRESETS[name])) == MODEL_PRESETS[name]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("vision.widht", 3, "vision.widht: unknown key; did you mean 'width'?"),
        ("mask_ratio", 0.5, "mask_ratio: unknown key; did you mean 'masking.mask_ratio'?"),
        ("vision.width", "128", "vision.width: input should be a valid integer, got '128'"),
        ("vision.depth", True, "vision.depth: input should be a valid integer, got True"),
        ("vision.heads", 7, "vision.heads: 7 does not divide the width"),
        ("vision.patch_size", 7, "vision.patch_size: 7 does not divide the image size"),
        ("text.context_length", 1, "text.context_length: at least"),
        ("text.eot_id", 0, "text.pad_id, sot_id, eot_id: must differ"),
        ("text.eot_id", 512, "text.eot_id: 512 is outside the vocabulary"),
        ("masking.score_space", "locla", "masking.score_space: 'locla' is none of itc, value, local; did you mean"),
        ("masking.drop_ratio", 1.0, "masking.drop_ratio: 1 would leave"),
        ("masking.mask_ratio", 1.1, "masking.mask_ratio: must lie in 0..1"),
        ("masking.block", 5, "masking.block: 5 does not divide the grid"),
        ("loss.label_smoothing", float("nan"), "loss.label_smoothing: input should be a finite number"),
        ("loss.itc_weight", float("inf"), "loss.itc_weight: input should be a finite number"),
        ("loss.local_weight", 0.0, "loss.local_weight: 0 leaves the heads"),
        ("objectives", ["itc", "icc"], "objectives: 'icc' is none of itc, ic, tgmim, itm, mlm, bbox; did you mean '"),
        ("objectives", ["itc", "itc"], "objectives: each may be named once"),
        ("objectives", [], "objectives: name at least one"),
        ("embed_dim", 0, "embed_dim: must be positive"),
        (
            "objectives",
            ["itc", "itm"],
            "objectives: 'itm' needs the fusion encoder; give fusion.depth and fusion.heads",
        ),
        ("text.kind", "bidirectional", "objectives: 'ic' predicts the next word, which needs text.kind 'causal'"),
        ("text.kind", "bidirektional", "text.kind: 'bidirektional' is none of causal, bidirectional; did you mean"),
        ("text.mask_id", 512, "text.mask_id: 512 is outside the vocabulary"),
        ("fusion", {"depth": 1, "heads": 5}, "heads: 5 does not divide the width"),
        ("vision.local_depth", 0, "vision.local_depth: must be positive"),
        ("fusion", {"dept": 1, "heads": 4}, "fusion.dept: unknown key; did you mean 'depth'?"),
        ("vision.region_form", "pooled", "vision.region_form: 'pooled' needs the model.fusion of X-VLM"),
        ("masking.tgmim_start", 1.0, "masking.tgmim_start: 1 would never train TG-MIM; loss.tgmim_weight=0"),
        ("masking.tgmim_start", -0.1, "masking.tgmim_start: must lie in 0..1"),
        ("loss.tgmim_kind", "ema_feature", "loss.tgmim_kind: 'ema_feature' is none of"),
        ("words.share", 1.5, "words.share: must lie in 0..1"),
        ("vision.swin", SWIN, "vision.region_form: 'local' needs a ViT; vision.swin needs 'pooled'"),
        ("vision.swin", SWIN | {"depths": [2, 4]}, "vision.depth: 4, the stages of vision.swin make it 6"),
        ("vision.swin", SWIN | {"heads": [3]}, "vision.swin.depths: 2 stages, heads 1; each stage needs its own"),
        ("vision.swin", SWIN | {"heads": [5, 4]}, "vision.swin.heads: 5 does not divide the width 48"),
        ("vision.swin", SWIN | {"windo": 3}, "vision.swin.windo: unknown key; did you mean 'window'?"),
        ("vision.swin", SWIN | {"drop_path": 1.0}, "vision.swin.drop_path: must lie in 0..1, 1 excluded, got 1.0"),
        ("text.bert", {}, "text.kind: 'causal', text.bert needs 'bidirectional'"),
        ("text.bert", {"positions": 0}, "text.bert.positions: must be positive, got 0"),
        ("vision", 3, "vision: input should be an object"),
    ],
)
def test_refusals_name_the_key_in_one_line(path, value, message):
    with pytest.raises(ConfigError) as error:
        from_dict(ModelConfig, changed(path, value))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_missing_key():
    data = to_dict(MODEL_PRESETS["tiny"])
    del data["vision"]["width"]
    with pytest.raises(ConfigError, match=r"^vision.width: missing$"):
        from_dict(ModelConfig, data)


def test_paper_scores_need_the_contrastive_objective():
    config = replace(MODEL_PRESETS["tiny"], masking=MaskingConfig(score_space="itc"))
    with pytest.raises(ConfigError, match="'itc' is trained by the objective 'itc'"):
        replace(config, objectives=("ic", "tgmim"))
    # Random masks need no score.
    replace(config, objectives=("ic", "tgmim"), masking=MaskingConfig(score_space="itc", attentive_start=1.0))


def test_coca_selects_nothing():
    tiny = MODEL_PRESETS["tiny"]
    coca = replace(tiny, masking=replace(tiny.masking, drop_ratio=0.0), loss=LossConfig(tgmim_weight=0.0))
    assert not coca.selects and coca.local_weight == 0.0
    control = replace(coca, loss=LossConfig(tgmim_weight=0.0, local_weight=1.0))
    assert not control.selects and control.local_weight == 1.0
    assert tiny.local_weight == 1.0 and MODEL_PRESETS["coca_base"].local_weight == 0.0


@pytest.mark.parametrize(("ratio", "block", "expected"), [(0.5, 1, 32), (0.49, 1, 31), (0.49, 2, 28), (1.0, 4, 64)])
def test_whole_blocks_are_masked(ratio, block, expected):
    small = MODEL_PRESETS["small"]
    assert small.vision.grid == (8, 8)
    config = replace(small, masking=replace(small.masking, mask_ratio=ratio, block=block))
    assert config.num_masked == expected


# Those that need transformers: tests/sycoca/test_backbones.py
@pytest.mark.parametrize("name", [name for name in MODEL_PRESETS if MODEL_PRESETS[name].vision.swin is None])
def test_parameter_counts(name):
    with torch.device("meta"):
        model = build_model(MODEL_PRESETS[name])
    total = sum(p.numel() for p in model.parameters())
    extra = sum(p.numel() for part in (model.image_decoder, model.local) if part is not None for p in part.parameters())
    assert (total, total - extra) == PRESET_PARAMETERS[name]


def test_the_paper_model_has_440_million_parameters():
    assert round(PRESET_PARAMETERS["coca_base"][1] / 1e6) == 440
    assert set(PRESET_PARAMETERS) == set(MODEL_PRESETS)


def test_configuration_is_read_without_torch():
    code = (
        "import sys, sycoca, sycoca.config; sycoca.MODEL_PRESETS; "
        "sys.exit([name for name in ('torch', 'triton', 'numpy') if name in sys.modules] or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""
