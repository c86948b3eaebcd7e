"""CIDEr-D of captions (Vedantam et al. 2015), times ten, as COCO's evaluation computes it.

    g_n(w) = count(w) (log I - log max(1, df(w)))            df: images, of I, in whose references the n-gram occurs
    s_n(c, r) = exp(-(b_c - b_r)^2 / 2 sigma^2)  <min(g_n(c), g_n(r)), g_n(r)> / (|g_n(c)| |g_n(r)|)
    CIDEr-D = 10 / (4 m) sum over n = 1..4 and m references of s_n

b counts bigrams, as pycocoevalcap does where the paper has the length in words.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from train.tasks.bleu import ORDERS, Words, ngrams

_SIGMA = 6.0
_Vector = tuple[list[dict[tuple[str, ...], float]], list[float], int]


class CiderD:
    """The score against document frequencies that are counted once.

    Args:
        references: words of the references of each image of a corpus.
    """

    def __init__(self, references: Iterable[Sequence[Words]]) -> None:
        self.images = 0
        self._df: Counter = Counter()
        for refs in references:
            self._df.update({ngram for words in refs for ngram in ngrams(words)})
            self.images += 1
        self._log_images = math.log(max(1, self.images))

    def score(self, candidate: Words, references: Sequence[Words]) -> float:
        """CIDEr-D of a caption, 0..10, against at least one reference of its image."""
        return self.against(references)(candidate)

    def against(self, references: Sequence[Words]) -> Callable[[Words], float]:
        """The score of any caption against the references of one image."""
        others = [self._vector(words) for words in references]

        def score(candidate: Words) -> float:
            own = self._vector(candidate)
            total = sum(self._similarity(own, other) for other in others)
            return 10 * total / (ORDERS * len(others))

        return score

    def _vector(self, words: Words) -> _Vector:
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDERS)]
        for ngram, count in ngrams(words).items():
            rarity = self._log_images - math.log(max(1.0, self._df.get(ngram, 0)))
            weights[len(ngram) - 1][ngram] = count * rarity
        norms = [math.sqrt(sum(w * w for w in level.values())) for level in weights]
        return weights, norms, max(0, len(words) - 1)

    @staticmethod
    def _similarity(own: _Vector, other: _Vector) -> float:
        near = math.exp(-((own[2] - other[2]) ** 2) / (2 * _SIGMA**2))
        total = 0.0
        for mine, theirs, norm, other_norm in zip(own[0], other[0], own[1], other[1]):
            product = sum(
                min(weight, theirs.get(ngram, 0.0)) * theirs.get(ngram, 0.0) for ngram, weight in mine.items()
            )
            total += near * (product / (norm * other_norm) if norm and other_norm else product)
        return total


def cider_d(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr-D of captions, the document frequencies taken from their own references.

    Args:
        candidates: words of N captions, possibly none.
        references: for each of them the words of at least one reference.

    Returns:
        N scores in 0..10, whose mean is the corpus's.
    """
    scorer = CiderD(references)
    return [scorer.score(words, refs) for words, refs in zip(candidates, references, strict=True)]
