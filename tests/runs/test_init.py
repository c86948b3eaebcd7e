"""A run that starts from given weights: which are taken, which begin anew, what is refused before torch."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sycoca.config import ConfigError, from_dict, to_dict
from sycoca.openclip import openclip_config, to_openclip
from tests.runs.faults import SMALL, Run, finished
from train.initial import check_text, started_from
from train.launch import PRESETS

pytestmark = pytest.mark.run

OPENCLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1, "attentional_pool": True},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1, "embed_cls": True},
    "multimodal_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
# So small a learning rate leaves the weights as they were taken.
STILL = (
    "--data=scenes?count=64",
    "micro_batch=4",
    "val_pairs=4",
    "workers=0",
    "train.steps=1",
    "lr=1e-30",
    "local_group=2",
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    from sycoca.model import SyCoCa

    folder = tmp_path_factory.mktemp("open_clip")
    config = openclip_config(OPENCLIP)
    torch.manual_seed(1)
    save_file(
        {k: v.contiguous() for k, v in to_openclip(SyCoCa(config).state_dict(), config).items()},
        folder / "open_clip_model.safetensors",
    )
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPENCLIP}))
    return folder


@pytest.mark.parametrize("world, stage", [(1, 2), (2, 3)])
def test_open_clip_weights_go_on(theirs, tmp_path, world, stage):
    run = finished(
        Run(tmp_path / "run", f"--init={theirs}", *STILL, "model.vision.image_size=48", world=world, stage=stage)
    )
    assert f"weights: {theirs}; anew: image_decoder, local" in run.text
    left = load_file(tmp_path / "run" / "model" / "model.safetensors")
    from sycoca.hub import load_pretrained

    given = load_pretrained(theirs, image_size=48).model.state_dict()
    assert all(torch.allclose(left[name], tensor, rtol=0, atol=1e-20) for name, tensor in given.items())
    assert {name.partition(".")[0] for name in left.keys() - given.keys()} == {"image_decoder", "local"}


def test_a_run_starts_from_the_model_of_another(tmp_path):
    first = finished(Run(tmp_path / "first", *SMALL, "train.steps=1"))
    second = finished(
        Run(
            tmp_path / "second",
            f"--init={first.run_dir}",
            *STILL,
            "model.image_decoder.depth=1",
            "model.image_decoder.width=32",
        )
    )
    assert "anew: nothing" in second.text
    before, after = (load_file(run.run_dir / "model" / "model.safetensors") for run in (first, second))
    assert before.keys() == after.keys() and all(
        torch.allclose(before[name], after[name], rtol=0, atol=1e-20) for name in before
    )


def test_what_does_not_fit_is_one_line(theirs, tmp_path, command):
    with pytest.raises(ConfigError, match=r"no such folder.*did you mean"):
        started_from(PRESETS["tiny"], str(theirs) + "x")
    with pytest.raises(ConfigError, match="no model in this folder"):
        started_from(PRESETS["tiny"], str(tmp_path))
    with pytest.raises(ConfigError, match="a file"):
        started_from(PRESETS["tiny"], str(theirs / "open_clip_model.safetensors"))
    config = started_from(PRESETS["tiny"], str(theirs))
    assert config.data.tokenizer == "clip" and config.model.image_decoder == PRESETS["tiny"].model.image_decoder
    for key in ("vocab_size", "context_length"):
        other = to_dict(config.model)
        other["text"][key] += 2
        with pytest.raises(ConfigError, match=key):
            check_text(from_dict(type(config.model), other), str(theirs))
    done = command("python -X importtime train/pretrain.py --config ds_zero2.json --init nowhere/at/all")
    assert done.code == 2 and "--init nowhere/at/all: no such folder" in done.err
    assert "| torch\n" not in done.err
