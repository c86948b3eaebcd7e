"""BLEU-1 to BLEU-4 of captions (Papineni et al. 2002), as COCO's evaluation computes it.

    p_n  = sum_i matches_n(i) / sum_i ngrams_n(i)          matches clipped by the reference that has most of the n-gram
    BLEU_N = min(1, exp(1 - r / c)) (prod_n p_n)^(1/N)       c words of the candidates, r of the closest references

Both sums run over the corpus; of one caption, over it alone. 1e-15 stands in for no match at all, and 1e-9 is added
to what divides, as in pycocoevalcap.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

ORDERS = 4
_TINY, _SMALL = 1e-15, 1e-9

Words = Sequence[str]


class Bleu(NamedTuple):
    """BLEU-1 to BLEU-4, of the corpus and of each caption."""

    corpus: tuple[float, ...]
    captions: list[tuple[float, ...]]


def ngrams(words: Words, order: int = ORDERS) -> Counter:
    """How often each n-gram of one to `order` words occurs."""
    return Counter(tuple(words[i : i + n]) for n in range(1, order + 1) for i in range(len(words) - n + 1))


def bleu(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> Bleu:
    """BLEU of captions.

    Args:
        candidates: words of N captions, possibly none.
        references: for each of them the words of at least one reference.

    Returns:
        In 0..1.
    """
    matches, possible = [0] * ORDERS, [0] * ORDERS
    length = reference_length = 0
    captions = []
    for words, refs in zip(candidates, references, strict=True):
        found = _matches(words, refs)
        guesses = [max(0, len(words) - n) for n in range(ORDERS)]
        closest = min((abs(len(ref) - len(words)), len(ref)) for ref in refs)[1]
        captions.append(_scores(found, guesses, len(words), closest))
        matches = [a + b for a, b in zip(matches, found)]
        possible = [a + b for a, b in zip(possible, guesses)]
        length += len(words)
        reference_length += closest
    return Bleu(_scores(matches, possible, length, reference_length), captions)


def _matches(words: Words, references: Sequence[Words]) -> list[int]:
    most: Counter = Counter()
    for reference in references:
        most |= ngrams(reference)
    found = [0] * ORDERS
    for ngram, count in ngrams(words).items():
        found[len(ngram) - 1] += min(count, most[ngram])
    return found


def _scores(matches: list[int], possible: list[int], length: int, reference_length: int) -> tuple[float, ...]:
    ratio = (length + _TINY) / (reference_length + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if 0 < ratio < 1 and 1 / ratio < 700 else float(ratio >= 1)
    product, scores = 1.0, []
    for order, (matched, all_of) in enumerate(zip(matches, possible), 1):
        product *= (matched + _TINY) / (all_of + _SMALL)
        scores.append(product ** (1 / order) * penalty)
    return tuple(scores)
