"""What fine-tuning minimises with a fusion encoder: matching beside ITC, boxes of phrases, statements about two images.

Every loss is a rank's share of the loss of the global batch, as in `train.tasks.objectives`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import box_loss
from sycoca.masking import step_plan
from sycoca.model import Batch
from sycoca.regions import RegionBatch
from sycoca.xvlm import XBatch
from train.tasks.heads import StatementHead
from train.tasks.nlvr import statement_logits
from train.tasks.objectives import Group, Objective, per_rank


class Matching(Objective):
    """ITC and ITM between images and one caption of each, weighted as in pre-training."""

    names = ("loss", "itc", "itm")

    def inputs(self, images: Tensor, rows: Tensor, ids: Tensor | None, seed: int) -> tuple:
        seeds = torch.arange(len(images), device=images.device) + seed % 2**62
        return images, rows[:, 0], ids, seeds

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        ids: Tensor | None,
        seeds: Tensor,
        group: Group,
        shares: Sequence[int],
    ) -> tuple:
        batch = XBatch(Batch(images, tokens, seeds, ids))
        losses = self.model(batch, step_plan(self.model.config, 0, 1, 0), group, shares)
        weight = self.model.config.loss
        return weight.itc_weight * losses.itc + weight.itm_weight * losses.itm, losses.itc, losses.itm


class Locating(Objective):
    """L1 and GIoU of the boxes of phrases, weighted as in pre-training."""

    names = ("loss", "l1", "giou")

    def inputs(self, *arguments) -> tuple:
        return arguments[:-1]

    def forward(self, *arguments) -> tuple:
        *fields, group, _ = arguments
        regions, model = RegionBatch(*fields), self.model
        views = model.view_images(model.encode_image(regions.images))
        seen = views._replace(seen=views.seen.of(regions.image_index))
        found = model.locate(model.encode_text(regions.tokens), seen)
        count = per_rank(regions.has_box.sum(), group)
        l1, giou = (part / count for part in box_loss(found, regions.boxes, regions.has_box, reduction="sum"))
        weight = model.config.loss
        return weight.l1_weight * l1 + weight.giou_weight * giou, l1, giou


class Stating(Objective):
    """Cross-entropy of whether sentences are true of two images."""

    names = ("loss", "statement")
    head: StatementHead

    def inputs(self, images: Tensor, tokens: Tensor, labels: Tensor, seed: int) -> tuple:
        return images, tokens, labels

    def forward(self, images: Tensor, tokens: Tensor, labels: Tensor, group: Group, shares: Sequence[int]) -> tuple:
        logits = statement_logits(self.model, self.head, images, tokens)
        count = per_rank(torch.tensor(len(labels), device=labels.device), group)
        loss = F.cross_entropy(logits, labels, reduction="sum") / count
        return loss, loss
