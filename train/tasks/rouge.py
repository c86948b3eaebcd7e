"""ROUGE-L of captions (Lin 2004), as COCO's evaluation computes it.

P = max_r lcs(c, r) / |c|,  R = max_r lcs(c, r) / |r|,  F = (1 + b^2) P R / (R + b^2 P),  b = 1.2
"""

from collections.abc import Sequence

from train.tasks.bleu import Words

_BETA_SQUARED = 1.2**2


def common_length(a: Words, b: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """ROUGE-L of captions.

    Args:
        candidates: words of N captions, possibly none.
        references: for each of them the words of at least one reference.

    Returns:
        N scores in 0..1, whose mean is the corpus's.
    """
    scores = []
    for words, refs in zip(candidates, references, strict=True):
        common = [common_length(words, ref) for ref in refs]
        precision = max(n / max(1, len(words)) for n in common)
        recall = max(n / max(1, len(ref)) for n, ref in zip(common, refs))
        both = precision * recall
        scores.append((1 + _BETA_SQUARED) * both / (recall + _BETA_SQUARED * precision) if both else 0.0)
    return scores
