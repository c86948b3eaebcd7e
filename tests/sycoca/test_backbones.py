"""transformers' Swin and BERT in X-VLM: what they compute, published weights, and what is refused."""

import json
import shutil
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cross_entropy

from sycoca import hub_file
from sycoca.backbones import begins_given, like_bert, like_swin, load_backbones
from sycoca.config import BertConfig, ConfigError, ModelConfig, SwinConfig
from sycoca.fused_captioner import FusedCached, FusedRecomputed
from sycoca.hub import create_model, load_pretrained
from sycoca.masking import StepPlan
from sycoca.mlm import mask_words
from sycoca.presets import MODEL_PRESETS, PRESET_PARAMETERS
from sycoca.regions import areas, cells, whole
from sycoca.tokenizer import Tokenizer
from sycoca.weights import WeightsError
from sycoca.xvlm import XVLM, build_model
from tests.sycoca.micro import gradients
from tests.sycoca.micro_xvlm import CONTINUES, MICRO_XVLM, pairs, step, texts
from train.config import PRESETS, PretrainedConfig
from train.drops import seed_drops
from train.launch import parse
from train.optim import build_optimizer, set_learning_rate
from train.param_groups import pretraining_groups
from train.tasks.likelihood import text_labels
from train.tasks.start import able_to_write

transformers = pytest.importorskip("transformers")
PLAN = StepPlan(False, False)
LENGTHS, REGION_LENGTHS = [7, 3, 9, 5], [2, 4, 1, 9, 3, 2, 6, 2]
# Not in the order of this package's own vocabularies.
SPECIAL = {"[UNK]": 0, "[SEP]": 1, "[MASK]": 2, "[CLS]": 3, "[PAD]": 4}
SCRIPT = Path(__file__).parents[2] / "train" / "pretrain.py"


def scatter(model: torch.nn.Module, seed: int) -> None:
    """Weights far from how they begin, norms and biases included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.2 * noise if "norm" in name.lower() and name.endswith("weight") else 0.3 * noise)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Path]:
    """Folders as transformers writes them, of two stages and of four layers."""
    root = tmp_path_factory.mktemp("published")
    sizes = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=10, depths=[2, 3], num_heads=[1, 2], window_size=3, num_labels=3
    )
    # With a head, whose names have another beginning.
    swin = transformers.SwinForImageClassification(sizes)
    sizes = transformers.BertConfig(
        vocab_size=37,
        hidden_size=20,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=50,
        max_position_embeddings=30,
        pad_token_id=SPECIAL["[PAD]"],
    )
    bert = transformers.BertForMaskedLM(sizes)
    scatter(swin, 1)
    scatter(bert, 2)
    swin.save_pretrained(root / "swin")
    bert.save_pretrained(root / "bert")
    bert.bert.save_pretrained(root / "headless")
    words = [*SPECIAL, *"abcdefghijklmnop", *(f"##{letter}" for letter in "abcdefghijklmnop")]
    backend = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 3), ("[SEP]", 1)])
    backend.add_special_tokens([*SPECIAL])
    for name in ("bert", "headless"):
        backend.save(str(root / name / "tokenizer.json"))
    return {path.name: path for path in root.iterdir()}


def described(published: dict[str, Path]) -> ModelConfig:
    """The micro configuration with both."""
    config = replace(MICRO_XVLM, vision=like_swin(MICRO_XVLM.vision, str(published["swin"])))
    config = like_bert(config, str(published["bert"]))
    text = replace(config.text, bert=replace(config.text.bert, dropout=0.0))
    vision = replace(config.vision, swin=replace(config.vision.swin, drop_path=0.0))
    return replace(config, text=text, vision=vision)


@pytest.fixture(scope="module")
def config(published) -> ModelConfig:
    return described(published)


@pytest.fixture
def model(published, config) -> XVLM:
    torch.manual_seed(0)
    model = build_model(config)
    anew = load_backbones(model, vision=str(published["swin"]), text=str(published["bert"]))
    assert anew == ["box_head", "fusion", "image_projection", "itm_head", "logit_scale", "text_projection"]
    return model


def words(lengths: list[int]) -> Tensor:
    """Tokens (B, 10) with this vocabulary's [CLS] and padding."""
    found = texts(lengths)
    return torch.where(found == 0, SPECIAL["[PAD]"], torch.where(found == 1, SPECIAL["[CLS]"], found))


