"""Captions of models: what is cached, what is prompted, what comes back."""

import time

import pytest
import torch

from sycoca.cache import Cached, Recomputed
from sycoca.config import CaptionDecoderConfig, ImageDecoderConfig, MaskingConfig, ModelConfig, TextConfig, VisionConfig
from sycoca.decode_step import lay_out
from sycoca.generate import generate, generate_from, generate_scored, generate_tokens, greedy, write
from sycoca.model import Batch, StepPlan, SyCoCa
from sycoca.sampling import Constraints
from sycoca.tokenizer import Tokenizer
from tests.sycoca.micro import build, micro, uniform

CAPTIONS = ["a red square", "two blue discs on a table", "green", "a small dog chases a ball"]
CONFIG = ModelConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=16, patch_size=8, width=32, depth=1, heads=2),
    text=TextConfig(context_length=14, vocab_size=300, width=32, depth=1, heads=2),
    caption_decoder=CaptionDecoderConfig(depth=1, heads=2),
    image_decoder=ImageDecoderConfig(depth=1, width=16, heads=2),
    masking=MaskingConfig(drop_ratio=0.0),
    objectives=("ic",),
)
PAD, SOT, EOT = CONFIG.text.pad_id, CONFIG.text.sot_id, CONFIG.text.eot_id


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS, 300)


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tokenizer, images):
    """A model that knows four images by heart."""
    torch.manual_seed(0)
    model = SyCoCa(CONFIG)
    tokens = tokenizer.encode(CAPTIONS, CONFIG.text.context_length)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        losses = model(Batch(images, tokens, torch.arange(4), None), StepPlan(False, False))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        if losses.caption < 0.02:
            break
    assert losses.caption < 0.05
    return model.eval()


class Script:
    """A session that wants given tokens, one row per caption."""

    def __init__(self, wanted):
        self.wanted, self.heard = wanted, []

    def advance(self, tokens):
        step = len(self.heard)
        self.heard.append(tokens.squeeze(1).tolist())
        return torch.nn.functional.one_hot(torch.tensor([row[step] for row in self.wanted]), 10).float()

    def select(self, rows):
        assert rows.tolist() == list(range(len(self.wanted)))


def script(wanted, max_length=10):
    session, B = Script(wanted), len(wanted)
    tokens, _, _ = write(
        session,
        torch.full((B, 1), 8),
        torch.ones(B, dtype=torch.int64),
        per_image=1,
        max_length=max_length,
        choose=greedy,
        constraints=Constraints(sot_id=8, eot_id=9),
        pad_id=0,
    )
    return session, tokens.squeeze(1).tolist()


def test_decoding_ends_when_every_caption_has():
    session, written = script([[1, 9, 5, 5, 5], [2, 3, 9, 5, 5]], 5)
    assert written == [[8, 1, 9, 0, 0], [8, 2, 3, 9, 0]]
    assert session.heard == [[8, 8], [1, 2], [9, 3]]


def test_the_padding_id_is_a_word_before_the_end():
    assert script([[0, 4, 0, 9]], 5)[1] == [[8, 0, 4, 0, 9]]


@pytest.mark.parametrize("max_length, expected", [(1, [[8]]), (2, [[8, 1]]), (4, [[8, 1, 2, 3]])])
def test_length_is_bounded(max_length, expected):
    assert script([[1, 2, 3, 4, 5]], max_length)[1] == expected


def test_a_model_writes_what_it_knows_by_heart(model, tokenizer, images):
    assert generate(model, tokenizer, images) == CAPTIONS
    assert generate(model, tokenizer, images, num_beams=3) == CAPTIONS
    order = [2, 0, 3, 1, 2]
    assert generate(model, tokenizer, images[order]) == [CAPTIONS[i] for i in order]


