"""Captions by X-VLM's text and fusion encoder: what they compute, that no word sees those to come, and decoding."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sycoca import cpu_attention, fused_captioner
from sycoca.config import BertConfig, ConfigError
from sycoca.decode_step import lay_out
from sycoca.fused_captioner import FusedCached, FusedRecomputed
from sycoca.generate import generate_tokens
from sycoca.hub import load_pretrained
from sycoca.tokenizer import Tokenizer
from tests.sycoca.micro import gradients, uniform
from tests.sycoca.micro_xvlm import MICRO_XVLM, build, micro_xvlm, texts
from train.tasks.start import able_to_write

EOT = MICRO_XVLM.text.eot_id
WRITER = replace(MICRO_XVLM, text=replace(MICRO_XVLM.text, writes=True))
POOLED = replace(WRITER, vision=replace(WRITER.vision, region_form="pooled"))
BERT = replace(
    WRITER,
    text=replace(WRITER.text, heads=2, bert=BertConfig(positions=12)),
    fusion=replace(WRITER.fusion, heads=2),
)
needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="no transformers")
FORMS = [
    pytest.param(WRITER, id="own"),
    pytest.param(POOLED, id="pooled"),
    pytest.param(BERT, id="bert", marks=needs_transformers),
]


def written(lengths: list[int], salt: int = 7) -> Tensor:
    """Tokens (B, 10): [CLS], so many pieces of words, [SEP], padding."""
    tokens = texts(lengths, salt)
    tokens[torch.arange(len(lengths)), torch.tensor(lengths) + 1] = EOT
    return tokens


def labels_of(tokens: Tensor) -> Tensor:
    behind = (tokens == EOT).cumsum(1) - (tokens == EOT).long() > 0
    return tokens.masked_fill(behind, -1)[:, 1:]


def seen(model, count: int = 2):
    return model.encode_image(uniform(count, 3, 16, 16, salt=3))


def plain_logits(model, patches: Tensor, cls: Tensor, tokens: Tensor) -> Tensor:
    """Logits (T, V) of one caption (T,) of one image, written out in the model's weights."""
    w, text, fusion = model.state_dict(), model.config.text, model.config.fusion
    image = torch.cat([cls[None], patches + w["fusion.places.pos"]])
    causal = torch.full((len(tokens), len(tokens)), -torch.inf, dtype=image.dtype).triu(1)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def attend(q, k, v, heads, bias):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
        return ((q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1) @ v).transpose(0, 1).flatten(1)

    def told(x, name, heads):
        found = attend(*linear(norm(x, f"{name}.ln_attn"), f"{name}.attn.qkv").chunk(3, -1), heads, causal)
        return x + linear(found, f"{name}.attn.out")

    def mlp(x, name):
        hidden = F.gelu(linear(norm(x, f"{name}.ln_mlp"), f"{name}.mlp.up"))
        return x + linear(hidden, f"{name}.mlp.down")

    x = w["text.sequence.tokens.weight"][tokens] + w["text.sequence.pos"][: len(tokens)]
    for i in range(text.depth):
        x = mlp(told(x, f"text.blocks.{i}", text.heads), f"text.blocks.{i}")
    for i in range(fusion.depth):
        name = f"fusion.blocks.{i}"
        x = told(x, name, fusion.heads)
        memory = linear(norm(image, f"{name}.ln_memory"), f"{name}.cross.kv").chunk(2, -1)
        found = attend(linear(norm(x, f"{name}.ln_cross"), f"{name}.cross.q"), *memory, fusion.heads, 0.0)
        x = mlp(x + linear(found, f"{name}.cross.out"), name)
    x = norm(F.gelu(linear(norm(x, "fusion.ln_final"), "word_head.dense")), "word_head.norm")
    return x @ w["text.sequence.tokens.weight"].T + w["text.sequence.tokens.bias"]


