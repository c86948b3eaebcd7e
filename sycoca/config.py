"""Configuration of the models: frozen dataclasses, and the presets."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from sycoca.checked import ConfigError, Strict, from_dict, known_keys, nearest, to_dict

__all__ = [
    "CaptionDecoderConfig",
    "ConfigError",
    "ImageDecoderConfig",
    "LossConfig",
    "MODEL_PRESETS",
    "MaskingConfig",
    "ModelConfig",
    "OBJECTIVES",
    "PRESET_PARAMETERS",
    "TextConfig",
    "VisionConfig",
    "from_dict",
    "known_keys",
    "nearest",
    "to_dict",
]
OBJECTIVES = ("itc", "ic", "tgmim")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _positive(config: Any, *names: str) -> None:
    for name in names:
        _require(getattr(config, name) > 0, f"{name}: must be positive, got {getattr(config, name)}")


def _heads(width: int, heads: int) -> None:
    _require(heads > 0 and width % heads == 0, f"heads: {heads} does not divide the width {width}")


@dataclass(frozen=True)
class VisionConfig(Strict):
    """Image encoder: a ViT over square images (pixels).

    Attributes:
        cls_position: [CLS] has a position of its own, as in CLIP.
        pooler: what stands for the image and what captioning attends to; see `sycoca.poolers`.
        pooler_queries: of the poolers for captioning.
        pooler_heads: of every pooler, over the width of the shared space.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    cls_position: bool = False
    pooler: Literal["cls", "single", "parallel", "cascade"] = "cls"
    pooler_queries: int = 256
    pooler_heads: int = 8

    def __post_init__(self) -> None:
        _positive(self, "image_size", "patch_size", "width", "depth", "mlp_ratio", "pooler_heads")
        _require(self.pooler_queries >= 2, f"pooler_queries: must be at least 2, got {self.pooler_queries}")
        _heads(self.width, self.heads)
        _require(
            self.image_size % self.patch_size == 0,
            f"patch_size: {self.patch_size} does not divide the image size {self.image_size}",
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        return (self.image_size // self.patch_size,) * 2

    @property
    def num_patches(self) -> int:
        """P."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_values(self) -> int:
        """Values of one patch: p * p * 3."""
        return self.patch_size**2 * 3


@dataclass(frozen=True)
class TextConfig(Strict):
    """Causal text encoder; `context_length` is T, the [CLS] not counted.

    Attributes:
        cls_place: where [CLS] stands; see `sycoca.text`.
    """

    context_length: int
    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    pad_id: int = 0
    sot_id: int = 1
    eot_id: int = 2
    cls_place: Literal["behind_caption", "last", "last_shifted"] = "behind_caption"

    def __post_init__(self) -> None:
        _positive(self, "width", "depth", "mlp_ratio")
        _heads(self.width, self.heads)
        _require(self.context_length >= 2, f"context_length: at least [SOT] and [EOT], got {self.context_length}")
        special = (self.pad_id, self.sot_id, self.eot_id)
        _require(len(set(special)) == 3, f"pad_id, sot_id, eot_id: must differ, got {special}")
        for name in ("pad_id", "sot_id", "eot_id"):
            value = getattr(self, name)
            _require(0 <= value < self.vocab_size, f"{name}: {value} is outside the vocabulary of {self.vocab_size}")


@dataclass(frozen=True)
class CaptionDecoderConfig(Strict):
    """Captioning decoder, as wide as the text encoder."""

    depth: int
    heads: int
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        _positive(self, "depth", "heads", "mlp_ratio")


@dataclass(frozen=True)
class ImageDecoderConfig(Strict):
    """Image decoder of TG-MIM."""

    depth: int
    width: int
    heads: int
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        _positive(self, "depth", "width", "mlp_ratio")
        _heads(self.width, self.heads)


@dataclass(frozen=True)
class MaskingConfig(Strict):
    """Which patches are masked for TG-MIM and which are dropped for captioning.

    Attributes:
        score_space: where the cosine of patches and tokens is taken.
        mask_ratio: r_h, share of the patches that TG-MIM masks, 0..1.
        drop_ratio: r_l, share of the patches that captioning does not see, 0..1 (1 excluded).
        ic_mask_prob: share of the attentive steps on which captioning is masked, 0..1.
        attentive_start: share of the steps before which masks are random and captioning sees all, 0..1.
        block: side in patches of the squares that are selected together.
        masked_input: `token` replaces masked patches by a learnable token before the encoder (SimMIM),
            `drop` leaves them out of the encoder and puts the token into the decoder (MAE).
        local_dim: width of the two heads of the space `local`.
        local_group: pairs that are contrasted token by token with one another.
    """

    score_space: Literal["itc", "value", "local"] = "itc"
    mask_ratio: float = 0.5
    drop_ratio: float = 0.5
    ic_mask_prob: float = 1.0
    attentive_start: float = 0.0
    block: int = 1
    masked_input: Literal["token", "drop"] = "token"
    local_dim: int = 64
    local_group: int = 32

    def __post_init__(self) -> None:
        for name in ("mask_ratio", "drop_ratio", "ic_mask_prob", "attentive_start"):
            _require(0 <= getattr(self, name) <= 1, f"{name}: must lie in 0..1, got {getattr(self, name)}")
        _require(self.drop_ratio < 1, "drop_ratio: 1 would leave captioning without a patch")
        _positive(self, "block", "local_dim", "local_group")


@dataclass(frozen=True)
class LossConfig(Strict):
    """Weights and forms of the losses.

    Attributes:
        local_weight: weight of the token-wise contrastive term; None means 1 while patches are selected
            in the space `local`, else 0. Given explicitly it keeps the term without masks.
        tgmim_kind: error of `kernels.masked_patch_loss`.
        label_smoothing: of the contrastive loss, 0..1.
        caption_label_smoothing: of the captioning loss, 0..1.
    """

    itc_weight: float = 1.0
    caption_weight: float = 2.0
    tgmim_weight: float = 1.0
    local_weight: float | None = None
    tgmim_kind: Literal["l1", "mse", "mse_normalised"] = "l1"
    label_smoothing: float = 0.0
    caption_label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("itc_weight", "caption_weight", "tgmim_weight", "local_weight"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < math.inf, f"{name}: must be at least 0, got {value}")
        for name in ("label_smoothing", "caption_label_smoothing"):
            _require(0 <= getattr(self, name) < 1, f"{name}: must lie in 0..1, got {getattr(self, name)}")


@dataclass(frozen=True)
class ModelConfig(Strict):
    """A whole model. `logit_scale_init` and `logit_scale_max` are the scale itself, not its logarithm.

    `gradient_checkpointing` computes whole blocks again in backward, `selective_checkpointing` all but their matrix
    products and attention.
    """

    embed_dim: int
    vision: VisionConfig
    text: TextConfig
    caption_decoder: CaptionDecoderConfig
    image_decoder: ImageDecoderConfig
    masking: MaskingConfig = MaskingConfig()
    loss: LossConfig = LossConfig()
    objectives: tuple[str, ...] = OBJECTIVES
    logit_scale_init: float = 1 / 0.07
    logit_scale_max: float = 100.0
    gradient_checkpointing: bool = False
    selective_checkpointing: bool = False

    def __post_init__(self) -> None:
        _positive(self, "embed_dim", "logit_scale_init", "logit_scale_max")
        _heads(self.text.width, self.caption_decoder.heads)
        if self.vision.pooler != "cls":
            _heads(self.embed_dim, self.vision.pooler_heads)
        _require(len(self.objectives) > 0, f"objectives: name at least one of {', '.join(OBJECTIVES)}")
        for name in self.objectives:
            known = ", ".join(OBJECTIVES)
            _require(name in OBJECTIVES, f"objectives: '{name}' is none of {known}{nearest(name, OBJECTIVES)}")
        _require(len(set(self.objectives)) == len(self.objectives), "objectives: each may be named once")
        rows, cols = self.vision.grid
        block = self.masking.block
        _require(
            rows % block == 0 and cols % block == 0,
            f"masking.block: {block} does not divide the grid of {rows} x {cols} patches",
        )
        space = self.masking.score_space
        if self.selects and self.masking.attentive_start < 1:
            if space == "local":
                _require(self.local_weight > 0, "loss.local_weight: 0 leaves the heads of the space 'local' untrained")
            else:
                pooled = f"masking.score_space: '{space}' compares what vision.pooler '{self.vision.pooler}' has mixed"
                _require(self.vision.pooler == "cls", f"{pooled}; 'local' compares patches")
                reason = f"masking.score_space: '{space}' is trained by the objective 'itc', which is off"
                _require(self.learns("itc"), reason)

    def learns(self, objective: str) -> bool:
        """Whether an objective is named and weighs more than nothing."""
        weight = {"itc": "itc_weight", "ic": "caption_weight", "tgmim": "tgmim_weight"}[objective]
        return objective in self.objectives and getattr(self.loss, weight) > 0

    @property
    def memory_width(self) -> int:
        """Width of what captioning attends to, and of the image before its projection."""
        return self.vision.width if self.vision.pooler == "cls" else self.embed_dim

    @property
    def num_masked(self) -> int:
        """Patches that TG-MIM masks, whole blocks."""
        return self._whole_blocks(self.masking.mask_ratio) if self.learns("tgmim") else 0

    @property
    def num_dropped(self) -> int:
        """Patches that captioning does not see, whole blocks."""
        return self._whole_blocks(self.masking.drop_ratio) if self.learns("ic") else 0

    @property
    def selects(self) -> bool:
        """Whether any patch is ever selected; without it the model is CoCa."""
        return self.num_masked > 0 or self.num_dropped > 0

    @property
    def recompute(self) -> Literal["nothing", "blocks", "all but products"]:
        """What backward computes again instead of keeping it."""
        if self.selective_checkpointing:
            return "all but products"
        return "blocks" if self.gradient_checkpointing else "nothing"

    @property
    def local_weight(self) -> float:
        """Weight of the token-wise contrastive term."""
        if self.loss.local_weight is not None:
            return self.loss.local_weight
        return 1.0 if self.selects and self.masking.score_space == "local" else 0.0

    def _whole_blocks(self, ratio: float) -> int:
        area = self.masking.block**2
        return int(ratio * self.vision.num_patches) // area * area


CLIP_IDS = {"pad_id": 0, "sot_id": 49406, "eot_id": 49407}
_OURS = MaskingConfig(score_space="local", ic_mask_prob=0.5, attentive_start=0.3, masked_input="drop")

MODEL_PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        embed_dim=128,
        vision=VisionConfig(image_size=48, patch_size=8, width=96, depth=4, heads=4),
        text=TextConfig(context_length=28, vocab_size=512, width=96, depth=2, heads=4),
        caption_decoder=CaptionDecoderConfig(depth=1, heads=4),
        image_decoder=ImageDecoderConfig(depth=1, width=128, heads=4),
        masking=_OURS,
    ),
    "small": ModelConfig(
        embed_dim=256,
        vision=VisionConfig(image_size=128, patch_size=16, width=256, depth=6, heads=4),
        text=TextConfig(context_length=32, vocab_size=4096, width=256, depth=4, heads=4),
        caption_decoder=CaptionDecoderConfig(depth=3, heads=4),
        image_decoder=ImageDecoderConfig(depth=2, width=256, heads=4),
        masking=_OURS,
    ),
    "base_16": ModelConfig(
        embed_dim=512,
        vision=VisionConfig(image_size=224, patch_size=16, width=768, depth=12, heads=12),
        text=TextConfig(context_length=76, vocab_size=49408, width=512, depth=12, heads=8, **CLIP_IDS),
        caption_decoder=CaptionDecoderConfig(depth=12, heads=8),
        image_decoder=ImageDecoderConfig(depth=4, width=512, heads=8),
        masking=_OURS,
    ),
    "coca_base": ModelConfig(
        embed_dim=512,
        vision=VisionConfig(image_size=288, patch_size=18, width=768, depth=12, heads=12),
        text=TextConfig(context_length=76, vocab_size=64000, width=768, depth=12, heads=12, **CLIP_IDS),
        caption_decoder=CaptionDecoderConfig(depth=12, heads=12),
        image_decoder=ImageDecoderConfig(depth=4, width=768, heads=12),
    ),
    "large_14": ModelConfig(
        embed_dim=768,
        vision=VisionConfig(image_size=224, patch_size=14, width=1024, depth=24, heads=16),
        text=TextConfig(context_length=76, vocab_size=49408, width=768, depth=12, heads=12, **CLIP_IDS),
        caption_decoder=CaptionDecoderConfig(depth=12, heads=12),
        image_decoder=ImageDecoderConfig(depth=4, width=768, heads=12),
        masking=_OURS,
    ),
}

# Parameters of each preset, and of it without image decoder and score heads.
PRESET_PARAMETERS: dict[str, tuple[int, int]] = {
    "tiny": (1354562, 1043329),
    "small": (17511170, 15089665),
    "base_16": (271532034, 253739265),
    "coca_base": (479686093, 440336641),
    "large_14": (679782222, 640414465),
}
