"""Figures of an evaluation, as functions of tensors.

Retrieval: the rank of a query's best positive is the number of other candidates that score at least as high;
    recall@k is the share of queries of rank below k. Ties and NaN count against the model.
    A product in fp64 rounded to fp32 makes the scores of equal features equal, whatever the blocking.
    Chance, m positives among M candidates:  1 - C(M - m, k) / C(M, k).
Described area: a_i is the share of patch i's pixels whose centre lies in a box of a described object.
    Share of it that K selected patches hold: sum_selected a_i / sum_i a_i; random patches expect K / P.
AUC: the chance that a described patch (a_i >= 1/2) outscores another one, ties half.
"""

from collections.abc import Iterable, Sequence
from math import comb

import torch
import torch.nn.functional as F
from torch import Tensor

RECALL_AT = (1, 5, 10)
_CHUNK_BYTES = 64 << 20


def retrieval_ranks(images: Tensor, texts: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks of the best positive, in chunks.

    Args:
        images: (N, D) float features.
        texts: (M, D) float features.
        owner: (M,) int64, the image of each text; every image owns at least one.

    Returns:
        (N,) int64 ranks from image to text, (M,) int64 from text to image; 0 is best.
    """
    images, texts = images.double(), texts.double()
    positive = (images[owner] * texts).sum(-1).float()  # (M,)
    best = positive.new_full((len(images),), -torch.inf).scatter_reduce(0, owner, positive, "amax")
    to_text = torch.empty(len(images), dtype=torch.int64, device=images.device)
    to_image = torch.zeros(len(texts), dtype=torch.int64, device=images.device)
    rows = max(1, _CHUNK_BYTES // (8 * max(1, len(texts))))
    for start in range(0, len(images), rows):
        chunk = torch.arange(start, min(start + rows, len(images)), device=images.device)
        scores = (images[chunk] @ texts.T).float()
        negative = owner[None, :] != chunk[:, None]
        to_text[chunk] = (~(scores < best[chunk, None]) & negative).sum(1)
        to_image += (~(scores < positive) & negative).sum(0)
    return to_text, to_image


def recalls(ranks: Tensor) -> dict[str, float]:
    """Share of the queries of rank below k, by `r@k`."""
    return {f"r@{k}": (ranks < k).double().mean().item() for k in RECALL_AT}


def chance(positives: Iterable[int], candidates: int) -> dict[str, float]:
    """Recall of a random order, by `r@k`; `positives` holds the number of each query."""
    positives = list(positives)
    return {
        f"r@{k}": sum(1 - comb(candidates - m, k) / comb(candidates, k) if k <= candidates else 1.0 for m in positives)
        / len(positives)
        for k in RECALL_AT
    }


def retrieval(images: Tensor, texts: Tensor, owner: Tensor) -> dict:
    """Recalls in both directions beside their chance; arguments as `retrieval_ranks`."""
    return retrieval_figures(*retrieval_ranks(images, texts, owner), owner, len(images))


def retrieval_figures(to_text: Tensor, to_image: Tensor, owner: Tensor, images: int) -> dict:
    """Recalls in both directions beside their chance.

    Args:
        to_text, to_image: results of `retrieval_ranks`.
        owner: (M,) int64, the image of each text.
        images: N.
    """
    owned = torch.bincount(owner, minlength=images).tolist()
    return {
        "images": images,
        "texts": len(owner),
        "image_to_text": recalls(to_text),
        "text_to_image": recalls(to_image),
        "chance": {
            "image_to_text": chance(owned, len(owner)),
            "text_to_image": chance([1] * len(owner), images),
        },
    }


def caption_nats(logits: Tensor, tokens: Tensor, eot_id: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy of captions.

    Args:
        logits: (B, T, V) float; position t predicts token t + 1.
        tokens: (B, T) int64; what follows the first `eot_id` is padding.
        eot_id: the token that ends a caption; predicted too.

    Returns:
        (B,) fp64 nats summed over the caption, (B,) int64 predicted tokens.
    """
    labels = tokens[:, 1:]
    ends = tokens == eot_id
    valid = (ends.cumsum(1) - ends.long())[:, 1:] == 0
    nats = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="none")
    return nats.view_as(labels).double().mul(valid).sum(1), valid.sum(1)


def described_area(boxes: Sequence[Sequence[float]], grid: tuple[int, int], patch_size: int) -> Tensor:
    """Share of every patch that lies in the union of boxes.

    Args:
        boxes: (x0, y0, x1, y1) as shares of the image the model sees.
        grid: patches per column and per row.
        patch_size: pixels.

    Returns:
        (P,) fp64 in 0..1.
    """
    rows, cols = grid
    y = (torch.arange(rows * patch_size, dtype=torch.float64) + 0.5) / (rows * patch_size)
    x = (torch.arange(cols * patch_size, dtype=torch.float64) + 0.5) / (cols * patch_size)
    covered = torch.zeros(len(y), len(x), dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        covered |= ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))
    return covered.view(rows, patch_size, cols, patch_size).double().mean((1, 3)).flatten()


def share_inside(area: Tensor, index: Tensor) -> Tensor:
    """Share of the area (B, P) that the patches `index` (B, K) hold, (B,); NaN where there is none."""
    return area.gather(1, index).sum(1) / area.sum(1)


def overlap(index: Tensor, other: Tensor) -> Tensor:
    """Share of the patches `index` (B, K) that are in `other` (B, K) too, (B,); unique per row."""
    return (index[:, :, None] == other[:, None, :]).any(2).double().mean(1)


def auc(scores: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Area under the ROC curve of every row.

    Args:
        scores: (B, P) float.
        positive: (B, P) bool, the patches that should score high.
        negative: (B, P) bool, those that should not.

    Returns:
        (B,) fp64, NaN where either is empty; a NaN score loses.
    """
    wins = []
    for row, hit, miss in zip(scores.double(), positive, negative):
        high, low = row[hit][:, None], row[miss]
        wins.append(((high > low).double() + 0.5 * (high == low)).mean())
    return torch.stack(wins) if wins else scores.new_zeros(0, dtype=torch.float64)