def test_tokens_are_the_likeliest_after_their_prefix(tokenizer, images):
    torch.manual_seed(1)
    model = SyCoCa(CONFIG).eval()
    T = CONFIG.text.context_length
    with torch.no_grad():
        features = model.encode_image(images)
        tokens, total = torch.full((4, T), PAD), torch.zeros(4)
        tokens[:, 0] = SOT
        for t in range(1, T):
            log_probs = model.caption_logits(features, tokens)[:, t - 1].log_softmax(-1)
            log_probs[:, SOT] = -torch.inf
            best, likeliest = log_probs.max(-1)
            done = (tokens[:, :t] == EOT).any(1)
            tokens[:, t] = torch.where(done, PAD, likeliest)
            total += torch.where(done, 0.0, best)
    assert generate(model, tokenizer, images) == tokenizer.decode(tokens)
    assert generate_from(model, tokenizer, features) == tokenizer.decode(tokens)
    found = generate_tokens(model, features)
    assert torch.equal(found.tokens[:, 0], tokens[:, : found.tokens.shape[2]])
    torch.testing.assert_close(found.scores[:, 0], total, rtol=1e-5, atol=1e-5)


# 4 images; the micro model has unequal widths and heads in vision, text and decoder.
PROMPTS = [[5, 6, 7], [], [9], [30, 0, 31, 32]]
OPTIONS = [
    {},
    {"num_beams": 3, "num_return": 3},
    {"num_beams": 4, "length_penalty": 0.3, "repetition_penalty": 1.4, "no_repeat_ngram": 2, "min_length": 6},
    {"temperature": 1.3, "seed": 5, "num_return": 3},
    {"temperature": 0.8, "seed": 6, "top_k": 9, "top_p": 0.8, "max_length": 8},
    {"repetition_penalty": 2.0, "max_length": 6},
]


@pytest.mark.parametrize("prompt", [None, PROMPTS], ids=["no prompts", "unequal prompts"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_with_and_without_memory_the_same_is_written(options, prompt):
    model = build(micro(caption_decoder=CaptionDecoderConfig(depth=2, heads=2))).eval()
    with torch.no_grad():
        features = model.encode_image(uniform(4, 3, 16, 16, salt=2))
    cached = generate_tokens(model, features, prompt=prompt, **options)
    plain = generate_tokens(model, features, prompt=prompt, session=Recomputed, **options)
    assert torch.equal(cached.tokens, plain.tokens) and torch.equal(cached.lengths, plain.lengths)
    torch.testing.assert_close(cached.scores, plain.scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cached.normalised, plain.normalised, rtol=1e-5, atol=1e-5)
    # Otherwise images and beams might play no part.
    assert len(set(cached.scores.flatten().tolist())) == cached.scores.numel()


@pytest.mark.parametrize("single_steps", [True, False])
def test_memory_follows_the_captions_that_go_on(single_steps, monkeypatch):
    if not single_steps:
        # What a GPU, autocast and sharded weights take.
        monkeypatch.setattr("sycoca.cache.fits", lambda block: False)
    model = build(micro()).eval()
    tokens = torch.tensor([[1, 5, 6], [1, 7, 8]])
    with torch.no_grad():
        features = model.encode_image(uniform(2, 3, 16, 16, salt=4))
        cached, plain = Cached(model, features, 8), Recomputed(model, features, 8)
        for rows, words in (
            (None, tokens),
            # From one caption per image to three, in a new order, with repeats, and to two.
            ([0, 0, 0, 1, 1, 1], [9, 10, 11, 12, 13, 14]),
            ([2, 0, 2, 3, 5, 3], [4, 4, 9, 9, 8, 7]),
            ([1, 0, 5, 4], [30, 31, 32, 33]),
        ):
            for session in (cached, plain) if rows else ():
                session.select(torch.tensor(rows))
            new = words if rows is None else torch.tensor(words)[:, None]
            torch.testing.assert_close(cached.advance(new), plain.advance(new), rtol=1e-5, atol=1e-5)


def test_several_tokens_at_once_only_begin():
    model = build(micro()).eval()
    with torch.no_grad():
        session = Cached(model, model.encode_image(uniform(1, 3, 16, 16, salt=4)), 8)
        session.advance(torch.tensor([[1, 5]]))
        with pytest.raises(ValueError, match="several tokens at once"):
            session.advance(torch.tensor([[6, 7]]))


def test_weights_laid_out_for_single_tokens_are_the_same_weights():
    model = build(micro()).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        features = model.encode_image(uniform(4, 3, 16, 16, salt=2))
    expected = generate_tokens(model, features, num_beams=2)
    lay_out(model)
    assert not model.caption_decoder.head.weight.is_contiguous()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    found = generate_tokens(model, features, num_beams=2)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-5)


def test_memory_makes_64_tokens_several_times_faster():
    width = {"width": 256, "heads": 4}
    config = ModelConfig(
        embed_dim=64,
        vision=VisionConfig(image_size=224, patch_size=16, depth=1, **width),
        text=TextConfig(context_length=64, vocab_size=512, depth=1, **width),
        caption_decoder=CaptionDecoderConfig(depth=1, heads=4),
        image_decoder=ImageDecoderConfig(depth=1, width=16, heads=2),
        masking=MaskingConfig(drop_ratio=0.0),
        objectives=("ic",),
    )
    torch.manual_seed(0)
    model, threads = SyCoCa(config).eval(), torch.get_num_threads()
    with torch.no_grad():
        features = model.encode_image(torch.randn(4, 3, 224, 224))
    torch.set_num_threads(1)
    try:
        seconds, written = {}, {}
        for session in (Cached, Recomputed):
            start = time.process_time()
            written[session] = generate_tokens(model, features, num_beams=4, min_length=64, session=session).tokens
            seconds[session] = time.process_time() - start
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*written.values()) and written[Cached].shape == (4, 1, 64)
    assert seconds[Recomputed] > 5 * seconds[Cached], seconds


