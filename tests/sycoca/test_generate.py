import pytest
import torch

from sycoca.config import CaptionDecoderConfig, ImageDecoderConfig, MaskingConfig, ModelConfig, TextConfig, VisionConfig
from sycoca.generate import decode, generate, generate_from
from sycoca.model import Batch, StepPlan, SyCoCa
from sycoca.tokenizer import Tokenizer

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

    def advance(self, token):
        step = len(self.heard)
        self.heard.append(token.tolist())
        return torch.nn.functional.one_hot(torch.tensor([row[step] for row in self.wanted]), 10).float()


def script(wanted, max_length=10, **options):
    session = Script(wanted)
    first = torch.full((len(wanted),), 8)
    return session, decode(session, first, max_length=max_length, eot_id=9, pad_id=0, **options).tolist()


def test_decoding_ends_when_every_caption_has():
    session, written = script([[1, 9, 5, 5, 5], [2, 3, 9, 5, 5]])
    assert written == [[8, 1, 9, 0], [8, 2, 3, 9]]
    assert session.heard == [[8, 8], [1, 2], [9, 3]]


def test_the_padding_id_is_a_word_before_the_end():
    assert script([[0, 4, 0, 9]])[1] == [[8, 0, 4, 0, 9]]


@pytest.mark.parametrize("max_length, expected", [(1, [[8]]), (2, [[8, 1]]), (4, [[8, 1, 2, 3]])])
def test_length_is_bounded(max_length, expected):
    assert script([[1, 2, 3, 4, 5]], max_length)[1] == expected


def test_the_chooser_decides():
    second = script([[1, 1, 1]], 3, choose=lambda logits: logits.argsort(descending=True, stable=True)[:, 1])[1]
    assert second == [[8, 0, 0]]


def test_a_model_writes_what_it_knows_by_heart(model, tokenizer, images):
    assert generate(model, tokenizer, images) == CAPTIONS
    order = [2, 0, 3, 1, 2]
    assert generate(model, tokenizer, images[order]) == [CAPTIONS[i] for i in order]


def test_tokens_are_the_likeliest_after_their_prefix(tokenizer, images):
    torch.manual_seed(1)
    model = SyCoCa(CONFIG).eval()
    T = CONFIG.text.context_length
    with torch.no_grad():
        features = model.encode_image(images)
        tokens = torch.full((4, T), PAD)
        tokens[:, 0] = SOT
        for t in range(1, T):
            likeliest = model.caption_logits(features, tokens)[:, t - 1].argmax(-1)
            done = (tokens[:, :t] == EOT).any(1)
            tokens[:, t] = torch.where(done, PAD, likeliest)
    assert generate(model, tokenizer, images) == tokenizer.decode(tokens)
    assert generate_from(model, tokenizer, features) == tokenizer.decode(tokens)


def test_a_shorter_limit_cuts_the_same_caption(model, tokenizer, images):
    length = (tokenizer.encode([CAPTIONS[3]], 14)[0] == EOT).nonzero().item() + 1
    assert generate(model, tokenizer, images[3:], max_length=length) == CAPTIONS[3:]
    (cut,) = generate(model, tokenizer, images[3:], max_length=length - 3)
    assert cut and CAPTIONS[3].startswith(cut) and cut != CAPTIONS[3]
    assert generate(model, tokenizer, images[3:], max_length=1) == [""]


def test_each_caption_depends_on_its_own_image_alone(model, tokenizer, images):
    torch.manual_seed(2)
    noise = torch.randn(3, 3, 16, 16)
    together = generate(model, tokenizer, torch.cat((images[:1], noise)))
    assert together == [generate(model, tokenizer, image[None])[0] for image in (images[0], *noise)]


def test_no_image_no_caption(model, tokenizer, images):
    assert generate(model, tokenizer, images[:0]) == []


@pytest.mark.parametrize("max_length", [0, 15, -1])
def test_impossible_lengths_are_refused(model, tokenizer, images, max_length):
    with pytest.raises(ValueError, match=r"generate: max_length must lie in 1\.\.14, got "):
        generate(model, tokenizer, images, max_length=max_length)
