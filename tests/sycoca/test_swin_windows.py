"""A Swin with larger windows than its weights were trained with: tables of relative positions are interpolated."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sycoca.backbones import like_swin, load_backbones
from sycoca.config import ConfigError
from sycoca.tokenizer import Tokenizer
from sycoca.weights import load_into, resize_windows
from sycoca.xvlm import build_model
from tests.sycoca.micro_xvlm import MICRO_XVLM
from train.config import PRESETS
from train.data import open_dataset
from train.initial import given_weights, started_from
from train.launch import parse

transformers = pytest.importorskip("transformers")

SCRIPT = Path(__file__).parents[2] / "train" / "pretrain.py"
COMMAND = ["--config", "ds_zero2.json", "--preset", "xvlm_tiny", "--print-config"]
TABLE = "relative_position_bias_table"


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """The folder of a Swin of two stages with windows of 3 x 3 cells."""
    sizes = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=10, depths=[1, 2], num_heads=[1, 2], window_size=3
    )
    torch.manual_seed(0)
    swin = transformers.SwinModel(sizes)
    with torch.no_grad():
        for name, p in swin.named_parameters():
            if name.endswith(TABLE):
                p.normal_()
    folder = tmp_path_factory.mktemp("swin")
    swin.save_pretrained(folder)
    return folder


def widened(published, window=5, image_size=20):
    vision = like_swin(MICRO_XVLM.vision, str(published), image_size=image_size)
    return replace(MICRO_XVLM, vision=replace(vision, swin=replace(vision.swin, window=window, drop_path=0.0)))


def assert_interpolated(ours, theirs):
    """Each head's table by itself; nothing else of the weights changes."""
    assert ours.keys() == theirs.keys()
    tables = 0
    for name, table in theirs.items():
        if not name.endswith(TABLE):
            assert torch.equal(ours[name], table), name
            continue
        tables += 1
        assert ours[name].shape == (81, table.shape[1])
        for head, square in enumerate(table.T.view(-1, 1, 1, 5, 5)):
            direct = F.interpolate(square, size=(9, 9), mode="bicubic", align_corners=False)
            assert torch.allclose(ours[name][:, head], direct.flatten(), atol=1e-6)
    assert tables == 3


def test_tables_are_interpolated_head_by_head(published):
    model = build_model(widened(published))
    load_backbones(model, vision=str(published))
    swin = transformers.AutoModel.from_pretrained(published)
    assert_interpolated(model.vision.swin.state_dict(), swin.state_dict())
    with torch.no_grad():
        patches = model.eval().encode_image(torch.randn(2, 3, 20, 20)).patches
    assert patches.shape == (2, 25, 20) and patches.isfinite().all()
    same = {name: table for name, table in swin.state_dict().items() if name.endswith(TABLE)}
    assert all(table is same[name] for name, table in resize_windows(same, 3).items())


def test_what_a_displacement_means_stays():
    """Bias by column alone stays so, opposite displacements stay opposite, and no bias stays none."""
    ramp = torch.arange(-2.0, 3.0).repeat(5)[:, None]
    (wide,) = resize_windows({TABLE: ramp}, 5).values()
    wide = wide.view(9, 9)
    assert torch.allclose(wide, wide[:1].expand(9, 9), atol=1e-6) and (wide[0].diff() > 0).all()
    assert torch.allclose(wide, -wide.flip(1), atol=1e-6) and wide[:, 4].abs().max() < 1e-6
    (flat,) = resize_windows({TABLE: torch.full((25, 2), 3.0, dtype=torch.bfloat16)}, 7).values()
    assert flat.shape == (169, 2) and (flat == 3).all() and flat.dtype == torch.bfloat16


def test_a_run_from_a_swin_may_widen_its_windows(published, capsys):
    given = [f"pretrained.vision={published}", "image_size=20", "swin.window=5"]
    with pytest.raises(SystemExit):
        parse([*COMMAND, *given], script=SCRIPT, has_cuda=False)
    found = json.loads(capsys.readouterr().out)["run"]["model"]["vision"]
    assert found["swin"]["window"] == 5 and found["image_size"] == 20
    with pytest.raises(ConfigError, match=r"swin\.window: 17, the last grid has 16 x 16 cells"):
        parse([*COMMAND, given[0], "swin.window=17"], script=SCRIPT, has_cuda=False)


def test_a_run_from_a_model_may_change_its_windows(published, tmp_path):
    """Also to fewer cells than the old windows have."""
    text = replace(MICRO_XVLM.text, vocab_size=128)
    old = build_model(replace(widened(published, window=3, image_size=16), text=text))
    load_backbones(old, vision=str(published))
    old.save_pretrained(tmp_path, tokenizer=Tokenizer.train_wordpiece(open_dataset("scenes").texts(50), 128))
    config = started_from(PRESETS["xvlm_tiny"], str(tmp_path))
    for window, size in ((5, 20), (2, 8)):
        vision = old.config.vision
        wider = replace(vision, image_size=size, swin=replace(vision.swin, window=window))
        model = replace(old.config, vision=wider)
        made = build_model(model)
        load_into(made, given_weights(replace(config, model=model)), source="old")
        if window == 5:
            assert_interpolated(made.vision.swin.state_dict(), old.vision.swin.state_dict())
        with torch.no_grad():
            assert made.eval().encode_image(torch.randn(1, 3, size, size)).patches.isfinite().all()