def test_scores_are_those_of_the_captioning_loss(model, tokenizer, images):
    with torch.no_grad():
        features = model.encode_image(images)
        found = generate_tokens(model, features, num_beams=3, num_return=2, repetition_penalty=1.5)
        for r in range(2):
            tokens, lengths = found.tokens[:, r], found.lengths[:, r]
            log_probs = model.caption_logits(features, tokens).log_softmax(-1)[:, :-1]
            said = log_probs.gather(2, tokens[:, 1:, None]).squeeze(2)
            counted = torch.arange(1, tokens.shape[1]) < lengths[:, None]
            torch.testing.assert_close(found.scores[:, r], (said * counted).sum(1), rtol=1e-4, atol=1e-4)
    assert (found.normalised[:, 0] >= found.normalised[:, 1]).all()
    unpenalised = generate_tokens(model, features, num_beams=3, num_return=2, length_penalty=2.0)
    expected = unpenalised.scores / (unpenalised.lengths - 1) ** 2.0
    torch.testing.assert_close(unpenalised.normalised, expected, rtol=1e-5, atol=1e-6)


def test_captions_come_with_their_scores(model, tokenizer, images):
    features = model.encode_image(images)
    captions = generate_scored(model, tokenizer, features, num_beams=4, num_return=3)
    tokens = generate_tokens(model, features, num_beams=4, num_return=3)
    assert [len(found) for found in captions] == [3] * 4
    assert [[c.score for c in found] for found in captions] == tokens.scores.tolist()
    flat = generate(model, tokenizer, images, num_beams=4, num_return=3)
    assert flat == [c.text for found in captions for c in found]
    assert flat[::3] == CAPTIONS and len(set(flat)) == 12


def test_prompts_begin_captions(model, tokenizer, images):
    for options in ({}, {"num_beams": 3}, {"temperature": 0.5, "seed": 0}):
        said = generate(model, tokenizer, images, prompt=["a red", "two blue discs", "", "A SMALL  dog "], **options)
        assert said == CAPTIONS
    assert all(text.startswith("a small") for text in generate(model, tokenizer, images, prompt="a small"))
    # One prompt for all is the same prompt for each.
    each = generate(model, tokenizer, images, prompt=["a small"] * 4)
    assert each == generate(model, tokenizer, images, prompt="a small")
    assert generate(model, tokenizer, images, prompt="") == CAPTIONS


