"""open_clip's files read and written: folders, weight files alone, and what is refused."""

import json
import shutil

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file

from sycoca import SyCoCa, hub, load_pretrained, save_openclip
from sycoca.weights import WeightsError
from tests.sycoca.micro import build, micro
from tests.sycoca.open_clip_models import coca_class, randomised
from tests.sycoca.test_openclip import assert_equal_outputs, small

CONFIG, SAFE, PICKLED = "open_clip_config.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"


@pytest.fixture(scope="module")
def theirs():
    return randomised(coca_class()(**small(True, width=192)))


@pytest.fixture(scope="module")
def written(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / CONFIG).write_text(json.dumps({"model_cfg": small(True, width=192) | {"custom_text": True}}))
    save_file(theirs.state_dict(), folder / SAFE)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "open_clip")


def test_a_folder(theirs, folder):
    loaded = load_pretrained(folder)
    assert_equal_outputs(theirs, loaded.model)
    assert loaded.tokenizer.vocab_size == 49408 and loaded.config.text.cls_place == "last_shifted"
    assert load_pretrained(folder, correct_cls_mask=True).config.text.cls_place == "last"
    (folder / SAFE).unlink()
    torch.save(theirs.state_dict(), folder / PICKLED)
    assert_equal_outputs(theirs, SyCoCa.from_pretrained(folder))


@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w.safetensors"])
def test_a_weight_file_alone(theirs, written, tmp_path, name):
    state = {f"module.{key}": tensor for key, tensor in theirs.state_dict().items()}
    if name.endswith("safetensors"):
        save_file(state, tmp_path / name)
    else:
        torch.save({"epoch": 3, "name": "run", "state_dict": state}, tmp_path / name)
    assert_equal_outputs(theirs, load_pretrained(tmp_path / name, config=str(written / CONFIG)).model)


def test_a_repository_of_the_hub(theirs, written, monkeypatch):
    def download(repo, name, revision):
        if not (written / name).is_file():
            raise EntryNotFoundError("404")
        return str(written / name)

    monkeypatch.setattr(hub, "download", download)
    assert_equal_outputs(theirs, load_pretrained("nobody/coca").model)


@pytest.mark.parametrize("pool", [False, True, "parallel", "cascade"])
def test_open_clip_builds_what_is_written(pool, tmp_path):
    theirs = randomised(coca_class()(**small(pool)))
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    (tmp_path / "c.json").write_text(json.dumps(small(pool)))
    ours = load_pretrained(tmp_path / "w.pt", config=str(tmp_path / "c.json"))
    save_openclip(ours.model, tmp_path / "back")
    config = json.loads((tmp_path / "back" / CONFIG).read_text())["model_cfg"]
    assert config.pop("custom_text")
    again = coca_class()(**config).eval()
    again.load_state_dict(load_file(tmp_path / "back" / SAFE), strict=True)
    state = theirs.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert_equal_outputs(again, load_pretrained(tmp_path / "back").model)
    save_openclip(ours.model, tmp_path / "back.pt")
    alone = torch.load(tmp_path / "back.pt", weights_only=True)
    assert alone.keys() == state.keys() and all(torch.equal(alone[name], state[name]) for name in state)


def test_another_image_size(folder):
    loaded = load_pretrained(folder, image_size=32)
    assert loaded.config.vision.num_patches == 16
    assert loaded.model.encode_image(torch.zeros(1, 3, 32, 32)).patches.shape[1] == 16


def refused(match, *args, **options):
    with pytest.raises(WeightsError, match=match) as error:
        load_pretrained(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_read_is_one_line(folder):
    refused("coca_ViT-B-32", folder / SAFE)
    refused("did you mean 'coca_ViT-B-32'", folder / SAFE, config="coca_ViT-B32")
    text = refused("another architecture", folder / SAFE, config="coca_ViT-L-14")
    assert "visual.transformer.resblocks.2.ln_1.weight" in text and text.count("resblocks") == 5
    refused("another architecture", folder / SAFE, config="coca_base")
    refused("coca_roberta-ViT-B-32.json: .*roberta-base", folder / SAFE, config="coca_roberta-ViT-B-32")
    refused("says itself", folder, config="coca_base")
    data = json.loads((folder / CONFIG).read_text())
    for broken, match in (
        ({"model_cfg": data["model_cfg"], "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}, "normalises"),
        ({"model_cfg": {"embed_dim": 8}}, "no CoCa"),
        ({"model_cfg": data["model_cfg"] | {"embed_dim": "wide"}}, "embed_dim"),
        ({"model_cfg": {**data["model_cfg"], "text_cfg": {"hf_tokenizer_name": "xlm"}}}, "hf_tokenizer_name 'xlm'"),
        ({"model_cfg": data["model_cfg"] | {"vision_cfg": 7}}, "no configuration"),
    ):
        (folder / CONFIG).write_text(json.dumps(broken))
        refused(match, folder)
    (folder / CONFIG).write_text(json.dumps(data))
    (folder / SAFE).write_bytes((folder / SAFE).read_bytes()[:1000])
    refused("truncated", folder)
    (folder / SAFE).unlink()
    refused(PICKLED, folder)


class Planted:
    """An object that no weight file needs."""


def test_pickles_are_refused_unless_allowed(theirs, folder):
    (folder / SAFE).unlink()
    torch.save({"state_dict": theirs.state_dict(), "args": Planted()}, folder / PICKLED)
    refused("allow_pickle", folder)
    assert_equal_outputs(theirs, load_pretrained(folder, allow_pickle=True).model)


def test_another_structure_is_not_written(tmp_path):
    with pytest.raises(WeightsError, match="open_clip's structure"):
        save_openclip(build(micro()), tmp_path / "out")
    assert not (tmp_path / "out").exists()