def test_logits_are_those_of_the_written_out_decoder():
    model = build(WRITER).double().eval()
    tokens = written([3, 8, 0, 5])
    with torch.no_grad():
        image = model.encode_image(uniform(2, 3, 16, 16, salt=3).double())
        logits = model.caption_logits(image, tokens)
        for row in range(4):
            expected = plain_logits(model, image.patches[row // 2], image.cls[row // 2], tokens[row])
            assert torch.allclose(logits[row], expected, atol=1e-10), row


@pytest.mark.parametrize("config", FORMS)
def test_a_position_depends_on_no_token_behind_it(config):
    model, tokens = build(config).eval(), written([8, 5])
    with torch.no_grad():
        image = seen(model)
        logits = model.caption_logits(image, tokens)
        for t in range(9):
            changed = tokens.clone()
            changed[:, t + 1 :] = (changed[:, t + 1 :] + 7) % 37
            other = model.caption_logits(image, changed)
            assert torch.equal(other[:, : t + 1], logits[:, : t + 1]), t
            assert not torch.isclose(other[:, t + 1 :], logits[:, t + 1 :]).all(2).any(), t
        # Nor on company and padding, but on the image.
        alone = model.caption_logits(image._make(None if f is None else f[1:] for f in image), tokens[1:, :7])
        assert torch.allclose(alone[0], logits[1, :7], atol=1e-5)
        assert not torch.allclose(model.caption_logits(image, tokens.roll(1, 0))[0, :6], logits[1, :6], atol=1e-2)


@pytest.mark.parametrize("config", FORMS)
def test_the_loss_is_the_smoothed_cross_entropy_of_the_counted_tokens(config):
    """Packed and padded alike; a question in front of the labels is read, but not counted."""
    config = replace(config, loss=replace(config.loss, caption_label_smoothing=0.1))
    model, tokens = build(config).eval(), written([8, 1, 4, 0])
    labels = labels_of(tokens)
    labels[2, :3] = -1
    logits = model.caption_logits(seen(model), tokens)[:, :-1]
    counted = labels >= 0
    expected = F.cross_entropy(logits[counted], labels[counted], label_smoothing=0.1, reduction="sum")
    expected.backward()
    theirs = gradients(model)
    for packs, recompute in ((True, "nothing"), (False, "nothing"), (True, "blocks"), (True, "all but products")):
        model.text.packs, model.text.recompute, model.fusion.recompute = packs, recompute, recompute
        model.zero_grad()
        loss = model.caption_loss(seen(model), tokens, labels)
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        ours = gradients(model)
        for name, truth in theirs.items():
            assert (ours[name] - truth).norm() <= 1e-4 * truth.norm() + 1e-6, name
    assert model.caption_loss(seen(model), tokens, torch.full_like(labels, -1)).item() == 0


@pytest.mark.parametrize("config", FORMS)
@pytest.mark.parametrize("way", ["steps", "blocks", "laid out"])
def test_decoding_step_by_step_is_the_teacher_forced_pass(config, way, monkeypatch):
    model, tokens = build(config).eval(), written([7, 8, 6, 8])
    if way == "blocks":
        # As on a GPU.
        monkeypatch.setattr(fused_captioner, "fits", lambda block: False)
        monkeypatch.setattr(cpu_attention, "fits", lambda x: False)
    with torch.no_grad():
        image = seen(model)
        logits = model.caption_logits(image, tokens)
        if way == "laid out":
            lay_out(model)
        session = FusedCached(model, image, 10)
        # Images begin alike, with more than one token; then two captions of each, their order changed midway.
        start = tokens[[0, 2], :2]
        assert torch.allclose(session.advance(start), model.caption_logits(image, start)[:, -1], atol=1e-5)
        session.select(torch.tensor([0, 0, 1, 1]))
        prefix = start.repeat_interleave(2, 0)
        for t in range(2, 9):
            prefix = torch.cat([prefix, tokens[:, t : t + 1]], 1)
            found = session.advance(tokens[:, t : t + 1])
            assert torch.allclose(found, model.caption_logits(image, prefix)[:, -1], atol=2e-5), t
            if t == 4:
                order = torch.tensor([1, 0, 2, 2])
                session.select(order)
                prefix = prefix[order]
        assert logits.shape == (4, 10, 37)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return": 2}, {"temperature": 1.0, "num_return": 3, "seed": 4}], ids=str
)
def test_captions_are_those_of_a_session_without_memory(options):
    model = build(WRITER).eval()
    with torch.no_grad():
        found, anew = (
            generate_tokens(model, seen(model), prompt=[[7], [9, 8]], session=session, **options)
            for session in (None, FusedRecomputed)
        )
    assert torch.equal(found.tokens, anew.tokens) and torch.allclose(found.scores, anew.scores, atol=1e-4)


def test_what_learned_to_match_is_made_able_to_write():
    """No new weights where masked words were learned; else the head that these would have made."""
    model = build(MICRO_XVLM)
    made = able_to_write(model)
    assert made.config == replace(WRITER, loss=replace(WRITER.loss, caption_label_smoothing=0.1))
    state = model.state_dict()
    assert made.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in made.state_dict().items())
    assert able_to_write(made) is made and able_to_write(made, 0.0).config == WRITER
    without = able_to_write(build(micro_xvlm(objectives=("itc", "itm"))))
    fresh = {"word_head.dense.weight", "word_head.dense.bias", "word_head.norm.weight", "word_head.norm.bias"}
    plain = build(micro_xvlm(objectives=("itc", "itm"))).state_dict()
    assert without.state_dict().keys() - plain.keys() == fresh | {"text.sequence.tokens.bias"}
    assert all(torch.equal(without.state_dict()[name], tensor) for name, tensor in plain.items())
    assert not without.learns_pairs or without.itm_head is not None


def test_what_was_learned_before_is_not_changed():
    """Matching and masked words of a model that writes are those of one that does not."""
    model, writer = build(MICRO_XVLM), build(WRITER)
    tokens = written([4, 2])
    with torch.no_grad():
        logits = [m.match(m.encode_text(tokens), m.view_images(seen(m))) for m in (model, writer)]
    assert torch.equal(*logits)


def test_a_folder_says_whether_its_model_writes(tmp_path):
    tokenizer = Tokenizer.train_wordpiece(["abc abd", "dcba"], 37)
    for config, name in ((WRITER, "writes"), (MICRO_XVLM, "matches")):
        build(config).save_pretrained(tmp_path / name, tokenizer=tokenizer)
    assert load_pretrained(tmp_path / "writes").config == WRITER
    path = tmp_path / "matches" / "config.json"
    older = json.loads(path.read_text())
    del older["text"]["writes"]
    path.write_text(json.dumps(older))
    found = load_pretrained(tmp_path / "matches")
    assert found.config == MICRO_XVLM and not found.config.writes
    with pytest.raises(ValueError, match=r"has not learned to write; train/finetune.py captioning teaches it"):
        generate_tokens(found.model, seen(found.model))
    with pytest.raises(ValueError, match="without captioning"):
        found.model.caption_logits(seen(found.model), written([3, 2]))


def test_only_a_bidirectional_encoder_below_a_fusion_encoder_is_taught():
    causal = replace(MICRO_XVLM.text, kind="causal", writes=True)
    with pytest.raises(ConfigError, match=r"text.writes: of 'bidirectional' text under model.fusion"):
        replace(MICRO_XVLM, text=causal, objectives=("itc", "itm"))
    with pytest.raises(ConfigError, match=r"text.writes"):
        replace(WRITER, fusion=None, objectives=("itc",))