def test_a_prompt_cannot_spell_a_special_token(model, tokenizer, images):
    said = generate(model, tokenizer, images[:1], prompt="[EOT]")
    assert said[0].startswith("[eot]")


def test_lengths_count_start_and_end(model, images):
    features = model.encode_image(images)
    free = generate_tokens(model, features)
    for row, length in zip(free.tokens[:, 0].tolist(), free.lengths[:, 0].tolist()):
        assert row[0] == SOT and row[length - 1] == EOT and set(row[length:]) <= {PAD}
    for options in ({}, {"num_beams": 3}, {"temperature": 1.0, "seed": 1}):
        longer = generate_tokens(model, features, min_length=12, **options)
        assert (longer.lengths >= 12).all()
        exact = generate_tokens(model, features, min_length=7, max_length=7, **options)
        assert (exact.lengths == 7).all() and exact.tokens.shape[2] == 7


def test_a_shorter_limit_cuts_the_same_caption(model, tokenizer, images):
    length = (tokenizer.encode([CAPTIONS[3]], 14)[0] == EOT).nonzero().item() + 1
    assert generate(model, tokenizer, images[3:], max_length=length) == CAPTIONS[3:]
    (cut,) = generate(model, tokenizer, images[3:], max_length=length - 3)
    assert cut and CAPTIONS[3].startswith(cut) and cut != CAPTIONS[3]
    assert generate(model, tokenizer, images[3:], max_length=1) == [""]
    assert generate(model, tokenizer, images[3:], max_length=1, num_beams=2) == [""]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 1.5, "seed": 3}], ids=str)
def test_each_caption_depends_on_its_own_image_alone(model, tokenizer, images, options):
    torch.manual_seed(2)
    noise = torch.randn(3, 3, 16, 16)
    together = generate(model, tokenizer, torch.cat((images[:1], noise)), **options)
    # Draws follow the place in the batch as well.
    alone = images[0], *noise
    count = 1 if "seed" in options else 4
    assert together[:count] == [generate(model, tokenizer, image[None], **options)[0] for image in alone[:count]]


def test_draws_repeat_with_their_seed_and_differ_without(tokenizer, images):
    torch.manual_seed(1)
    model = SyCoCa(CONFIG).eval()
    options = {"temperature": 1.0, "num_return": 2}
    first = generate(model, tokenizer, images, seed=1, **options)
    torch.manual_seed(0)
    assert generate(model, tokenizer, images, seed=1, **options) == first
    assert generate(model, tokenizer, images, seed=2, **options) != first
    assert len(set(first)) == 8
    assert generate(model, tokenizer, images, **options) != generate(model, tokenizer, images, **options)


def test_draws_follow_seed_and_place_not_the_batch(model, tokenizer, images):
    same = images[:1].expand(4, -1, -1, -1)
    options = {"temperature": 1.0, "max_length": 8}
    whole = generate(model, tokenizer, same, seed=1, **options)
    parts = [generate(model, tokenizer, same[:n], seed=1, first=k, **options) for k, n in ((0, 1), (1, 3))]
    assert parts[0] + parts[1] == whole
    # Neither a place nor a seed further on draws the same.
    assert generate(model, tokenizer, same[:3], seed=2, **options) != whole[1:]


def test_no_image_draws_nothing(model, tokenizer, images):
    assert generate(model, tokenizer, images[:0], temperature=1.0, seed=1) == []


def test_draws_follow_the_model(model, images):
    features = model.encode_image(images[:1])
    found = generate_tokens(model, features, temperature=1.0, seed=0, num_return=400, max_length=2)
    with torch.no_grad():
        p = model.caption_logits(features, torch.tensor([[SOT]]))[0, -1].softmax(-1)
    seen = torch.bincount(found.tokens[0, :, 1], minlength=len(p)) / 400
    assert (seen - p).abs().max() < 0.08


