"""Retrieval ranked anew by matching: the best K by ITC, of each image and of each text, in the order of ITM.

    s_it = log-odds that image i and text t match;  candidates stand before all others, which keep their rank by ITC

A pair that is a candidate both ways is scored once; the keys and values of an image are projected once for all texts.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CHUNK_BYTES = 64 << 20


class Candidates(NamedTuple):
    """The best by ITC: texts (N, K) of each image, images (M, K) of each text, int64."""

    texts: Tensor
    images: Tensor


def candidates(images: Tensor, texts: Tensor, count: int) -> Candidates:
    """The best K texts of each image and images of each text, by the cosine of features (N, D) and (M, D)."""
    return Candidates(_best(images, texts, count), _best(texts, images, count))


def _best(queries: Tensor, others: Tensor, count: int) -> Tensor:
    rows = max(1, _CHUNK_BYTES // (4 * max(1, len(others))))
    kept = min(count, len(others))
    return torch.cat([(part @ others.T).topk(kept).indices for part in queries.split(rows)])


@torch.no_grad()
def match_scores(
    model: Any, batches: Iterable[Tensor], texts: Any, chosen: Candidates, *, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Log-odds of all candidates.

    Args:
        model: with the objective `itm`.
        batches: the N images in order, (B, 3, S, S) at a time.
        texts: the M texts as the model encodes them.
        chosen: the candidates.
        batch_size: pairs of a forward pass, at most.

    Returns:
        (N, K) fp32 of each image's texts, (M, K) of each text's images.
    """
    by_image, by_text = chosen
    number = len(by_text)
    device = by_image.device
    own = torch.arange(len(by_image), device=device)[:, None] * number + by_image
    theirs = by_text * number + torch.arange(number, device=device)[:, None]
    # Sorted, so that the pairs of an image stand together.
    pairs, place = torch.cat([own.flatten(), theirs.flatten()]).unique(return_inverse=True)
    scores = torch.empty(len(pairs), device=device)
    first = done = 0
    for images in batches:
        views = model.view_images(model.encode_image(images))
        end = int(torch.searchsorted(pairs, (first + len(images)) * number))
        for part in range(done, end, batch_size):
            here = slice(part, min(end, part + batch_size))
            image, text = pairs[here] // number - first, pairs[here] % number
            words = texts._make(field[text] for field in texts)
            logits = model.match(words, views._replace(seen=views.seen.of(image)))
            scores[here] = (logits[:, 1] - logits[:, 0]).float()
        first, done = first + len(images), end
    return scores[place[: own.numel()]].view_as(own), scores[place[own.numel() :]].view_as(theirs)


def ranked_anew(scores: Tensor, right: Tensor, before: Tensor) -> Tensor:
    """Ranks of the best positive after re-ranking.

    Args:
        scores: (Q, K) of the candidates of each query.
        right: (Q, K) bool, the positives among them.
        before: (Q,) int64 ranks by ITC, kept where no candidate is right.

    Returns:
        (Q,) int64; 0 is best, and ties and NaN count against the model.
    """
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    anew = (~(scores < best) & ~right).sum(1)
    return torch.where(right.any(1), anew, before.clamp(min=scores.shape[1]))