def batch_of(config):
    found = step(replace(config, objectives=("itc",)), LENGTHS, REGION_LENGTHS)
    found = found._replace(
        pairs=found.pairs._replace(tokens=words(LENGTHS)), regions=found.regions._replace(tokens=words(REGION_LENGTHS))
    )
    masked = (mask_words(part.tokens, part.seeds, CONTINUES, config.text, config.words) for part in found[:2])
    return found._replace(**dict(zip(("masked", "masked_regions"), masked)))


def test_sizes_and_vocabulary_are_the_published_ones(config):
    assert config.vision.swin == SwinConfig(10, (2, 3), (1, 2), 3, patch_size=2, drop_path=0.0)
    assert (config.vision.patch_size, config.vision.width, config.vision.depth, config.vision.grid) == (
        4,
        20,
        5,
        (4, 4),
    )
    text, fusion = config.text, config.fusion
    assert (text.depth, fusion.depth, text.heads, fusion.heads, text.width) == (2, 2, 2, 2, 20)
    assert text.mlp_ratio == fusion.mlp_ratio == 2.5 and text.bert.positions == 30
    assert (text.pad_id, text.sot_id, text.eot_id, text.mask_id) == (4, 3, 1, 2)


def test_features_are_those_of_transformers(published, model):
    images, tokens = pairs([1] * 3).images, words([7, 0, 9])
    valid = tokens != SPECIAL["[PAD]"]
    swin = transformers.AutoModel.from_pretrained(published["swin"]).eval()
    bert = transformers.AutoModel.from_pretrained(published["headless"]).eval()
    with torch.no_grad():
        image, text = model.encode_image(images), model.text(tokens)
        expected = swin(images)
        layers = bert(tokens, attention_mask=valid.long(), output_hidden_states=True).hidden_states
    assert torch.allclose(image.patches, expected.last_hidden_state, atol=1e-5)
    assert torch.allclose(image.cls, expected.pooler_output, atol=1e-5)
    assert torch.allclose(text.words[valid], layers[2][valid], atol=1e-5)
    assert torch.equal(text.cls, text.words[:, 0]) and torch.equal(text.valid, valid)


def test_fusion_is_berts_with_a_cross_attention(published, model):
    """Over whole images, layer by layer, up to the logits of hidden words."""
    bert = transformers.BertForMaskedLM.from_pretrained(published["bert"]).eval()
    sizes = bert.config
    sizes.is_decoder = sizes.add_cross_attention = True
    model.fusion.places.pos.data.zero_()
    images, tokens = pairs([1] * 3).images, words([7, 2, 9])
    valid = tokens != SPECIAL["[PAD]"]
    with torch.no_grad():
        image, text = model.encode_image(images), model.encode_text(tokens)
        x, memory = text.words, torch.cat([image.cls[:, None], image.patches], dim=1)
        for ours, theirs in zip(model.fusion.blocks, bert.bert.encoder.layer[2:]):
            layer = transformers.models.bert.modeling_bert.BertLayer(sizes)
            layer.load_state_dict(theirs.state_dict(), strict=False)
            cross = layer.crossattention
            query, out = ours.cross.q, ours.cross.out
            for target, source in ((cross.self.query, query), (cross.output.dense, out)):
                target.load_state_dict(source.state_dict())
            cross.output.LayerNorm.load_state_dict(ours.ln_cross.state_dict())
            for part, name in zip((0, 1), ("key", "value")):
                for kind in ("weight", "bias"):
                    getattr(getattr(cross.self, name), kind).copy_(getattr(ours.cross.kv, kind).chunk(2)[part])
            x = layer.eval()(x, valid[:, None, None, :], memory)
        views = model.view_images(image)
        asking = torch.arange(10).expand(3, 10)
        states = model.fusion(text.words, text.valid, views.tables, views.seen, asking)
        assert torch.allclose(states[valid], x[valid], atol=1e-4)
        assert torch.allclose(model.fused(text, views), x[:, 0], atol=1e-4)
        logits = model.text.sequence.tokens(states=model.word_head(states[valid]))
        assert torch.allclose(logits, bert.cls(x[valid]), atol=1e-3)


