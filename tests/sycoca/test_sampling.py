"""Constraints and draws against their definitions."""

import math

import pytest
import torch

from sycoca.sampling import Constraints, draw
from tests.sycoca.toy import EOT, PAD, SOT, Toy, V, allowed


@pytest.mark.parametrize("n", [0, 1, 2, 3])
@pytest.mark.parametrize("penalty", [1.0, 2.0, 0.5])
def test_constraints_are_their_definition(n, penalty):
    generator = torch.Generator().manual_seed(n)
    options = {"min_length": 5, "repetition_penalty": penalty, "no_repeat_ngram": n}
    for length in range(1, 9):
        words = torch.tensor([PAD, 3, 4])[torch.randint(3, (32, length), generator=generator)]
        words[:, 0] = SOT
        images = list(range(32))
        log_probs = Toy(images).advance(words).log_softmax(1)
        before = log_probs.clone()
        found = Constraints(SOT, EOT, **options).apply(log_probs, words)
        assert torch.equal(log_probs, before)
        for row, prefix in enumerate(words.tolist()):
            expected = allowed(prefix, row, **options)
            wanted = torch.tensor([expected[v][0] if v in expected else -torch.inf for v in range(V)])
            torch.testing.assert_close(found[row], wanted, rtol=1e-5, atol=1e-6)


def frequencies(log_probs, temperature=1.0, top_k=None, top_p=None, draws=20_000):
    # An even comb of numbers instead of random ones: shares are exact up to one draw.
    uniform = (torch.arange(draws) + 0.5) / draws
    tokens = draw(log_probs.expand(draws, -1), uniform, temperature, top_k, top_p)
    return torch.bincount(tokens, minlength=log_probs.shape[-1]) / draws


P = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1])


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, P),
        ({"temperature": 0.5}, P**2 / (P**2).sum()),
        ({"temperature": 3.0}, P ** (1 / 3) / (P ** (1 / 3)).sum()),
        ({"top_k": 1}, torch.tensor([0, 1.0, 0, 0, 0])),
        ({"top_k": 2}, torch.tensor([0, 0.4, 0.25, 0, 0]) / 0.65),
        ({"top_k": 99}, P),
        # The set reaches the sum with the token that crosses it.
        ({"top_p": 0.3}, torch.tensor([0, 1.0, 0, 0, 0])),
        ({"top_p": 0.5}, torch.tensor([0, 0.4, 0.25, 0, 0]) / 0.65),
        ({"top_p": 0.66}, torch.tensor([0, 0.4, 0.25, 0.2, 0]) / 0.85),
        ({"top_p": 1.0}, P),
        ({"top_p": 1e-9}, torch.tensor([0, 1.0, 0, 0, 0])),
        # First the likeliest three, then the share among them.
        ({"top_k": 3, "top_p": 0.5}, torch.tensor([0, 0.4, 0.25, 0, 0]) / 0.65),
        ({"temperature": 1e-30}, torch.tensor([0, 1.0, 0, 0, 0])),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(options, expected):
    # What is drawn does not depend on a common offset of the log-probabilities.
    for offset in (0.0, -7.0):
        torch.testing.assert_close(frequencies(P.log() + offset, **options), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.999}], ids=str)
def test_forbidden_tokens_are_never_drawn(options):
    log_probs = torch.tensor([[-torch.inf, -1.0, -torch.inf, -2.0, -torch.inf]]).expand(3, -1)
    edges = torch.tensor([0.0, 0.5, math.nextafter(1.0, 0.0)])
    assert set(draw(log_probs, edges, 1.0, options.get("top_k"), options.get("top_p")).tolist()) <= {1, 3}


def test_the_last_number_draws_a_possible_token():
    # Sums of many terms round above and below one.
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(64, 5000, generator=generator)
    log_probs[:, :10] = log_probs[:, -10:] = -torch.inf
    largest = torch.full((64,), math.nextafter(1.0, 0.0), dtype=torch.float64).float()
    for uniform in (largest, torch.full((64,), 1 - 2.0**-24)):
        tokens = draw(log_probs, uniform, 1.0, None, None)
        assert log_probs.gather(1, tokens[:, None]).isfinite().all()
