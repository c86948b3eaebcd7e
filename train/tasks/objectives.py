"""What fine-tuning minimises, for each task; every loss is a rank's share of the loss of the global batch.

L = sum over this rank / (count over all ranks / ranks)
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import fused_itc_loss, gather_texts
from sycoca.losses import global_counts
from train.tasks.heads import AnswerHead, LabelHead, answer_logits, label_logits
from train.tasks.likelihood import text_labels
from train.tasks.rows import AnswerRows

Group = dist.ProcessGroup | None


class Objective(nn.Module):
    """A model, perhaps a classifier on it, and a loss.

    Attributes:
        names: of the values that `forward` gives, the loss to be differentiated first.
    """

    names: tuple[str, ...]

    def __init__(self, model: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.head = model, head

    def inputs(self, images: Tensor, rows: Tensor, ids: Tensor | None, seed: int) -> tuple:
        """What `forward` takes, from a batch of the loader and the seed of this step and rank."""
        return images, rows, ids


class Contrast(Objective):
    """ITC between images and K captions of each, all of which are its positives."""

    names = ("loss", "itc")

    def forward(self, images: Tensor, rows: Tensor, ids: Tensor | None, group: Group, shares: Sequence[int]) -> tuple:
        B, K, _ = rows.shape
        texts = self.model.encode_text(rows.flatten(0, 1)).features
        if K > 1:
            # An image that stands K times adds a constant to the loss, log K / 2, and nothing to a gradient.
            ids = _places(B, group, images.device) if ids is None else ids
            ids = ids.repeat_interleave(K)
        if group is not None:
            texts = gather_texts(texts, ids, group=group, counts=[K * share for share in shares])
        features = self.model.encode_image(images).features.repeat_interleave(K, 0)
        loss = fused_itc_loss(features, texts, self.model.logit_scale(), ids=ids if group is None else None)
        return loss, loss


class Writing(Objective):
    """Cross-entropy of K captions of each image; the whole image is seen.

    Args:
        model: one that writes captions.
        opening: first tokens of every caption, [SOT] not among them, that are not counted.
    """

    names = ("loss", "caption")

    def __init__(self, model: nn.Module, opening: int = 0) -> None:
        super().__init__(model)
        self._first = 1 + opening

    def forward(self, images: Tensor, rows: Tensor, ids: Tensor | None, group: Group, shares: Sequence[int]) -> tuple:
        tokens = rows.flatten(0, 1)
        labels, count = _labels(self.model, tokens, torch.full_like(tokens[:, 0], self._first), group)
        loss = self.model.caption_loss(self.model.encode_image(images), tokens, labels) / count
        return loss, loss


def _places(count: int, group: Group, device: Any) -> Tensor:
    """Numbers (count,) int64 that no two images of the global batch share, where ranks hold equally many."""
    first = 0 if group is None else dist.get_rank(group) * count
    return torch.arange(first, first + count, device=device)


class AnswerWriting(Objective):
    """Cross-entropy of the answer behind its question."""

    names = ("loss", "answer")

    def forward(self, images: Tensor, rows: Tensor, ids: Tensor | None, group: Group, shares: Sequence[int]) -> tuple:
        tokens = rows[:, :-1]
        labels, count = _labels(self.model, tokens, rows[:, -1], group)
        loss = self.model.caption_loss(self.model.encode_image(images), tokens, labels) / count
        return loss, loss


class AnswerChoosing(Objective):
    """Cross-entropy of the known answers against how well each agrees with the people asked."""

    names = ("loss", "answer")
    head: AnswerHead

    def forward(self, images: Tensor, rows: Tensor, ids: Tensor | None, group: Group, shares: Sequence[int]) -> tuple:
        questions, target = AnswerRows.decode(rows, self.head.linear.out_features)
        logits = answer_logits(self.model, self.head, self.model.encode_image(images), questions).float()
        count = per_rank(target.sum(1).gt(0).sum(), group)
        loss = -(target * logits.log_softmax(1)).sum() / count
        return loss, loss


class Labelling(Objective):
    """Cross-entropy of image labels."""

    names = ("loss", "label")
    head: LabelHead

    def forward(self, images: Tensor, rows: Tensor, ids: Tensor | None, group: Group, shares: Sequence[int]) -> tuple:
        logits = label_logits(self.model, self.head, images).float()
        count = per_rank(torch.tensor(len(rows), device=rows.device), group)
        loss = F.cross_entropy(logits, rows[:, 0], reduction="sum") / count
        return loss, loss


def _labels(model: Any, tokens: Tensor, starts: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Labels (B, T - 1) from `starts` (B,) to the first [EOT], and their number per rank."""
    labels = text_labels(tokens, starts, model.config.text.eot_id)
    return labels, per_rank((labels >= 0).sum(), group)


def per_rank(count: Tensor, group: Group) -> Tensor:
    """A count over all ranks, divided by their number."""
    counts, world = global_counts(count[None], group)
    return counts[0].clamp(min=1) / world
