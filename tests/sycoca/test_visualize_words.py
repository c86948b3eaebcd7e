import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sycoca.page import heat, page, text
from sycoca.tokenizer import Tokenizer
from sycoca.visualize import look_at, overlay_figure, save_overlay, view_pairs
from sycoca.visualize_page import overlay_page
from sycoca.visualize_words import caption_attention, word_maps
from tests.sycoca.commands.conftest import CAPTIONS, COCA, build


@pytest.fixture(scope="module")
def own():
    return Tokenizer.train(CAPTIONS, 280)


@pytest.fixture(params=["own", "clip"])
def vocabulary(request, own):
    return own if request.param == "own" else Tokenizer.clip()


@pytest.mark.parametrize("caption", ["a red square", "Two  Dogs, running.", "naïve 犬 ﬁsh 🙂 don't", "", "x" * 300])
def test_words_and_their_tokens_cover_the_caption(vocabulary, caption):
    words = vocabulary.words(caption, 16)
    positions = [p for _, where in words for p in where]
    row = vocabulary.encode([caption], 16)[0].tolist()
    end = row.index(vocabulary.eot_id)
    assert positions == list(range(1, end))
    if caption == "Two  Dogs, running.":
        assert [word for word, _ in words][:3] == ["Two", "Dogs", ","]
        for word, where in words:
            (written,) = vocabulary.decode([[row[p] for p in where] + [vocabulary.eot_id]])
            assert written == word.lower()


@pytest.fixture
def pictures():
    return torch.from_numpy(np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32))


def test_the_score_of_a_patch_is_that_of_its_best_token(own, pictures):
    captions = ["a red", "a green heart", "a"]
    views = view_pairs(build(), own, pictures, captions, words=True)
    for view in views:
        assert view.words.kind == "score" and view.words.words[-1] == "[EOT]"
        # Words of several tokens are means; single tokens and their maximum are exact.
        assert (view.words.maps.max(0) <= view.scores + 1e-5).all()
    model = build()
    image, encoded = model.encode_image(pictures), model.encode_text(own.encode(captions, 16))
    tokens = model.token_scores(image, encoded).masked_fill(~encoded.scored[:, None], -2).amax(2)
    assert torch.allclose(tokens, model.select(image, encoded).scores, atol=1e-5)


def test_attention_is_that_of_the_captioner(own, pictures):
    """Against the decoder with values that name their patch."""
    model = build(COCA)
    image, encoded = model.encode_image(pictures), model.encode_text(own.encode(CAPTIONS, 16))
    seen = caption_attention(model.caption_decoder, encoded.words, image.patches)
    assert seen.shape == (3, 16, 16) and torch.allclose(seen.sum(2), torch.ones(3, 16), atol=1e-5)
    ((causal, cross),) = model.caption_decoder.layers()
    x = cross.ln_attn(causal(encoded.words))
    memory = cross.ln_memory(image.patches)
    with torch.no_grad():
        keys = cross.attn.kv(memory)[..., :16].view(3, 16, 2, 8)
        query = cross.attn.q(x).view(3, 16, 2, 8)
        weights = torch.einsum("bthd,bphd->bhtp", query, keys).div(8**0.5).softmax(-1).mean(1)
    assert torch.allclose(seen, weights, atol=1e-6)
    assert not cross.attn._forward_pre_hooks


def test_a_model_without_scores_shows_where_it_looks(own, pictures):
    model = build(COCA)
    (first, *_) = view_pairs(model, own, pictures, CAPTIONS, words=True)
    assert first.words.kind == "attention" and len(first.words.words) == len(first.words.maps)
    image, encoded = model.encode_image(pictures), model.encode_text(own.encode(CAPTIONS, 16))
    seen = caption_attention(model.caption_decoder, encoded.words, image.patches)[0].detach()
    where = own.words(CAPTIONS[0], 16)[1][1]
    # What is about to be written is looked for one position earlier.
    expected = seen[[p - 1 for p in where]].mean(0).view(4, 4)
    assert np.allclose(first.words.maps[1], expected, atol=1e-6)


