"""WordPiece, and the words that masked language modelling hides."""

import random

import pytest
import torch

from sycoca.config import TextConfig, WordMaskingConfig
from sycoca.mlm import mask_words
from sycoca.tokenizer import Tokenizer

CAPTIONS = [
    "a large red disc above a small blue star",
    "two unbelievable stars, one red and one blue!",
    "a disc; a stardust ring beside the bluest of squares",
]
TEXT = TextConfig(context_length=12, vocab_size=64, width=8, depth=1, heads=1, kind="bidirectional", mask_id=3)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_wordpiece(CAPTIONS, 64)


def test_wordpiece_rows(tokenizer, tmp_path):
    tokens = tokenizer.encode([CAPTIONS[0], "", "red " * 40], 12)
    assert tokens.shape == (3, 12) and tokenizer.vocab_size <= 64
    assert tokens[1].tolist() == [tokenizer.sot_id] + [tokenizer.pad_id] * 11
    assert (tokens[2] != tokenizer.pad_id).all() and tokenizer.eot_id not in tokens
    assert tokenizer.decode(tokens[2:])[0].startswith("red red red")
    long = tokenizer.encode(CAPTIONS, 60)
    assert [text.replace(" ", "") for text in tokenizer.decode(long)] == [c.replace(" ", "") for c in CAPTIONS]
    ending = tokenizer.ending(True)
    assert ending.encode(["a"], 4).tolist() == [[1, tokenizer.encode(["a"], 2)[0, 1].item(), 2, 0]]
    for made in (tokenizer, ending):
        made.save(tmp_path / "tokenizer.json")
        again = Tokenizer.load(tmp_path / "tokenizer.json")
        assert torch.equal(again.encode(CAPTIONS, 9), made.encode(CAPTIONS, 9)) and again.mask_id == 3
    words = tokenizer.words(CAPTIONS[1], 60)
    assert [word for word, _ in words][:3] == ["two", "unbelievable", "stars"]
    assert tokenizer.words("red " * 40, 4)[-1][1][-1] == 3
    with pytest.raises(ValueError, match="at least 7"):
        Tokenizer.train_wordpiece(CAPTIONS, 6)
    with pytest.raises(ValueError, match="only a WordPiece"):
        Tokenizer.train(CAPTIONS, 300).ending(False)


def test_equal_captions_give_equal_vocabularies():
    shuffled = CAPTIONS * 3
    random.Random(0).shuffle(shuffled)
    made = [Tokenizer.train_wordpiece(texts, 80).__getstate__() for texts in (CAPTIONS * 3, shuffled)]
    assert made[0] == made[1]


def texts(tokenizer, rows: int) -> torch.Tensor:
    draw = random.Random(1)
    words = " ".join(CAPTIONS).split()
    return tokenizer.encode([" ".join(draw.choices(words, k=draw.randrange(0, 9))) for _ in range(rows)], 12)


def test_what_is_hidden(tokenizer):
    tokens, continues = texts(tokenizer, 400), tokenizer.continues()
    seeds, masking = torch.arange(400), WordMaskingConfig(share=0.4, most=4)
    masked = mask_words(tokens, seeds, continues, TEXT, masking)
    content = tokens > 2
    counted = masked.labels >= 0
    hidden = torch.zeros_like(content).scatter(1, masked.positions, counted) & content
    # n is bounded, at least one where there is a word, and labels are what stood there.
    most = ((content.sum(1) + 1) * 0.4).round().clamp(1, 4)
    assert (counted.sum(1) <= most).all() and (counted.sum(1) >= content.any(1)).all()
    assert torch.equal(hidden.sum(1), counted.sum(1)) and masked.positions.shape == (400, 4)
    assert torch.equal(tokens.gather(1, masked.positions)[counted], masked.labels[counted])
    assert torch.equal(masked.tokens[~hidden], tokens[~hidden]), "[CLS], padding and other words stay"
    assert (masked.tokens[hidden] >= 3).all()
    # Whole words: a hidden piece hides the others, but where one word is longer than n.
    partly = 0
    for row in range(400):
        words = (content[row] & ~continues[tokens[row]]).cumsum(0)
        for word in range(1, int(words.max()) + 1):
            inside = hidden[row][content[row] & (words == word)]
            if inside.any() and not inside.all():
                partly += 1
                assert len(inside) > most[row] and inside.sum() == hidden[row].sum()
    assert 0 < partly < 200
    # A function of the seed of each row alone.
    again = mask_words(tokens[7:9], seeds[7:9], continues, TEXT, masking)
    assert torch.equal(again.tokens, masked.tokens[7:9]) and torch.equal(again.labels, masked.labels[7:9])
    other = mask_words(tokens, seeds + 400, continues, TEXT, masking)
    assert (other.positions != masked.positions).any(1).double().mean() > 0.5


def test_shares_of_what_is_shown(tokenizer):
    tokens = tokenizer.encode(["red blue star disc a ring"], 12).expand(4000, -1)
    masked = mask_words(tokens, torch.arange(4000), tokenizer.continues(), TEXT, WordMaskingConfig())
    was = masked.labels[masked.labels >= 0]
    shown = masked.tokens.gather(1, masked.positions)[masked.labels >= 0]
    # 3 standard deviations of 4000 or more draws; a random token may be the right one.
    assert (shown == 3).double().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (shown == was).double().mean().item() == pytest.approx(0.1, abs=0.02)
    assert shown[(shown != 3) & (shown != was)].unique().numel() > 30


def test_neighbours_are_hidden_together(tokenizer):
    tokens = tokenizer.encode(["a b e d t r u o s l"], 12).expand(2000, -1)
    assert (tokens[0] > 2).sum() == 10
    together = []
    for chance in (0.0, 1.0):
        masking = WordMaskingConfig(share=0.2, ngram_prob=chance)
        masked = mask_words(tokens, torch.arange(2000), tokenizer.continues(), TEXT, masking)
        together.append((masked.positions.diff(dim=1)[:, 0] == 1).double().mean().item())
    # Two of ten places adjoin in 9 of 45 choices; with runs nearly always.
    assert together[0] == pytest.approx(0.2, abs=0.03) and together[1] > 0.85
