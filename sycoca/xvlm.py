"""X-VLM: texts aligned with images and with boxes of them (arXiv 2111.08276), over the encoders of SyCoCa.

    L = L_image + w_region L_region
    L_image  = SyCoCa's terms + w_itm L_ITM + w_mlm L_MLM
    L_region = w_itc L_ITC + w_itm L_ITM + w_mlm L_MLM + w_l1 L_L1 + w_giou L_GIoU

ITC, ITM and MLM of a region batch see a box as the image batch sees a whole image; ITM and MLM are shown the whole
image instead for the share `whole_views` of the texts. The box of a text is regressed from the whole image, which hides
nothing. Negatives of ITM are drawn from a rank's own batch; all other counts are those of the process group, as
everywhere in this package.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels import box_loss, sample_hard_negatives
from sycoca import fused_captioner
from sycoca.config import ModelConfig
from sycoca.contrast import Spread, contrastive_loss, send_captions
from sycoca.fusion import FusionEncoder, PairHead, Seen, Tables, WordHead
from sycoca.losses import global_counts
from sycoca.masking import StepPlan, hash_tensor
from sycoca.mlm import MaskedWords
from sycoca.model import Batch, ImageFeatures, SyCoCa, TextFeatures, _unit
from sycoca.region_views import Shown, choose_views, shown
from sycoca.region_vision import encode_regions, whole_images
from sycoca.regions import RegionBatch
from sycoca.text import EncodedText

__all__ = ["RegionLosses", "Views", "XBatch", "XLosses", "XVLM", "build_model"]


_HERE = Spread()


class XBatch(NamedTuple):
    """What one rank trains on in one step.

    Attributes:
        pairs: whole images and captions.
        regions: texts and boxes, or None.
        masked: the captions of `pairs` with hidden words, or None.
        masked_regions: the texts of `regions` with hidden words, or None.
    """

    pairs: Batch
    regions: RegionBatch | None = None
    masked: MaskedWords | None = None
    masked_regions: MaskedWords | None = None


class Views(NamedTuple):
    """Images or boxes as the fusion encoder sees them.

    Attributes:
        tables: keys and values of all image tokens, (R, 2 D) for each block.
        seen: rows of each of the N images or boxes.
    """

    tables: Tables
    seen: Seen


class RegionFeatures(NamedTuple):
    """A batch of encoded boxes.

    Attributes:
        features: (E, D) fp32, unit rows.
        boxes: E views of what is in each box.
        images: N views of the whole images.
    """

    features: Tensor
    boxes: Views
    images: Views


class XLosses(NamedTuple):
    """Losses of a step, each () fp32; their mean over the ranks is the loss of the global batch.

    Attributes:
        total: weighted sum, to be differentiated.
        itc, caption, tgmim, local, mask_overlap: as in `sycoca.model.Losses`, of the image batch.
        itm, mlm: of the image batch.
        region_itc, region_itm, region_mlm, l1, giou: of the region batch.
        matched: balanced accuracy of ITM over image and region batch, 0..1.
    """

    total: Tensor
    itc: Tensor
    caption: Tensor
    tgmim: Tensor
    local: Tensor
    mask_overlap: Tensor
    itm: Tensor
    mlm: Tensor
    region_itc: Tensor
    region_itm: Tensor
    region_mlm: Tensor
    l1: Tensor
    giou: Tensor
    matched: Tensor


class RegionLosses(NamedTuple):
    """Losses of a region batch, each () fp32; `total` is their weighted sum, `matched` as in `XLosses`."""

    total: Tensor
    itc: Tensor
    itm: Tensor
    mlm: Tensor
    l1: Tensor
    giou: Tensor
    matched: Tensor


class _Fused(NamedTuple):
    """Terms of E texts and their images or boxes."""

    itm: Tensor
    mlm: Tensor
    matched: Tensor


class XVLM(SyCoCa):
    """The model of a configuration with `fusion`, parts that no objective needs left out.

    Args:
        config: sizes, objectives, losses.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        width = config.text.width
        self.fusion = FusionEncoder(config) if config.fuses else None
        self.itm_head = PairHead(width, 2) if config.learns("itm") else None
        self.box_head = PairHead(width, 4) if config.learns("bbox") else None
        self.word_head = WordHead(config) if config.learns("mlm") or config.text.writes else None

    def forward(
        self,
        batch: XBatch,
        plan: StepPlan,
        group: dist.ProcessGroup | None = None,
        shares: Sequence[int] | None = None,
        *,
        schedule: str = "gather",
    ) -> XLosses:
        """Losses of this rank's share of a global batch; arguments as of `SyCoCa.forward`.

        With `shares`, every rank has as many texts with boxes as this one.
        """
        weight, spread = self.config.loss, Spread(group, shares, schedule)
        pairs, regions = batch.pairs, batch.regions
        text, hidden = self._encode_texts(pairs.tokens, batch.masked)
        base, image = self._pretrain(pairs, plan, spread, None, text)
        found = [self._counts(len(pairs.images), pairs.ids, batch.masked, None, pairs.images.device)]
        if regions is not None:
            found.append(self._region_counts(regions, batch.masked_regions))
        counts = _shares(torch.cat(found), spread)
        zero = torch.zeros((), device=pairs.images.device)
        terms, total, matched = _Fused(zero, zero, zero), base.total, []
        if self.learns_pairs:
            views = self.view_images(image)
            terms = self._fused(image.features, views, text, batch.masked, hidden, pairs.ids, pairs.seeds, counts)
            total = total + weight.itm_weight * terms.itm + weight.mlm_weight * terms.mlm
            matched.append(terms.matched)
        region = RegionLosses(*[zero] * len(RegionLosses._fields))
        if regions is not None:
            region = self.region_losses(regions, batch.masked_regions, spread, counts[3:])
            total = total + weight.region_weight * region.total
            matched += [region.matched] if self.learns_pairs else []
        accuracy = torch.stack(matched).mean() if matched else zero
        return XLosses(total, *base[1:], terms.itm, terms.mlm, *region[1:-1], accuracy)

    def region_losses(
        self,
        regions: RegionBatch,
        masked: MaskedWords | None = None,
        spread: Spread = _HERE,
        counts: Tensor | None = None,
    ) -> RegionLosses:
        """Losses of this rank's share of a global region batch.

        Args:
            regions: tensors on one device.
            masked: its texts with hidden words, where these are learned.
            spread: over the ranks, which have equally many texts each where the shares of pairs are known.
            counts: what `forward` has summed over the ranks already.

        Raises:
            ValueError: no text, or no image.
        """
        if not len(regions.ids) or not len(regions.images):
            raise ValueError(f"region batch: {len(regions.ids)} texts of {len(regions.images)} images; needs some")
        weight = self.config.loss
        counts = _shares(self._region_counts(regions, masked), spread) if counts is None else counts
        text, hidden = self._encode_texts(regions.tokens, masked)
        itc = l1 = giou = zero = torch.zeros((), device=regions.images.device)
        terms = _Fused(zero, zero, zero)
        if self.config.learns("itc") or self.learns_pairs:
            seen = self.encode_regions(regions.images, regions.rects, regions.image_index)
            whole = seen.images
        else:
            # Boxes are regressed from whole images: none is encoded by itself.
            whole = self.view_images(self.encode_image(regions.images))
        if self.config.learns("itc"):
            itc = self._region_itc(seen.features, text, regions, spread)
        if self.learns_pairs:
            choice = shown(regions, weight.whole_views, self.config.vision.num_patches)
            views = seen.boxes
            if weight.whole_views > 0:
                of_images = seen.images.seen.of(regions.image_index)
                views = Views(views.tables, choose_views(choice.whole, views.seen, of_images))
            told = (text, masked, hidden, regions.ids, regions.seeds)
            terms = self._fused(seen.features, views, *told, counts, choice, spread)
        if self.box_head is not None:
            l1, giou = self._box_terms(whole, text, regions, counts[2])
        total = weight.itc_weight * itc + weight.itm_weight * terms.itm + weight.mlm_weight * terms.mlm
        total = total + weight.l1_weight * l1 + weight.giou_weight * giou
        return RegionLosses(total, itc, terms.itm, terms.mlm, l1, giou, terms.matched)

    @property
    def learns_pairs(self) -> bool:
        """Whether texts are fused with their images outside of box regression."""
        return self.itm_head is not None or self.config.learns("mlm")

    def encode_regions(self, images: Tensor, rects: Tensor, image_index: Tensor) -> RegionFeatures:
        """Features of boxes and, for the fusion encoder, of what is in them and of the whole images.

        Args:
            images: (N, 3, H, W) fp32, normalised.
            rects: (E, 4) int32 cells [col0, row0, col1, row1), from `sycoca.regions.cells`.
            image_index: (E,) int64, the image of each.
        """
        encoded = encode_regions(self.vision, self.config.vision, images, rects, image_index)
        features = _unit(self.image_projection(encoded.tokens.rows.index_select(0, encoded.boxes.index[:, 0])))
        tables = self.fusion.look_up(encoded.tokens) if self.fusion is not None else ()
        return RegionFeatures(features, Views(tables, encoded.boxes), Views(tables, encoded.images))

    def view_images(self, image: ImageFeatures) -> Views:
        """Encoded images as the fusion encoder sees them; their keys and values can be kept and looked up again."""
        first = self.pooler(image.cls, image.patches).image
        tokens, seen = whole_images(first, image.patches)
        return Views(self._fusion().look_up(tokens), seen)

    def match(self, text: TextFeatures, views: Views) -> Tensor:
        """Logits (B, 2) fp32 of "does not match" and "matches" for B texts, each with its view."""
        if self.itm_head is None:
            raise ValueError("match: the model was built without the objective 'itm'")
        return self.itm_head(self.fused(text, views)).float()

    def locate(self, text: TextFeatures, views: Views) -> Tensor:
        """Boxes (B, 4) fp32, (cx, cy, w, h) in 0..1, of what B texts describe in the whole images of their views."""
        if self.box_head is None:
            raise ValueError("locate: the model was built without the objective 'bbox'")
        return self.box_head(self.fused(text, views)).float().sigmoid()

    def fused(self, text: TextFeatures, views: Views) -> Tensor:
        """States (B, D) of [CLS] in B texts, each with its view, for heads on top of the fusion encoder."""
        asking = torch.zeros(len(text.words), 1, dtype=torch.int64, device=text.words.device)
        valid = text.valid | (torch.arange(text.valid.shape[1], device=asking.device) == 0)
        return self._fusion()(text.words, valid, views.tables, views.seen, asking).squeeze(1)

    def caption_logits(self, image: ImageFeatures, tokens: Tensor) -> Tensor:
        """As of `SyCoCa`; of captions for an encoder that was taught to write."""
        if not self.config.text.writes:
            return super().caption_logits(image, tokens)
        return fused_captioner.caption_logits(self, image, tokens)

    def caption_loss(self, image: ImageFeatures, tokens: Tensor, labels: Tensor) -> Tensor:
        """As of `SyCoCa`; of captions for an encoder that was taught to write."""
        if not self.config.text.writes:
            return super().caption_loss(image, tokens, labels)
        return fused_captioner.caption_loss(self, image, tokens, labels)

    def _fusion(self) -> FusionEncoder:
        if self.fusion is None:
            raise ValueError("fusion: the model was built without 'itm', 'mlm' and 'bbox'")
        return self.fusion

    def _encode_texts(self, tokens: Tensor, masked: MaskedWords | None) -> tuple[TextFeatures, EncodedText | None]:
        """Texts (E, T), and the same with hidden words where these are learned, in one pass of the encoder."""
        if self.word_head is None or masked is None:
            return self.encode_text(tokens), None
        both = self.text(torch.cat([tokens, masked.tokens]))
        plain, hidden = (EncodedText(*parts) for parts in zip(*(part.chunk(2) for part in both)))
        return self._text_features(tokens, plain), hidden

    def _counts(
        self, count: int, ids: Tensor | None, masked: MaskedWords | None, boxes: Tensor | None, device: torch.device
    ) -> Tensor:
        """What this rank's losses count (3,) int64: pairs of ITM, hidden words, boxes."""
        none = torch.zeros((), dtype=torch.int64, device=device)
        matches = _num_matches(count, ids, device) if self.itm_head is not None else none
        hidden = none if masked is None else (masked.labels >= 0).sum()
        return torch.stack([matches, hidden, none if boxes is None else boxes.sum()])

    def _region_counts(self, regions: RegionBatch, masked: MaskedWords | None) -> Tensor:
        return self._counts(len(regions.ids), regions.ids, masked, regions.has_box, regions.images.device)

    def _region_itc(
        self,
        boxes: Tensor,
        text: TextFeatures,
        regions: RegionBatch,
        spread: Spread,
    ) -> Tensor:
        if spread.shares is not None:
            spread = spread._replace(shares=[len(boxes)] * len(spread.shares))
        texts = send_captions(text.features, regions.ids, spread)
        smoothing = self.config.loss.label_smoothing
        return contrastive_loss(boxes, texts, self.logit_scale(), regions.ids, spread, smoothing)

    def _fused(
        self,
        features: Tensor,
        views: Views,
        text: TextFeatures,
        masked: MaskedWords | None,
        hidden: EncodedText | None,
        ids: Tensor | None,
        seeds: Tensor,
        counts: Tensor,
        choice: Shown | None = None,
        spread: Spread = _HERE,
    ) -> _Fused:
        """ITM and MLM of E texts and their images or boxes; `choice` says which negatives are none."""
        itm = mlm = matched = torch.zeros((), device=features.device)
        if self.itm_head is not None:
            itm, pairs, matched = self._itm(features, views, text, ids, seeds, choice)
            # How many negatives are left is known when they have been drawn.
            itm = itm / (counts[0] if choice is None else _shares(pairs[None], spread)[0])
        if self.word_head is not None and hidden is not None:
            mlm = self._mlm(masked, hidden, views) / counts[1]
        return _Fused(itm, mlm, matched)

    def _itm(
        self,
        features: Tensor,
        views: Views,
        text: TextFeatures,
        ids: Tensor | None,
        seeds: Tensor,
        choice: Shown | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Summed loss of up to 3 E pairs, their number, and the balanced accuracy over them."""
        own = torch.arange(len(features), device=features.device)
        draws = {"ids": ids, "floor": self.config.loss.itm_floor, "seed": hash_tensor(seeds[:1])}
        other_image, other_text = sample_hard_negatives(
            features.detach(), text.features.detach(), self.logit_scale().detach(), **draws
        )
        if choice is not None:
            other_text, other_image = choice.without_true(other_text, other_image)
        texts = torch.cat([own, own, other_text.clamp(min=0)])
        images = torch.cat([own, other_image.clamp(min=0), own])
        logits = self.match(_rows(text, texts), Views(views.tables, views.seen.of(images)))
        label = torch.arange(3, device=own.device).repeat_interleave(len(own)) == 0
        counted = torch.cat([own >= 0, other_image >= 0, other_text >= 0])
        loss = F.cross_entropy(logits, label.long(), reduction="none")
        right = (logits.argmax(1) == label.long()) & counted
        sides = [(right & side).sum() / (counted & side).sum().clamp(min=1) for side in (label, ~label)]
        return torch.where(counted, loss, 0.0).sum(), counted.sum(), torch.stack(sides).mean()

    def _mlm(self, masked: MaskedWords, hidden: EncodedText, views: Views) -> Tensor:
        states = self.fusion(hidden.words, hidden.valid, views.tables, views.seen, masked.positions)
        states = self.word_head(states.flatten(0, 1))
        return self.text.sequence.tokens(states=states, labels=masked.labels.flatten())

    def _box_terms(
        self, images: Views, text: TextFeatures, regions: RegionBatch, count: Tensor
    ) -> tuple[Tensor, Tensor]:
        index, boxes, valid = regions.image_index, regions.boxes, regions.has_box
        if valid.device.type == "cpu":
            # Captions of whole images, the longest texts, are not asked for boxes.
            asked = _one_at_least(valid.nonzero().squeeze(1))
            text, index, boxes, valid = _rows(text, asked), index[asked], boxes[asked], valid[asked]
        found = self.locate(text, Views(images.tables, images.seen.of(index)))
        l1, giou = box_loss(found, boxes, valid, reduction="sum")
        return l1 / count, giou / count


def build_model(config: ModelConfig) -> SyCoCa:
    """The model of a configuration: X-VLM where it has a fusion encoder or boxes, else SyCoCa."""
    return SyCoCa(config) if config.fusion is None else XVLM(config)


def _shares(counts: Tensor, spread: Spread) -> Tensor:
    """Counts by which the sums of each rank are divided, so that the mean over ranks is the global loss."""
    counts, world_size = global_counts(counts, spread.group)
    return counts.clamp(min=1) / world_size


def _one_at_least(chosen: Tensor) -> Tensor:
    # Ranks that share parameters make the same calls: an empty choice is the first row, which then counts for nothing.
    return chosen if len(chosen) else chosen.new_zeros(1)


def _rows(text: TextFeatures, chosen: Tensor) -> TextFeatures:
    # An index in brackets would be added up in any order on the way back, by threads at once.
    return TextFeatures(*(part.index_select(0, chosen) for part in text))


def _num_matches(count: int, ids: Tensor | None, device: torch.device) -> Tensor:
    """Pairs of ITM () int64: all that match, and twice as many where a rank's batch holds a second id."""
    if ids is None:
        return torch.full((), count + 2 * count * (count > 1), dtype=torch.int64, device=device)
    return count + 2 * count * (ids != ids[:1]).any()
