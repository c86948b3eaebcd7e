"""Encoders and decoders: who sees whom."""

import pytest
import torch

from sycoca.text import valid_tokens
from sycoca.vision import patchify, unpatchify
from tests.sycoca.micro import MICRO, batch, build, captions, micro, uniform

FORMS = ("token", "drop")


def masked_pixels_changed(images, masked):
    patches = patchify(images, 4).clone()
    index = masked[:, :, None].expand(-1, -1, patches.shape[2])
    return unpatchify(patches.scatter(1, index, 9.0), 4, (4, 4))


def test_unpatchify_is_the_inverse():
    images = uniform(2, 3, 16, 16, salt=1)
    assert torch.equal(unpatchify(patchify(images, 4), 4, (4, 4)), images)
    # Row-major patches; pixels ordered row, column, channel.
    assert torch.equal(patchify(images, 4)[1, 6, 3 * (4 * 2 + 1) : 3 * (4 * 2 + 1) + 3], images[1, :, 4 + 2, 8 + 1])


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_masked_pixels_do_not_reach_visible_features(form):
    model = build(micro(masking={"masked_input": form}))
    data = batch([3, 8, 2])
    text = model.encode_text(data.tokens)
    selection = model.select(model.encode_image(data.images), text)
    other = masked_pixels_changed(data.images, selection.masked)
    assert not torch.equal(other, data.images)
    first, second = (
        model.vision.encode_visible(model.vision.embed(x), selection.visible) for x in (data.images, other)
    )
    assert torch.equal(first, second)
    assert torch.equal(*(model.reconstruct(x, text, selection) for x in (data.images, other)))


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_visible_pixels_and_caption_reach_the_reconstruction(form):
    model = build(micro(masking={"masked_input": form}))
    data = batch([3, 8, 2])
    text = model.encode_text(data.tokens)
    selection = model.select(model.encode_image(data.images), text)
    pixels = model.reconstruct(data.images, text, selection)
    assert pixels.shape == (3, 8, 48)
    changed = masked_pixels_changed(data.images, selection.visible[:, :1])
    assert not torch.isclose(model.reconstruct(changed, text, selection), pixels).any(2).any()
    other = model.encode_text(captions([3, 8, 2], salt=55))
    assert not torch.isclose(model.reconstruct(data.images, other, selection), pixels).all(2).any()


@pytest.mark.parametrize(
    ("tokens", "valid"),
    [
        ([1, 5, 6, 2, 0, 0], [1, 1, 1, 1, 0, 0]),
        # CLIP's padding is also a word: before the end it counts.
        ([1, 0, 6, 2, 0, 0], [1, 1, 1, 1, 0, 0]),
        ([1, 5, 2, 7, 2, 9], [1, 1, 1, 0, 0, 0]),
        ([1, 5, 6, 7, 8, 2], [1, 1, 1, 1, 1, 1]),
        ([1, 5, 0, 6, 0, 0], [1, 1, 1, 1, 0, 0]),
        ([0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]),
    ],
)
def test_valid_tokens(tokens, valid):
    assert valid_tokens(torch.tensor([tokens]), MICRO.text).long().tolist() == [valid]


@torch.no_grad()
def test_a_token_never_sees_its_future():
    model = build(MICRO)
    data = batch([8, 8])
    image = model.encode_image(data.images)
    logits, words = model.caption_logits(image, data.tokens), model.encode_text(data.tokens).words
    for t in range(9):
        changed = data.tokens.clone()
        changed[:, t + 1 :] = 3 + (changed[:, t + 1 :] + 5) % 30
        assert torch.equal(model.caption_logits(image, changed)[:, : t + 1], logits[:, : t + 1])
        assert not torch.isclose(model.caption_logits(image, changed)[:, t + 1 :], logits[:, t + 1 :]).all(2).any()
        assert torch.equal(model.encode_text(changed).words[:, : t + 1], words[:, : t + 1])


@torch.no_grad()
def test_the_text_feature_sees_every_word_and_no_padding():
    model = build(MICRO)
    tokens = captions([3])
    features = model.encode_text(tokens).features
    for t in range(10):
        changed = tokens.clone()
        changed[:, t] = 3 + (changed[:, t] + 5) % 30
        same = torch.equal(model.encode_text(changed).features, features)
        assert same == (t > 4), f"token {t}"


@torch.no_grad()
def test_the_text_feature_is_that_of_a_class_token_at_the_end():
    """The compact place of [CLS] is equal to position T with a key mask over the padding."""
    model = build(MICRO)
    tokens = captions([3, 8, 0])
    text = model.text
    B, T = tokens.shape
    x = torch.cat([text.sequence(tokens), text.sequence.cls.expand(B, 1, -1)], dim=1)
    valid = torch.cat([valid_tokens(tokens, MICRO.text), torch.ones(B, 1, dtype=torch.bool)], dim=1)
    seen = torch.ones(T + 1, T + 1, dtype=torch.bool).tril() & valid[:, None, :]
    seen[:, :T, 0] = True
    for block in text.blocks:
        q, k, v = block.attn._split(block.attn.qkv(block.ln_attn(x)))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
        x = x + block.attn.out(out.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_mlp(x))
    torch.testing.assert_close(text(tokens).cls, text.ln_final(x[:, -1]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_unfinished_caption_that_ends_in_the_padding_id_is_read():
    model = build(MICRO)
    data = batch([8])
    image = model.encode_image(data.images)
    whole = torch.tensor([[1, 5, 0, 6, 7]])
    torch.testing.assert_close(
        model.caption_logits(image, whole[:, :3]), model.caption_logits(image, whole)[:, :3], rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_the_last_decoder_layer_answers_for_the_masked_patches_alone():
    layer = build(MICRO).image_decoder.layers[-1]
    x, words = uniform(2, 16, 16, salt=1), uniform(2, 10, 24, salt=2)
    valid = torch.arange(10) < torch.tensor([[4], [9]])
    rows = torch.tensor([[0, 5, 15], [2, 3, 9]])
    expected = layer(x, words, valid).gather(1, rows[:, :, None].expand(-1, -1, 16))
    torch.testing.assert_close(layer(x, words, valid, rows), expected, rtol=1e-5, atol=1e-6)