def test_boxes_are_means_of_the_last_grid(model):
    images = pairs([1] * 3).images
    rects = torch.cat([whole(1, (4, 4)), cells(torch.tensor([[0.3, 0.6, 0.4, 0.3]]), (4, 4))])
    seen, image = model.encode_regions(images, rects, torch.tensor([2, 1])), model.encode_image(images)
    assert torch.allclose(seen.features[0], image.features[2], atol=1e-6)
    col0, row0, col1, row1 = rects[1].tolist()
    inside = image.patches.view(3, 4, 4, -1)[1, row0:row1, col0:col1].mean((0, 1))
    expected = torch.nn.functional.normalize(model.image_projection(inside), dim=0)
    assert torch.allclose(seen.features[1], expected, atol=1e-6)
    assert seen.boxes.seen.valid.sum(1).tolist() == [17, 1 + areas(rects)[1]]
    # Each image is read once, whatever is asked of it.
    assert seen.boxes.tables[0].shape == (3 * 16 + 3 + 2, 40)


def test_it_learns(model, config):
    batch = batch_of(config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    totals = []
    for _ in range(6):
        found = model(batch, PLAN)
        optimizer.zero_grad()
        found.total.backward()
        assert all(g.isfinite().all() for g in gradients(model).values())
        optimizer.step()
        totals.append(found.total.item())
    assert totals[-1] < 0.8 * totals[0]
    assert min(found.itm, found.mlm, found.region_itc, found.region_mlm, found.l1, found.giou) > 0
    assert all((p != before[name]).any() for name, p in model.named_parameters())


def test_padding_and_company_do_not_matter(model, config):
    batch = batch_of(config)
    r = batch.regions
    with torch.no_grad():
        together = model.encode_text(r.tokens)
        for row in (0, 3):
            length = REGION_LENGTHS[row] + 1
            alone = model.encode_text(r.tokens[row, None, :length])
            assert torch.allclose(alone.words[0], together.words[row, :length], atol=1e-5)
        exact = model(batch, PLAN)
        for encoder in (model.text, model.fusion):
            encoder.packs = False
        assert torch.allclose(torch.stack(model(batch, PLAN)), torch.stack(exact), rtol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(batch, PLAN)
    assert rounded.total.item() == pytest.approx(exact.total.item(), rel=0.05)
    with torch.no_grad():
        images, tokens = batch.pairs.images, batch.pairs.tokens
        found = [m.encode_image(images).features @ m.encode_text(tokens).features.T for m in (model, model.bfloat16())]
    assert found[1].dtype == torch.float32 and torch.allclose(*found, atol=0.05)


@pytest.mark.parametrize("how", ["gradient_checkpointing", "selective_checkpointing"])
def test_recomputing_blocks_changes_nothing(how, model, config):
    again = build_model(replace(config, **{how: True}))
    again.load_state_dict(model.state_dict())
    batch, found = batch_of(config), []
    for each in (model, again):
        each(batch, PLAN).total.backward()
        found.append(gradients(each))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_is_dropped_follows_the_step(published, model, config):
    assert not config.drops
    noisy = replace(config, text=replace(config.text, bert=replace(config.text.bert, dropout=0.3)))
    assert noisy.drops
    again = build_model(noisy)
    again.load_state_dict(model.state_dict())
    batch, totals = batch_of(config), {}
    for key in [(5, 0), (6, 0), (5, 1), (5, 0)]:
        seed_drops(noisy, 3, *key)
        totals.setdefault(key, []).append(again(batch, PLAN).total.item())
    assert totals[5, 0][0] == totals[5, 0][1] and len({value[0] for value in totals.values()}) == 3
    with torch.no_grad():
        assert again.eval()(batch, PLAN).total.item() == pytest.approx(model(batch, PLAN).total.item(), rel=1e-6)


def test_they_are_taught_to_write(published, model):
    """Behind published weights, with dropout, and decoded as they were trained; their head of masked words is kept."""
    writer = able_to_write(model, 0.0)
    assert writer.state_dict().keys() == model.state_dict().keys()
    tokenizer = Tokenizer.load(published["bert"] / "tokenizer.json").ended()
    tokens = tokenizer.encode(["ab c p", "d", "abc d e f g"], 10)
    assert (tokens == SPECIAL["[SEP]"]).sum(1).tolist() == [1, 1, 1]
    images = pairs([1] * 3).images
    labels = text_labels(tokens, torch.ones(3, dtype=torch.int64), SPECIAL["[SEP]"])
    noisy = build_model(replace(writer.config, text=replace(writer.config.text, bert=BertConfig(30, dropout=0.3))))
    noisy.load_state_dict(writer.state_dict())
    losses = []
    for seed in (1, 1, 2):
        seed_drops(noisy.config, 0, seed, 0)
        losses.append(noisy.caption_loss(noisy.encode_image(images), tokens, labels).item())
    assert losses[0] == losses[1] != losses[2]
    with torch.no_grad():
        image = writer.eval().encode_image(images)
        plain = noisy.eval().caption_loss(image, tokens, labels)
        logits = writer.caption_logits(image, tokens)[:, :-1]
        expected = cross_entropy(logits.transpose(1, 2), labels.clamp(min=0), reduction="none")[labels >= 0].sum()
        assert plain.item() == pytest.approx(expected.item(), rel=1e-4)
        cached, anew = FusedCached(writer, image, 10), FusedRecomputed(writer, image, 10)
        for t in range(6):
            assert torch.allclose(cached.advance(tokens[:, t : t + 1]), anew.advance(tokens[:, t : t + 1]), atol=1e-4)


def test_a_folder_of_this_package_holds_them(published, model, config, tmp_path):
    tokenizer = Tokenizer.load(published["bert"] / "tokenizer.json").ending(False)
    model.eval().save_pretrained(tmp_path, tokenizer=tokenizer)
    again, words_of, _ = load_pretrained(tmp_path)
    tokens = words_of.encode(["ab c", "[MASK] [SEP] p"], 10)
    # Text cannot spell a special token.
    assert not {SPECIAL["[MASK]"], SPECIAL["[SEP]"]} & set(tokens.flatten().tolist()) and tokens[0, 0] == 3
    images = pairs([1, 1]).images
    with torch.no_grad():
        found = [m.locate(m.encode_text(tokens), m.view_images(m.encode_image(images))) for m in (model, again)]
    assert again.config == config and torch.equal(*found)
    larger = load_pretrained(tmp_path, image_size=24).model
    assert larger.encode_image(torch.zeros(1, 3, 24, 24)).patches.shape == (1, 36, 20)


def test_a_bert_without_a_head(published, config):
    model = build_model(config)
    anew = load_backbones(model, text=str(published["headless"]))
    assert {"word_head", "vision", "text"} <= set(anew)
    bert = transformers.AutoModel.from_pretrained(published["headless"])
    assert torch.equal(model.text.sequence.tokens.weight, bert.embeddings.word_embeddings.weight)


def test_the_oldest_names_of_weights_are_known(published, model, config, tmp_path):
    """As bert-base-uncased has them: norms with gamma and beta, and a head for the next sentence."""
    shutil.copytree(published["bert"], tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for name in [name for name in state if "LayerNorm" in name]:
        ending = ".".join(name.split(".")[-2:])
        state[name.removesuffix(ending) + old[ending]] = state.pop(name)
    state["cls.seq_relationship.weight"] = torch.zeros(2, 20)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = build_model(config)
    load_backbones(again, vision=str(published["swin"]), text=str(tmp_path))
    found, expected = again.state_dict(), model.state_dict()
    given = [name for name in expected if begins_given(name, vision=True, text=True)]
    assert len(given) > 100 and all(torch.equal(found[name], expected[name]) for name in given)


def test_the_published_model_has_216_million_parameters():
    config = MODEL_PRESETS["xvlm_swin_base"]
    with torch.device("meta"):
        model = build_model(config)
        swin = transformers.SwinModel(
            transformers.SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32])
        )
        bert = transformers.BertForMaskedLM(transformers.BertConfig())
    counts = [sum(p.numel() for p in part.parameters()) for part in (model, swin, bert)]
    total = counts[0]
    assert (total, total) == PRESET_PARAMETERS["xvlm_swin_base"] and round(total / 1e6) == 216
    assert begins_given("fusion.blocks.3.output.dense.weight", vision=False, text=True)
    given = sum(p.numel() for name, p in model.named_parameters() if begins_given(name, vision=True, text=True))
    assert given == counts[1] + counts[2]
    # What the published code has besides: query, output, keys and values of six cross-attentions with their norms, two
    # heads, projections with biases, a temperature. This model's projections have none; its image tokens have a place.
    d, v = 768, 1024
    cross = 6 * (2 * (d * d + d) + 2 * (v * d + d) + 2 * d)
    heads = sum(d * 2 * d + 2 * d + 4 * d + 2 * d * n + n for n in (2, 4))
    projections = (v + 1) * 256 + (d + 1) * 256 + 1
    assert total - given == cross + heads + projections - 2 * 256 + 49 * v


def test_rates_of_what_begins_anew_and_of_lower_layers(published, config):
    model = build_model(config)
    base = PRESETS["xvlm_swin_base"]
    given = PretrainedConfig(vision=str(published["swin"]), text=str(published["bert"]))
    run = replace(base, model=config, pretrained=given, train=replace(base.train, layer_decay=0.5))
    groups = pretraining_groups(model, run)
    optimizer = build_optimizer(groups, run.optimizer)
    set_learning_rate(optimizer, 1.0)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rates.keys() == set(names.values())
    swin = "vision.swin.encoder.layers"
    assert rates["vision.swin.embeddings.norm.weight"] == 0.5**6 and rates["vision.swin.layernorm.weight"] == 1
    assert rates[f"{swin}.0.blocks.1.mlp.fc1.weight"] == rates[f"{swin}.0.downsample.reduction.weight"] == 0.5**4
    assert rates[f"{swin}.1.blocks.2.attention.q_proj.weight"] == rates["text.blocks.1.output.dense.bias"] == 0.5
    assert rates["fusion.blocks.0.output.dense.weight"] == rates["word_head.dense.weight"] == 1
    anew = ("fusion.blocks.0.cross.q.weight", "fusion.places.pos", "itm_head.out.weight", "logit_scale.log_scale")
    assert [rates[name] for name in anew] == [2.0] * 4
    decays = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert decays["vision.swin.embeddings.patch_embeddings.projection.weight"] > 0
    assert decays[f"{swin}.0.blocks.0.attention.relative_position_bias.relative_position_bias_table"] == 0


def test_frozen_encoders_leave_nothing_out(published, config):
    noisy = replace(
        config,
        vision=replace(config.vision, swin=replace(config.vision.swin, drop_path=0.5)),
        text=replace(config.text, bert=replace(config.text.bert, dropout=0.5)),
    )
    model, base = build_model(noisy), PRESETS["xvlm_swin_base"]
    tokens, images = words([7, 3]), pairs([1, 1]).images
    for frozen in (False, True):
        if frozen:
            pretraining_groups(model, replace(base, model=noisy, train=replace(base.train, freeze=("vision", "text"))))
        for encode, given in ((model.vision, images), (model.text, tokens)):
            first, again = encode(given).cls, encode(given).cls
            assert torch.equal(first, again) == (not first.requires_grad) == frozen


COMMAND = ["--config", "ds_zero2.json", "--preset", "xvlm_tiny", "--print-config"]


def test_a_run_takes_sizes_and_vocabulary(published, capsys):
    given = [f"pretrained.vision={published['swin']}", f"pretrained.text={published['bert']}"]
    with pytest.raises(SystemExit):
        parse([*COMMAND, *given, "drop_path=0.2", "freeze=text"], script=SCRIPT, has_cuda=False)
    run = json.loads(capsys.readouterr().out)["run"]
    assert run["model"]["vision"]["swin"] == {
        "embed_width": 10, "depths": [2, 3], "heads": [1, 2], "window": 3, "patch_size": 2, "drop_path": 0.2
    }  # fmt: skip
    assert run["model"]["text"]["mask_id"] == 2 and run["model"]["fusion"]["depth"] == 2
    assert run["data"]["tokenizer"] == str(published["bert"] / "tokenizer.json")
    assert run["pretrained"]["anew_rate"] == 2.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pretrained.vision={bert}"], "pretrained.vision={bert}: config.json: model_type 'bert', needs 'swin'"),
        (["pretrained.vision={swin}x"], "pretrained.vision={swin}x: no such folder; did you mean '{swin}'?"),
        (["pretrained.text={root}"], "pretrained.text={root}: no config.json in this folder"),
        (
            ["pretrained.text={bert}", "model.text.width=24"],
            "pretrained.text={bert}: model.text.width is 20 there, not 24",
        ),
        (["pretrained.text={bert}", "--init={swin}"], "swin of transformers; pretrained.vision={swin} takes it"),
        (["pretrained.text={bert}", "context_length=31"], "={bert}: context_length: 31, text.bert has 30 positions"),
        (["pretrained.vision={swin}", "image_size=8"], "={swin}: swin.window: 3, the last grid has 2 x 2 cells"),
        (["pretrained.vision="], "pretrained.vision: names a folder or a repository of the hub, not nothing"),
        (["pretrained.visoin={swin}"], "pretrained.visoin: unknown key; did you mean 'pretrained.vision'?"),
        (["pretrained.vision={swin}", "anew_rate=0"], "pretrained.anew_rate: 0.0, needs to be above 0 and finite"),
        (["pretrained.vision={swin}", "train.compile=true"], "train.compile: true, but blocks of transformers"),
        (["freeze=vision"], "train.freeze=vision: without --init or pretrained.vision"),
    ],
)
def test_a_run_is_refused_in_one_line(overrides, message, published):
    names = {"swin": published["swin"], "bert": published["bert"], "root": published["bert"].parent}
    with pytest.raises(ConfigError) as caught:
        parse([*COMMAND, *(text.format(**names) for text in overrides)], script=SCRIPT, has_cuda=False)
    assert message.format(**names) in str(caught.value) and "\n" not in str(caught.value)