def test_no_image_no_caption(model, tokenizer, images):
    assert generate(model, tokenizer, images[:0]) == []
    features = model.encode_image(images)
    none = features._replace(patches=features.patches[:0])
    empty = generate_tokens(model, none, num_beams=3, num_return=2)
    assert [part.shape[:2] for part in empty] == [(0, 2)] * 4


REFUSED = [
    ({"max_length": 0}, r"max_length must lie in 1\.\.14, got 0"),
    ({"max_length": 15}, r"max_length must lie in 1\.\.14, got 15"),
    ({"max_length": -1}, r"max_length must lie in 1\.\.14, got -1"),
    ({"min_length": 9, "max_length": 8}, r"min_length must lie in 0\.\.8, got 9"),
    ({"min_length": -1}, r"min_length must lie in 0\.\.14, got -1"),
    ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
    ({"num_return": 0}, "num_return must be at least 1, got 0"),
    ({"num_return": 2}, "num_return=2 needs at least as many num_beams, or a temperature"),
    ({"num_return": 4, "num_beams": 3}, "num_return=4 needs at least as many num_beams"),
    ({"num_beams": 2, "temperature": 1.0}, "num_beams searches, temperature draws"),
    ({"temperature": 0.0}, "temperature must be above 0"),
    ({"temperature": float("nan")}, "temperature must be above 0"),
    ({"top_k": 0, "temperature": 1.0}, "top_k must be at least 1, got 0"),
    ({"top_p": 0.0, "temperature": 1.0}, r"top_p must lie in \(0, 1\], got 0.0"),
    ({"top_p": 1.1, "temperature": 1.0}, r"top_p must lie in \(0, 1\], got 1.1"),
    ({"top_p": 0.9}, "top_p needs a temperature"),
    ({"seed": 5}, "seed needs a temperature"),
    ({"top_k": 5}, "top_k needs a temperature"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, got 0.0"),
    ({"length_penalty": float("inf")}, "length_penalty must lie in -10..10, got inf"),
    ({"no_repeat_ngram": -1}, "no_repeat_ngram must be at least 0, got -1"),
    ({"prompt": "a small dog chases a ball and more and more"}, "a prompt of .* tokens, .*, leaves no room within 14"),
    ({"prompt": ["a"]}, "1 prompts for 4 images"),
]


@pytest.mark.parametrize("options, line", REFUSED, ids=str)
def test_what_cannot_be_is_refused_in_one_line(model, tokenizer, images, options, line):
    with pytest.raises(ValueError, match=f"^generate: {line}") as caught:
        generate(model, tokenizer, images, **options)
    assert "\n" not in str(caught.value)


def test_unknown_options_are_refused_with_the_nearest(model, tokenizer, images):
    with pytest.raises(TypeError, match="unknown option 'num_beam'; did you mean 'num_beams'"):
        generate(model, tokenizer, images, num_beam=2)
    for options, line in (
        ({"num_beams": 2.5}, r"num_beams must be a whole number, got 2\.5"),
        ({"num_return": True}, "num_return must be a whole number, got True"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"max_length": "9"}, "max_length must be a whole number, got '9'"),
    ):
        with pytest.raises(TypeError, match=line):
            generate(model, tokenizer, images, **options)


@pytest.mark.parametrize("ids", [[SOT], [EOT], [300], [-1]])
def test_prompts_hold_words_only(model, images, ids):
    with pytest.raises(ValueError, match=r"words only, ids in 0..299"):
        generate_tokens(model, model.encode_image(images[:1]), prompt=[ids])


def test_a_model_without_captioning_says_so(tokenizer):
    model = build(micro(objectives=("itc", "tgmim")))
    with pytest.raises(ValueError, match="built without captioning"):
        generate_tokens(model, model.encode_image(uniform(1, 3, 16, 16, salt=1)))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"temperature": 1.0}], ids=str)
def test_broken_weights_are_named(images, options):
    torch.manual_seed(0)
    model = SyCoCa(CONFIG).eval()
    with torch.no_grad():
        model.caption_decoder.head.weight[7] = torch.nan
    with pytest.raises(ValueError, match="logits are not numbers"):
        generate_tokens(model, model.encode_image(images), **options)
