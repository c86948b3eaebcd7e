"""Models as folders: what is written comes back, and what cannot be used is one line."""

import copy
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub.hub_mixin
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file

from sycoca import SyCoCa, create_model, hub, list_models, load_pretrained
from sycoca.config import ConfigError
from sycoca.tokenizer import Tokenizer
from sycoca.weights import WeightsError, read_weights, resize_positions, write_weights
from tests.sycoca.micro import build, captions, micro, uniform

FILES = {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "README.md"}


@pytest.fixture(scope="module")
def config():
    base = micro()
    return replace(base, text=replace(base.text, vocab_size=300))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a red circle", "two blue squares"], 280)


@pytest.fixture(scope="module")
def written(config, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "model"
    model = build(config)
    model.save_pretrained(folder, tokenizer=tokenizer)
    return model.eval(), folder


@pytest.fixture
def folder(written, tmp_path):
    return Path(shutil.copytree(written[1], tmp_path / "model"))


def test_what_is_written_comes_back(written, tokenizer, config):
    model, folder = written
    loaded = load_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == FILES
    assert loaded.config == config == loaded.model.config and not loaded.model.training
    theirs = loaded.model.state_dict()
    assert all(torch.equal(tensor, theirs.pop(name)) for name, tensor in model.state_dict().items()) and not theirs
    assert all(p.requires_grad for p in loaded.model.parameters())
    assert torch.equal(loaded.tokenizer.encode(["a red"], 8), tokenizer.encode(["a red"], 8))
    images, tokens = uniform(2, 3, 16, 16, salt=5), captions([3, 5])
    with torch.no_grad():
        assert torch.equal(model.encode_image(images).features, loaded.model.encode_image(images).features)
        assert torch.equal(model.encode_text(tokens).features, loaded.model.encode_text(tokens).features)
    assert torch.equal(SyCoCa.from_pretrained(folder).logit_scale.log_scale, model.logit_scale.log_scale)


def test_a_model_can_be_copied_and_pickled(written):
    model = load_pretrained(written[1]).model
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.text_projection.weight, model.text_projection.weight)
        assert other.tokenizer.vocab_size == model.tokenizer.vocab_size


def test_a_folder_of_a_run_stands_for_its_model(folder, tmp_path):
    assert load_pretrained(tmp_path).config == load_pretrained(folder).config


