"""Beam search against every caption of a toy language, and against itself written with lists."""

import pytest
import torch

from sycoca.beam import beam_search
from sycoca.generate import greedy, write
from sycoca.sampling import Constraints
from tests.sycoca.toy import EOT, PAD, SOT, Toy, every_caption, plain_beam_search

CONSTRAINTS = [
    {},
    {"min_length": 4},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"no_repeat_ngram": 1},
    {"no_repeat_ngram": 2},
    {"min_length": 6, "repetition_penalty": 1.3, "no_repeat_ngram": 1},
]
PROMPTS = [[SOT], [SOT, 3, 3], [SOT, 4], [SOT, 0, 3]]
IMAGES = [11, 12, 13, 14]


def table(prompts):
    width = max(map(len, prompts))
    return torch.tensor([p + [PAD] * (width - len(p)) for p in prompts]), torch.tensor([len(p) for p in prompts])


def search(images, prompts, K, max_length, length_penalty=1.0, **constraints):
    return beam_search(
        Toy(images),
        *table(prompts),
        num_beams=K,
        max_length=max_length,
        length_penalty=length_penalty,
        constraints=Constraints(SOT, EOT, **constraints),
        pad_id=PAD,
    )


def unpadded(row, prompt):
    """Tokens up to the end, a prompt's included; the padding id is a word before it."""
    return row[: row.index(EOT) + 1] if EOT in row else row


def assert_same(found, expected, image):
    count = min(len(expected), found.ranks.shape[1])
    ranks, scores, tokens = (list(part) for part in zip(*expected[:count]))
    assert [unpadded(row, image) for row in found.tokens[image, :count].tolist()] == tokens
    torch.testing.assert_close(found.ranks[image, :count], torch.tensor(ranks), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.scores[image, :count], torch.tensor(scores), rtol=1e-5, atol=1e-5)
    assert found.ranks[image, count:].isneginf().all() and found.scores[image, count:].isneginf().all()
    assert (found.tokens[image, count:] == PAD).all()


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.5])
@pytest.mark.parametrize("constraints", CONSTRAINTS, ids=str)
def test_wide_enough_it_finds_every_caption_in_order(length_penalty, constraints):
    # 3^4 + 3^3 + ... captions of at most four tokens; prompts of unequal length in one batch.
    found = search(IMAGES, PROMPTS, 128, 5, length_penalty, **constraints)
    for i, (image, prompt) in enumerate(zip(IMAGES, PROMPTS)):
        assert_same(found, every_caption(image, prompt, 5, length_penalty, **constraints), i)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("K", [1, 2, 3, 5])
@pytest.mark.parametrize("constraints", [{}, CONSTRAINTS[-1]], ids=str)
def test_narrow_it_equals_the_search_with_lists(K, length_penalty, constraints):
    images = list(range(100, 124))
    prompts = [PROMPTS[i % 4] for i in images]
    found = search(images, prompts, K, 9, length_penalty, **constraints)
    for i, (image, prompt) in enumerate(zip(images, prompts)):
        assert_same(found, plain_beam_search(image, prompt, 9, K, length_penalty, **constraints), i)


@pytest.mark.parametrize("length_penalty", [-2.0, 0.0, 1.0])
@pytest.mark.parametrize("constraints", CONSTRAINTS, ids=str)
def test_one_beam_is_greedy(length_penalty, constraints):
    images = list(range(200, 240))
    prompts = [PROMPTS[i % 4] for i in images]
    found = search(images, prompts, 1, 12, length_penalty, **constraints)
    tokens, scores, _ = write(
        Toy(images),
        *table(prompts),
        per_image=1,
        max_length=12,
        choose=greedy,
        constraints=Constraints(SOT, EOT, **constraints),
        pad_id=PAD,
    )
    assert torch.equal(found.tokens, tokens)
    torch.testing.assert_close(found.scores, scores)


def test_more_beams_find_better_captions():
    images, prompts = list(range(300, 364)), [[SOT]] * 64
    best = [search(images, prompts, K, 8, 0.0).scores[:, 0].mean().item() for K in (1, 2, 4, 16)]
    assert best == sorted(best) and best[0] < best[-1]


def test_a_higher_length_penalty_writes_longer():
    def mean_length(length_penalty):
        tokens = search(list(range(400, 432)), [[SOT]] * 32, 4, 12, length_penalty).tokens[:, 0].tolist()
        return sum(len(unpadded(row, 0)) for row in tokens) / len(tokens)

    lengths = [mean_length(p) for p in (-1.0, 0.0, 1.0, 3.0)]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


def test_each_image_is_searched_alone():
    images, prompts = IMAGES * 2, PROMPTS + PROMPTS[::-1]
    together = search(images, prompts, 3, 9)
    for i, (image, prompt) in enumerate(zip(images, prompts)):
        alone = search([image], [prompt], 3, 9)
        assert torch.equal(together.tokens[i], alone.tokens[0]) and torch.equal(together.ranks[i], alone.ranks[0])


def test_a_prompt_that_fills_the_caption_is_the_caption():
    found = search([1, 2], [[SOT, 3, 4], [SOT]], 2, 3)
    assert found.tokens[0].tolist() == [[SOT, 3, 4], [PAD] * 3]
    assert found.scores[0].tolist() == [0.0, -torch.inf]
    assert search([1], [[SOT]], 2, 1).tokens[0, 0].tolist() == [SOT]
