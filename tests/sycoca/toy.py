"""A language over five tokens whose probabilities are a hash of what was said, and the plain way to search it."""

import math

import torch
from torch import Tensor

from sycoca.masking import hash_tensor

V, PAD, SOT, EOT = 5, 0, 1, 2


def toy_logits(prefixes: Tensor, images: Tensor) -> Tensor:
    """Logits (N, V) behind prefixes (N, t) of images (N,)."""
    code = images.clone()
    for column in prefixes.unbind(1):
        code = hash_tensor(code * 31 + column + 1)
    numbers = hash_tensor(code[:, None] + 7919 * torch.arange(1, V + 1))
    return ((numbers >> 40) & 0xFFFF).float() / 16384


class Toy:
    """A session of the toy language; counts the tokens it is given."""

    def __init__(self, images: list[int]) -> None:
        self.images = torch.tensor(images)
        self.prefix = torch.empty(len(images), 0, dtype=torch.int64)

    def advance(self, tokens: Tensor) -> Tensor:
        self.prefix = torch.cat((self.prefix, tokens), dim=1)
        return toy_logits(self.prefix, self.images)

    def select(self, rows: Tensor) -> None:
        self.prefix, self.images = self.prefix[rows], self.images[rows]


def allowed(prefix: list[int], image: int, *, min_length=0, repetition_penalty=1.0, no_repeat_ngram=0):
    """Constrained and plain log-probability of each token that may follow."""
    plain = toy_logits(torch.tensor([prefix]), torch.tensor([image])).double().log_softmax(1)[0].tolist()
    n, found = no_repeat_ngram, {}
    seen = {tuple(prefix[i : i + n]) for i in range(len(prefix) - n + 1)} if n else set()
    for token in range(V):
        repeats = n and len(prefix) >= n and tuple((prefix + [token])[-n:]) in seen
        if token == SOT or repeats or (token == EOT and len(prefix) + 1 < min_length):
            continue
        found[token] = (plain[token] * (repetition_penalty if token in prefix else 1.0), plain[token])
    return found or {EOT: (plain[EOT], plain[EOT])}


def every_caption(image: int, prompt: list[int], max_length: int, length_penalty: float, **constraints):
    """(rank, score, tokens) of all captions, best first."""
    finished, growing = [], [(0.0, 0.0, prompt)]
    while growing:
        searched, score, tokens = growing.pop()
        ended = len(tokens) > len(prompt) and tokens[-1] == EOT
        if ended or len(tokens) == max_length:
            finished.append((searched / (len(tokens) - len(prompt)) ** length_penalty, score, tokens))
            continue
        for token, (s, p) in allowed(tokens, image, **constraints).items():
            growing.append((searched + s, score + p, [*tokens, token]))
    return sorted(finished, reverse=True)


def plain_beam_search(image, prompt, max_length, K, length_penalty, **constraints):
    """(rank, score, tokens) of at most K captions, best first, one list at a time."""
    living, ended = [(0.0, 0.0, prompt)], []
    for count in range(1, max_length - len(prompt) + 1):
        grown = sorted(
            (
                (searched + s, score + p, [*tokens, token])
                for searched, score, tokens in living
                for token, (s, p) in allowed(tokens, image, **constraints).items()
            ),
            reverse=True,
        )[: 2 * K]
        leaving = [(s / count**length_penalty, p, tokens) for s, p, tokens in grown[:K] if tokens[-1] == EOT]
        ended = sorted(ended + leaving, reverse=True)[:K]
        living = [caption for caption in grown if caption[2][-1] != EOT][:K]
        best = living[0][0] / count**length_penalty if living else -math.inf
        if not living or (len(ended) == K and best <= ended[-1][0]):
            return ended
    cut = [(s / count**length_penalty, p, tokens) for s, p, tokens in living]
    return sorted(ended + cut, reverse=True)[:K]
