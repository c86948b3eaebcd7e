"""SyCoCa: contrastive, captioning and text-guided masked image modelling over one image and one text encoder.

    L = w_itc L_itc + w_ic L_ic + w_tm L_tm + w_local L_local

Without masks it is CoCa. Losses are shares of the global batch of a process group that is handed in.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import PatchSelection, gather_patches, masked_patch_loss
from sycoca.backbone_config import missing_package
from sycoca.config import ConfigError, ModelConfig
from sycoca.contrast import Spread, Whole, contrastive_loss, send_captions
from sycoca.decoders import CaptionDecoder, ImageDecoder, VocabularyHead
from sycoca.hub_mixin import HubMixin
from sycoca.layers import LayerNorm, LogitScale
from sycoca.losses import feature_loss, global_counts, local_loss
from sycoca.masking import (
    StepPlan,
    overlap,
    select_at_random,
    select_by_score,
    select_described,
    step_plan,
)
from sycoca.poolers import build_pooler
from sycoca.text import EncodedText, build_text_encoder, valid_tokens
from sycoca.vision import build_image_encoder

__all__ = ["Batch", "ImageFeatures", "Losses", "StepPlan", "SyCoCa", "TextFeatures", "parameter_groups", "step_plan"]


class Batch(NamedTuple):
    """What one rank trains on in one step.

    Attributes:
        images: (B, 3, H, W) fp32, normalised.
        tokens: (B, T) int64, [SOT] words [EOT] and padding.
        seeds: (B,) int64, randomness of each sample.
        ids: (B,) int64, equal for pairs that match one another, or None.
        described: (B, P) float, share of each patch inside boxes of what the caption describes; None where no
            selection asks for it.
        targets: (B, P, D) from `sycoca.losses.feature_targets`, what TG-MIM predicts where it predicts features.
    """

    images: Tensor
    tokens: Tensor
    seeds: Tensor
    ids: Tensor | None
    described: Tensor | None = None
    targets: Tensor | None = None


class ImageFeatures(NamedTuple):
    """A batch of encoded images.

    Attributes:
        features: (B, E) fp32, unit rows.
        patches: (B, P, D) normalised patches.
        embedded: (B, P, D) patch embeddings that a second pass starts from; None from a Swin, which has no such pass.
        values: (B, P, D) values of the last block where the score space needs them, else None.
        cls: (B, D) normalised [CLS].
        memory: (B, M, D') what captioning attends to: the patches, or what a pooler makes of them.
    """

    features: Tensor
    patches: Tensor
    embedded: Tensor | None
    values: Tensor | None
    cls: Tensor
    memory: Tensor


class TextFeatures(NamedTuple):
    """A batch of encoded captions.

    Attributes:
        features: (B, E) fp32, unit rows.
        words: (B, T, D) states of the tokens.
        valid: (B, T) bool, tokens of the caption.
        scored: (B, T) bool, valid tokens without [SOT]: those that score patches.
    """

    features: Tensor
    words: Tensor
    valid: Tensor
    scored: Tensor


class Losses(NamedTuple):
    """Losses of a step, each () fp32; their mean over the ranks is the loss of the global batch.

    Attributes:
        total: weighted sum, to be differentiated.
        itc, caption, tgmim, local: the terms, 0 where not trained.
        mask_overlap: share, 0..1, of the selection that another image's caption would also select;
            1 means that the caption does not matter.
    """

    total: Tensor
    itc: Tensor
    caption: Tensor
    tgmim: Tensor
    local: Tensor
    mask_overlap: Tensor


LocalOperands = tuple[Tensor, Tensor]
_DECAYED = nn.Linear | nn.Conv2d | nn.Embedding | VocabularyHead


class LocalHeads(nn.Module):
    """Projections of patches and words into the space in which single tokens are contrasted."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.masking.local_dim
        self.ln_text = LayerNorm(config.text.width)
        self.image = _projection(config.vision.width, dim)
        self.text = _projection(config.text.width, dim)
        self.scale = LogitScale(config.logit_scale_init)

    def forward(self, patches: Tensor, words: Tensor) -> LocalOperands:
        return _unit(self.image(patches)), _unit(self.text(self.ln_text(words)))


class SyCoCa(nn.Module, HubMixin):
    """The model of a configuration, parts that no objective needs left out.

    Args:
        config: sizes, masks, losses.

    Raises:
        ConfigError: encoders of transformers, which is not installed.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        if line := missing_package(config):
            raise ConfigError(line)
        self.vision = build_image_encoder(config)
        self.text = build_text_encoder(config)
        self.pooler = build_pooler(config)
        self.image_projection = _projection(config.memory_width, config.embed_dim)
        self.text_projection = _projection(config.text.width, config.embed_dim)
        self.logit_scale = LogitScale(config.logit_scale_init)
        self.caption_decoder = CaptionDecoder(config) if config.learns("ic") else None
        self.image_decoder = ImageDecoder(config) if config.num_masked else None
        self.local = LocalHeads(config) if config.local_weight > 0 else None

    def forward(
        self,
        batch: Batch,
        plan: StepPlan,
        group: dist.ProcessGroup | None = None,
        shares: Sequence[int] | None = None,
        *,
        schedule: str = "gather",
        whole: Whole | None = None,
    ) -> Losses:
        """Losses of this rank's share of a global batch.

        Args:
            batch: tensors on one device.
            plan: from `step_plan`, equal on all ranks.
            group: process group over which the batch is spread, or None for this process alone.
            shares: pairs of every rank of the group, where known; otherwise the host waits for the ranks to tell.
            schedule: of `kernels.fused_itc_loss`.
            whole: of the batch that this one is a part of; nothing is exchanged with other ranks then.
        """
        text = self.encode_text(batch.tokens)
        return self._pretrain(batch, plan, Spread(group, shares, schedule), whole, text)[0]

    def _pretrain(
        self, batch: Batch, plan: StepPlan, spread: Spread, whole: Whole | None, text: TextFeatures
    ) -> tuple[Losses, ImageFeatures]:
        """Losses, and the encoded images that they are of; `text` is that of the batch."""
        config, weight = self.config, self.config.loss
        if whole is None:
            counts, parts = global_counts(self.counts(batch.tokens), spread.group)
        else:
            counts, parts = whole.counts, whole.parts
        tokens, pairs = (counts.clamp(min=1) / parts).unbind()
        captions = text.features
        if whole is None and config.learns("itc"):
            # The texts travel while the image tower runs.
            captions = send_captions(captions, batch.ids, spread)
        image = self.encode_image(batch.images)

        itc = caption = tgmim = local = total = torch.zeros((), device=batch.images.device)
        if config.learns("itc"):
            scale, eps = self.logit_scale(), weight.label_smoothing
            if whole is None:
                itc = contrastive_loss(image.features, captions, scale, batch.ids, spread, eps)
            else:
                itc = whole.contrast.attach(image.features, captions, scale)
            total = total + weight.itc_weight * itc
        operands = self.local(image.patches, text.words) if self.local is not None else None
        selection, mask_overlap = self._selection(batch, plan, image, text, operands)
        if self.caption_decoder is not None:
            memory = image.memory
            if plan.mask_captioning and config.num_dropped > 0:
                memory = self.pooler(image.cls, gather_patches(image.patches, selection.kept)).memory
            caption = self._caption_loss(memory, text, batch.tokens) / tokens
            total = total + weight.caption_weight * caption
        if self.image_decoder is not None and plan.reconstruct:
            tgmim = self._tgmim_loss(batch, image, text, selection) / pairs
            total = total + weight.tgmim_weight * tgmim
        if operands is not None:
            group_size = config.masking.local_group
            local = local_loss(*operands, text.scored, self.local.scale(), group_size) / pairs
            total = total + config.local_weight * local
        return Losses(total, itc, caption, tgmim, local, mask_overlap), image

    @torch.no_grad()
    def counts(self, tokens: Tensor) -> Tensor:
        """Target tokens and captioned pairs (2,) int64 of captions (B, T), what the losses are shares of."""
        valid = valid_tokens(tokens, self.config.text)
        scored = valid & (tokens != self.config.text.sot_id)
        return torch.stack([valid[:, 1:].sum(), scored.any(1).sum()])

    def encode_image(self, images: Tensor) -> ImageFeatures:
        """Features of images (B, 3, H, W) fp32, normalised."""
        encoded = self.vision(images)
        pooled = self.pooler(encoded.cls, encoded.patches)
        features = _unit(self.image_projection(pooled.image))
        return ImageFeatures(features, encoded.patches, encoded.embedded, encoded.values, encoded.cls, pooled.memory)

    def encode_text(self, tokens: Tensor) -> TextFeatures:
        """Features of captions (B, T) int64."""
        return self._text_features(tokens, self.text(tokens))

    def _text_features(self, tokens: Tensor, encoded: EncodedText) -> TextFeatures:
        scored = encoded.valid & (tokens != self.config.text.sot_id)
        return TextFeatures(_unit(self.text_projection(encoded.cls)), encoded.words, encoded.valid, scored)

    @torch.no_grad()
    def select(self, image: ImageFeatures, text: TextFeatures) -> PatchSelection:
        """The attentive selection of each image's patches under its caption, without gradient.

        Raises:
            ValueError: the configuration selects nothing, or never by a score.
        """
        if not self.config.selects:
            raise ValueError("select: the model masks no patches (mask_ratio, drop_ratio or their objectives are 0)")
        if not self.config.scores:
            raise ValueError("select: the model's masks do not follow a score (masking.mask_by, masking.drop_by)")
        return select_by_score(*self._score_operands(image, text, None), self.config)

    @torch.no_grad()
    def token_scores(self, image: ImageFeatures, text: TextFeatures) -> Tensor:
        """Cosine (B, P, T) fp32 of every patch and token in the score space, T = 1 where it holds whole captions."""
        patches, tokens, _ = self._score_operands(image, text, None)
        return _unit(patches) @ _unit(tokens).transpose(1, 2)

    def caption_logits(self, image: ImageFeatures, tokens: Tensor) -> Tensor:
        """Logits (N, T, V) of the token behind each of tokens (N, T), which may be unfinished; all patches are seen.

        Of B images, N / B neighbouring captions belong to each.
        """
        return self._captioner()(self.text.words(tokens), _shared(image.memory, len(tokens)))

    def caption_loss(self, image: ImageFeatures, tokens: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy () of the labels (N, T - 1) behind tokens (N, T) as in `caption_logits`, summed.

        Labels below 0 are left out. Smoothed as `loss.caption_label_smoothing` says.
        """
        words = self.text.words(tokens)[:, :-1]
        return self._captioner()(words, _shared(image.memory, len(tokens)), labels)

    def _captioner(self) -> CaptionDecoder:
        if self.caption_decoder is None:
            raise ValueError("captions: the model was built without captioning")
        return self.caption_decoder

    def reconstruct(self, images: Tensor, text: TextFeatures, selection: PatchSelection) -> Tensor:
        """Pixels (B, K, p * p * 3) of the masked patches, normalised as the images, from the rest and the caption.

        Pixels of a patch are ordered row, column, channel. With `mse_normalised` they are in units of each patch. With
        `ema_features` there are features (B, K, D) instead, as `sycoca.losses.feature_targets` has them.
        """
        if self.image_decoder is None:
            raise ValueError("reconstruct: the model was built without TG-MIM")
        return self._reconstruct(self.vision.embed(images), text, selection)

    def _caption_loss(self, memory: Tensor, text: TextFeatures, tokens: Tensor) -> Tensor:
        labels = tokens[:, 1:].masked_fill(~text.valid[:, 1:], -1)
        return self.caption_decoder(text.words[:, :-1], memory, labels)

    def _tgmim_loss(self, batch: Batch, image: ImageFeatures, text: TextFeatures, selection: PatchSelection) -> Tensor:
        # An empty caption is no guide: prediction and target become zero, which is no error and no gradient.
        present = text.scored.any(1)
        pred = self._reconstruct(image.embedded, text, selection)
        pred = torch.where(present[:, None, None], pred, 0.0)
        if self.config.predicts_features:
            if batch.targets is None:
                raise ValueError("Batch.targets: missing; loss.tgmim_kind 'ema_features' predicts them")
            targets = torch.where(present[:, None, None], batch.targets, 0.0)
            return feature_loss(pred, targets, selection.masked) / (self.config.num_masked * targets.shape[2])
        target = torch.where(present[:, None, None, None], batch.images, 0.0)
        error = masked_patch_loss(
            pred,
            target,
            selection.masked,
            patch_size=self.config.vision.patch_size,
            kind=self.config.loss.tgmim_kind,
            reduction="sum",
        )
        return error / (self.config.num_masked * self.config.vision.patch_values)

    def _reconstruct(self, embedded: Tensor, text: TextFeatures, selection: PatchSelection) -> Tensor:
        encoded = self.vision.encode_visible(embedded, selection.visible)
        return self.image_decoder(encoded, selection.visible, selection.masked, text.words, text.valid)

    @torch.no_grad()
    def _selection(
        self, batch: Batch, plan: StepPlan, image: ImageFeatures, text: TextFeatures, local: LocalOperands | None
    ) -> tuple[PatchSelection | None, Tensor]:
        """The selection of a step, if any, and its overlap with that of the neighbour's caption."""
        config, seeds = self.config, batch.seeds
        mask_overlap = torch.ones((), device=seeds.device)
        if not (plan.attentive and config.selects):
            masks = config.num_masked and plan.reconstruct
            return (select_at_random(seeds, config) if masks else None), mask_overlap
        scored = None
        if config.scores:
            patches, tokens, valid = self._score_operands(image, text, local)
            scored = select_by_score(patches, tokens, valid, config)
            other = select_by_score(patches, tokens.roll(1, 0), valid.roll(1, 0), config)
            masks = config.num_masked and config.masking.mask_by == "score"
            pair = (scored.masked, other.masked) if masks else (scored.kept, other.kept)
            mask_overlap = overlap(*pair, config.vision.num_patches)

        def chosen(by: str) -> PatchSelection:
            if by == "oracle":
                return select_described(batch.described, seeds, config)
            return scored if by == "score" else select_at_random(seeds, config)

        masks = chosen(config.masking.mask_by) if config.num_masked else None
        drops = chosen(config.masking.drop_by) if config.num_dropped else masks
        return drops if masks is None else masks._replace(dropped=drops.dropped, kept=drops.kept), mask_overlap

    def _score_operands(
        self, image: ImageFeatures, text: TextFeatures, local: LocalOperands | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Patches (B, P, E), tokens (B, T, E) and valid (B, T) whose cosines are the score."""
        match self.config.masking.score_space:
            case "itc":
                words = self.text_projection(self.text.ln_final(text.words))
                return self.image_projection(image.patches), words, text.scored
            case "value":
                any_scored = text.scored.any(1, keepdim=True)
                return self.image_projection(image.values), text.features[:, None], any_scored
            case "local":
                if self.local is None:
                    raise ValueError("score_space 'local': its heads were not built (loss.local_weight is 0)")
                return *(local or self.local(image.patches, text.words)), text.scored


def parameter_groups(model: SyCoCa, weight_decay: float) -> list[dict]:
    """Parameters as an optimizer takes them.

    Args:
        model: any model of this package.
        weight_decay: of the weights of linear maps and token tables; everything else has none.

    Returns:
        Groups with the keys `name`, `params`, `weight_decay`; the group `logit_scale` has also `max_value`, the
        limit at which its parameters are clamped after each step.
    """
    decayed, plain, scales = [], [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, LogitScale):
                scales.append(parameter)
            elif name == "weight" and isinstance(module, _DECAYED):
                decayed.append(parameter)
            else:
                plain.append(parameter)
    limit = math.log(model.config.logit_scale_max)
    return [
        {"name": "decay", "params": decayed, "weight_decay": weight_decay},
        {"name": "no_decay", "params": plain, "weight_decay": 0.0},
        {"name": "logit_scale", "params": scales, "weight_decay": 0.0, "max_value": limit},
    ]


def _projection(width: int, dim: int) -> nn.Linear:
    linear = nn.Linear(width, dim, bias=False)
    nn.init.normal_(linear.weight, std=width**-0.5)
    return linear


def _shared(memory: Tensor, count: int) -> Tensor:
    return memory if count == len(memory) else memory.repeat_interleave(count // len(memory), 0)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)