def test_a_whole_model_brings_its_own_encoders(published):
    given = PretrainedConfig(text=str(published["bert"]))
    with pytest.raises(ConfigError, match=r"pretrained\.text: --init runs/tiny brings its own encoders"):
        replace(PRESETS["xvlm_tiny"], init="runs/tiny", pretrained=given)


def test_without_a_network_one_line_at_once(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    for name in hub_file._PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(hub_file, "reachable", hub_file.reachable.__wrapped__)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits for the network"))
    line = (
        "nobody/bert: no such folder, and not to be had from the hub (huggingface.co cannot be reached, and config.json"
    )
    with pytest.raises(ConfigError) as refused:
        like_bert(MICRO_XVLM, "nobody/bert")
    assert str(refused.value).startswith(line) and "\n" not in str(refused.value)
    with pytest.raises(WeightsError) as refused:
        load_pretrained("nobody/bert")
    assert str(refused.value).startswith(line)


def test_with_a_network_the_hub_is_asked(monkeypatch, published):
    asked = []

    def download(repository, name, *, revision, local_files_only):
        asked.append((repository, name, local_files_only))
        return str(published["swin"] / name)

    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:1")
    monkeypatch.setattr(hub_file, "reachable", hub_file.reachable.__wrapped__)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert like_swin(MICRO_XVLM.vision, "somebody/swin").swin.window == 3
    assert asked == [("somebody/swin", "config.json", False)]


def test_weights_that_do_not_fit_are_refused_in_one_line(published, config, tmp_path):
    name = str(published["swin"])
    other = replace(config.vision, swin=replace(config.vision.swin, heads=(2, 2)))
    with pytest.raises(ConfigError, match=r"relative_position_bias_table \(25, 1\), the model has \(25, 2\)"):
        load_backbones(build_model(replace(config, vision=other)), vision=name)
    with pytest.raises(ConfigError, match=r"a Swin, and model.vision.swin is none"):
        load_backbones(build_model(replace(config, vision=MICRO_XVLM.vision)), vision=name)
    (tmp_path / "config.json").write_text((published["swin"] / "config.json").read_text())
    with pytest.raises(ConfigError) as caught:
        load_backbones(build_model(config), vision=str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}: ") and "\n" not in str(caught.value)


def test_without_transformers_one_line(monkeypatch, config):
    monkeypatch.setitem(sys.modules, "transformers", None)
    line = r'needs transformers, which is not installed: pip install -e ".\[transformers\]"'
    with pytest.raises(ConfigError, match=f"^model.vision.swin: {line}"):
        build_model(config)
    with pytest.raises(ConfigError, match=f"^model.text.bert: {line}"):
        create_model("xvlm_tiny", text={"bert": {}})
    with pytest.raises(ConfigError, match=f"^model.vision.swin: {line}"):
        parse(["--config", "ds_zero2.json", "--preset", "xvlm_swin_base"], script=SCRIPT, has_cuda=False)


def test_objectives_that_leave_out_patches_need_a_vit(config):
    causal = replace(MICRO_XVLM.text, kind="causal")
    for name in ("ic", "tgmim"):
        with pytest.raises(ConfigError, match=f"'{name}' leaves out patches, which vision.swin has no place for"):
            replace(config, objectives=("itc", name), text=causal)
    assert build_model(replace(config, objectives=("itc",))).fusion is None


def test_a_swin_beside_this_packages_own_texts(config):
    """And BERT beside a ViT."""
    swin = build_model(replace(config, text=MICRO_XVLM.text))
    bert = build_model(
        replace(config, vision=MICRO_XVLM.vision, text=replace(config.text, bert=BertConfig(dropout=0.0)))
    )
    for model in (swin, bert):
        batch = step(model.config, LENGTHS, REGION_LENGTHS)
        found = model(batch, PLAN)
        found.total.backward()
        assert found.total.isfinite() and all(p.grad is not None for p in model.parameters())


def test_transformers_leaves_the_kernels_of_this_package_alone():
    from transformers.utils import is_kernels_available

    assert not is_kernels_available()
    assert sys.modules["kernels"].__file__ == str(SCRIPT.parents[1] / "kernels" / "__init__.py")