def test_nothing_is_shown_for_patches_without_a_place(own, pictures):
    model = build(replace(COCA, objectives=("itc",)))
    image, encoded = model.encode_image(pictures), model.encode_text(own.encode(CAPTIONS, 16))
    assert word_maps(model, own, image, encoded, CAPTIONS, scored=False) is None
    assert view_pairs(model, own, pictures, CAPTIONS, words=True)[0].words is None


@pytest.fixture
def files(tmp_path):
    paths = []
    for i, size in enumerate([(90, 60), (700, 900), (1, 1)]):
        pixels = np.random.default_rng(i).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        paths.append(tmp_path / f"<{i}> & co.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


HOSTILE = ['<script>alert("1")</script>', "a & b 'c' \x1b[31m\u202e", "</style><img src=x onerror=alert(1)>"]


def test_a_page_holds_everything_and_loads_nothing(own, files, tmp_path):
    views = look_at(build(), own, files, HOSTILE)
    assert [view.picture.shape[0] for view in views] == [60, 512, 32]
    written = overlay_page(views)
    assert "<script>alert" not in written and "<img src=x" not in written
    assert "\x1b" not in written and "\u202e" not in written
    assert "default-src 'none'" in written
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"base64,[^\")]*", "", written))
    for what in ("score of each patch", "captioning keeps", "TG-MIM hides", "rebuilt from", "Score of each word"):
        assert what in written
    # Each picture is there once, however many maps lie over it.
    assert written.count("--picture:url(data:") == 3
    assert len(written) < 1_200_000


def test_a_stranger_says_something_else(own, pictures):
    same = view_pairs(build(), own, pictures, ["a", "a", "b"])
    assert [view.stranger for view in same] == ["b", "b", "a"]
    assert view_pairs(build(), own, pictures, ["a", "a", "a"])[0].misled is None


def test_pages_of_other_models_say_what_they_have(own, files):
    coca = overlay_page(look_at(build(COCA), own, files[:1], CAPTIONS[:1]))
    assert "Where the captioner looks" in coca and "TG-MIM" not in coca and "attention, mean" in coca
    bare = overlay_page(look_at(build(replace(COCA, objectives=("itc",))), own, files[:1], CAPTIONS[:1]))
    assert "the image" in bare and "captioner" not in bare
    with pytest.raises(ValueError, match="at least one view"):
        overlay_page([])


def test_overlays_are_saved_by_suffix(own, files, tmp_path):
    save_overlay(tmp_path / "o.png", build(), own, files[:2], ["", "a very long " + 30 * "caption "])
    with Image.open(tmp_path / "o.png") as figure:
        assert figure.size[0] > 1200
    with pytest.raises(ValueError, match=r"\.png or \.html"):
        save_overlay(tmp_path / "o.gif", build(), own, files[:1], ["a"])
    with pytest.raises(ValueError, match="2 images need as many captions, got 1"):
        save_overlay(tmp_path / "o.png", build(), own, files[:2], ["a"])


def test_the_figure_has_a_map_for_every_word(own, files):
    views = look_at(build(), own, files[:1], ["a $5 red_square^ {x}"])
    titles = [axes.get_title() for axes in overlay_figure(views).axes]
    assert [t for t in titles if t in views[0].words.words] == list(views[0].words.words)


def test_colours_run_from_dark_to_bright():
    colours = heat(np.linspace(-1, 1, 50)[None], -1.0, 1.0)[0]
    lightness = colours[:, :3] @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) > 0).all() and (colours[:, 3] == 173).all()
    assert heat(np.full((1, 1), np.nan), 0.0, 0.0).shape == (1, 1, 4)


def test_text_of_a_page_is_harmless():
    assert text("a\u202eb\x00<&\"'") == "a\\u202eb\\x00&lt;&amp;&quot;&#x27;"
    assert "<title>&lt;t&gt;</title>" in page("<t>", [])
