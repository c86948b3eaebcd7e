"""The contrastive term of a batch: spread over the ranks of a group, and over parts that do not fit together.

    dL_itc = <dimages, d images> + <dcaptions, d captions> + <dscale, d scale>

A batch in parts is encoded twice (GradCache, arXiv 2101.06983): without a graph for the features of all parts, whose
gradient is formed once; then part by part, each differentiating its share of the line above beside its other losses.
Nothing of the size of the whole batch is held but features, and every rank and part counts alike.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import GatheredTexts, fused_itc_loss, gather_texts


class Spread(NamedTuple):
    """Where a global batch lies.

    Attributes:
        group: process group over which it is spread, or None for this process alone.
        shares: pairs of every rank of the group, where known; otherwise the host waits for the ranks to tell.
        schedule: of `kernels.fused_itc_loss`.
    """

    group: dist.ProcessGroup | None = None
    shares: Sequence[int] | None = None
    schedule: str = "gather"


class PartContrast(NamedTuple):
    """The contrastive loss of a whole batch and its derivative with respect to what is one part's.

    Attributes:
        loss: () fp32, of the whole batch; nothing here has a gradient of its own.
        dimages, dcaptions: (B, E) fp32, with respect to this part's features, times the number of parts.
        dscale: (1,) fp32, with respect to the scale; of all of this rank's pairs.
    """

    loss: Tensor
    dimages: Tensor
    dcaptions: Tensor
    dscale: Tensor

    def attach(self, images: Tensor, captions: Tensor, scale: Tensor) -> Tensor:
        """The loss, (), with its gradient; the mean over parts and ranks of the gradients is that of the whole."""
        slope = (self.dimages * images).sum() + (self.dcaptions * captions).sum() + (self.dscale * scale).sum()
        return self.loss + (slope - slope.detach())


class Whole(NamedTuple):
    """What a part of a larger batch has to know of the whole.

    Attributes:
        counts: (2,) int64, target tokens and captioned pairs over all parts and ranks.
        parts: parts times ranks.
        contrast: this part's, or None where contrast is not learnt.
    """

    counts: Tensor
    parts: int
    contrast: PartContrast | None


def send_captions(captions: Tensor, ids: Tensor | None, spread: Spread) -> Tensor | GatheredTexts:
    """Captions (B, E) on their way to all ranks; as they are where nothing is gathered."""
    if spread.group is None or spread.schedule == "ring":
        return captions
    return gather_texts(captions, ids, group=spread.group, counts=spread.shares)


def contrastive_loss(
    images: Tensor,
    captions: Tensor | GatheredTexts,
    scale: Tensor,
    ids: Tensor | None,
    spread: Spread,
    label_smoothing: float,
) -> Tensor:
    """The contrastive loss () fp32 of this rank's pairs within the batch.

    Args:
        images: (B, E) fp32, unit rows.
        captions: what `send_captions` gave.
        scale: (1,) fp32, multiplies the cosines.
        ids: (B,) int64, equal for pairs that match one another, or None.
        spread: as for `send_captions`.
        label_smoothing: 0..1.
    """
    if isinstance(captions, GatheredTexts):
        return fused_itc_loss(images, captions, scale, label_smoothing=label_smoothing)
    return fused_itc_loss(
        images,
        captions,
        scale,
        ids=ids,
        label_smoothing=label_smoothing,
        group=spread.group,
        schedule=spread.schedule,
        counts=None if spread.group is None else spread.shares,
    )


def part_contrasts(
    loss: Tensor, images: Tensor, captions: Tensor, scale: Tensor, sizes: Sequence[int]
) -> list[PartContrast]:
    """The derivatives of a whole batch's loss, part by part. The graph of the loss is freed.

    Args:
        loss: () of `contrastive_loss`.
        images, captions, scale: leaves that it was made of.
        sizes: pairs of each part, in order.
    """
    with torch.no_grad():
        dimages, dcaptions, dscale = torch.autograd.grad(loss, (images, captions, scale))
        cut = zip(*((d * len(sizes)).split(list(sizes)) for d in (dimages, dcaptions)), strict=True)
    return [PartContrast(loss.detach(), *part, dscale) for part in cut]