def test_a_run_that_has_only_checkpoints_is_told_the_command(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(WeightsError, match=r"python -m train\.export"):
        load_pretrained(tmp_path)


def test_another_image_size_interpolates_the_positions(written):
    small = load_pretrained(written[1])
    large = load_pretrained(written[1], image_size=32)
    assert large.config.vision.grid == (8, 8)
    assert large.model.encode_image(uniform(1, 3, 32, 32, salt=1)).patches.shape[1] == 64
    # A grid of plain numbers stays one, whatever the size.
    level = torch.ones(16, 3) * torch.tensor([1.0, -2.0, 0.5])
    assert torch.allclose(resize_positions(level, (8, 8)), level[:1].expand(64, 3), atol=1e-6)
    pos = small.model.vision.sequence.pos.detach()
    mirrored = pos.view(4, 4, -1).flip(1).reshape(16, -1)
    expected = resize_positions(pos, (8, 8)).view(8, 8, -1).flip(1).reshape(64, -1)
    assert torch.allclose(resize_positions(mirrored, (8, 8)), expected, atol=1e-6)
    with pytest.raises(ConfigError, match="patch_size"):
        load_pretrained(written[1], image_size=18)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_truncated_file_is_one_line(suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    write_weights({"a": torch.ones(64, 64)}, path)
    assert torch.equal(read_weights(path)["a"], torch.ones(64, 64))
    whole = path.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(WeightsError, match="truncated") as refused:
            read_weights(path)
        assert path.name in str(refused.value) and "\n" not in str(refused.value)


class _Planted:
    def __reduce__(self):
        return (Path.touch, (Path(_Planted.marker),))


def test_pickled_objects_are_refused_unless_asked_for(tmp_path):
    path = tmp_path / "weights.pt"
    _Planted.marker = str(tmp_path / "ran")
    torch.save({"state_dict": {"module.a": torch.ones(2)}, "args": _Planted()}, path)
    with pytest.raises(WeightsError, match="allow_pickle") as refused:
        read_weights(path)
    assert not Path(_Planted.marker).exists() and "\n" not in str(refused.value)
    assert torch.equal(read_weights(path, allow_pickle=True)["a"], torch.ones(2))
    assert Path(_Planted.marker).exists()


def test_another_architecture_names_five_keys_of_each(folder):
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    other = {f"other.{name}": tensor for name, tensor in state.items() if name in names[:7]}
    other |= {name: tensor for name, tensor in state.items() if name not in names[:7]}
    other[names[-1]] = torch.zeros(3)
    save_file(other, folder / "model.safetensors")
    with pytest.raises(WeightsError) as refused:
        load_pretrained(folder)
    line = str(refused.value)
    assert "7 missing" in line and "7 unknown" in line and f"{names[-1]} (3,) instead of" in line
    assert line.count("other.") == 5 and "\n" not in line


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("config.json", {"model_type": "clip"}, "model_type 'clip'"),
        ("config.json", {"embed_dims": 3}, "did you mean 'embed_dim'"),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}, "normalises"),
    ],
)
def test_a_wrong_folder_is_one_line(folder, file, change, match):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(WeightsError, match=match) as refused:
        load_pretrained(folder)
    assert "\n" not in str(refused.value)


def test_a_tokenizer_of_more_words_than_the_model_is_refused(folder, tokenizer):
    path = folder / "config.json"
    data = json.loads(path.read_text())
    data["text"]["vocab_size"] = 270
    path.write_text(json.dumps(data))
    with pytest.raises(WeightsError, match="the model has 270"):
        load_pretrained(folder)


def test_a_missing_folder_names_the_nearest(folder, tmp_path):
    with pytest.raises(WeightsError, match="did you mean"):
        load_pretrained(tmp_path / "modle")


def test_no_tokenizer_no_folder(config, tmp_path):
    with pytest.raises(WeightsError, match="tokenizer="):
        build(config).save_pretrained(tmp_path / "new")


def test_a_name_on_the_hub_is_downloaded(written, monkeypatch):
    asked = []

    def download(repo, name, revision):
        if name not in FILES:
            raise EntryNotFoundError("404")
        asked.append((repo, name))
        return str(written[1] / name)

    monkeypatch.setattr(hub, "download", download)
    assert load_pretrained("nobody/model").config == written[0].config
    assert {repo for repo, _ in asked} == {"nobody/model"} and {name for _, name in asked} == FILES - {"README.md"}

    def refuse(*_, **__):
        raise OSError("no network\nat all")

    monkeypatch.setattr(hub, "download", refuse)
    with pytest.raises(WeightsError, match="no network") as refused:
        load_pretrained("nobody/model")
    assert "\n" not in str(refused.value)


def test_push_uploads_the_whole_folder(written, monkeypatch):
    sent = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **_):
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path, repo_id, **_):
            sent[repo_id] = {path.name for path in Path(folder_path).iterdir()}
            return "address"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    assert load_pretrained(written[1]).model.push_to_hub("nobody/model") == "address"
    assert sent == {"nobody/model": FILES}


def test_models_by_name():
    assert "coca_base" in list_models()
    model = create_model("tiny", vision={"depth": 1}, objectives=["itc", "ic"])
    assert model.config.vision.depth == 1 and model.config.vision.width == 96 and model.image_decoder is None
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        create_model("tini")
    with pytest.raises(ConfigError, match="did you mean 'depth'"):
        create_model("tiny", vision={"dept": 1})
