"""Configuration of the models: frozen dataclasses, and the presets."""

from dataclasses import dataclass, field
from typing import Any, Literal

from sycoca.backbone_config import BertConfig, SwinConfig
from sycoca.checked import ConfigError, Strict, from_dict, known_keys, nearest, require, to_dict
from sycoca.loss_config import LossConfig
from sycoca.stem import check_stem

__all__ = [
    "BertConfig",
    "CLIP_IDS",
    "CaptionDecoderConfig",
    "ConfigError",
    "ImageDecoderConfig",
    "FusionConfig",
    "LossConfig",
    "MaskingConfig",
    "ModelConfig",
    "OBJECTIVES",
    "SwinConfig",
    "TextConfig",
    "VisionConfig",
    "WordMaskingConfig",
    "from_dict",
    "known_keys",
    "nearest",
    "to_dict",
]
CLIP_IDS = {"pad_id": 0, "sot_id": 49406, "eot_id": 49407}
OBJECTIVES = ("itc", "ic", "tgmim", "itm", "mlm", "bbox")
_FUSED = ("itm", "mlm", "bbox")


def _positive(config: Any, *names: str) -> None:
    for name in names:
        require(getattr(config, name) > 0, f"{name}: must be positive, got {getattr(config, name)}")


def _heads(width: int, heads: int) -> None:
    require(heads > 0 and width % heads == 0, f"heads: {heads} does not divide the width {width}")


@dataclass(frozen=True)
class VisionConfig(Strict):
    """Image encoder over square images (pixels): a ViT, or a Swin.

    Attributes:
        cls_position: [CLS] has a position of its own, as in CLIP.
        pooler: what stands for the image and what captioning attends to; see `sycoca.poolers`.
        pooler_queries: of the poolers for captioning.
        pooler_heads: of every pooler, over the width of the shared space.
        region_form: how a box of an image is encoded. `local`: the last `local_depth` blocks attend within the box;
            `pooled`: the mean of the patches in it, which then stands for whole images too.
        local_depth: blocks that attend within the box.
        stem: `patch`: a linear map of each patch; `conv`: convolutions, through which a patch knows its surroundings.
        swin: stages of a Swin; patch size, width and heads are then those of the last one, depth all blocks.
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
    region_form: Literal["local", "pooled"] = "local"
    local_depth: int = 4
    stem: Literal["patch", "conv"] = "patch"
    swin: SwinConfig | None = None

    def __post_init__(self) -> None:
        _positive(self, "image_size", "patch_size", "width", "depth", "mlp_ratio", "pooler_heads", "local_depth")
        require(self.pooler_queries >= 2, f"pooler_queries: must be at least 2, got {self.pooler_queries}")
        _heads(self.width, self.heads)
        require(
            self.image_size % self.patch_size == 0,
            f"patch_size: {self.patch_size} does not divide the image size {self.image_size}",
        )
        check_stem(self)
        if self.swin is not None:
            self.swin.check(self)

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
    """Text encoder; `context_length` is T.

    Attributes:
        kind: `causal`: [SOT] words [EOT], and [CLS] behind them, which T does not count;
            `bidirectional`: [CLS] words, the id of [CLS] being `sot_id`.
        cls_place: where [CLS] stands in a causal encoder; see `sycoca.text`.
        mask_id: of [MASK], for masked words.
        sep: whether [SEP], whose id is `eot_id`, ends the words of a bidirectional encoder.
        writes: whether a bidirectional encoder and the fusion encoder have been taught to write captions.
        prompt: words that every caption has been taught to begin with, which are not part of it.
        bert: makes text and fusion encoder of BERT's layers.
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
    kind: Literal["causal", "bidirectional"] = "causal"
    mask_id: int | None = None
    sep: bool = False
    writes: bool = False
    prompt: str = ""
    bert: BertConfig | None = None

    def __post_init__(self) -> None:
        _positive(self, "width", "depth", "mlp_ratio")
        _heads(self.width, self.heads)
        require(self.context_length >= 2, f"context_length: at least [SOT] and [EOT], got {self.context_length}")
        special = (self.pad_id, self.sot_id, self.eot_id)
        require(len(set(special)) == 3, f"pad_id, sot_id, eot_id: must differ, got {special}")
        for name in ("pad_id", "sot_id", "eot_id", "mask_id"):
            value = getattr(self, name)
            inside = value is None or 0 <= value < self.vocab_size
            require(inside, f"{name}: {value} is outside the vocabulary of {self.vocab_size}")
        if self.bert is not None:
            self.bert.check(self)


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
    """Image decoder of TG-MIM; with the guide `none` it never sees the caption, which is plain MIM."""

    depth: int
    width: int
    heads: int
    mlp_ratio: float = 4.0
    guide: Literal["caption", "none"] = "caption"

    def __post_init__(self) -> None:
        _positive(self, "depth", "width", "mlp_ratio")
        _heads(self.width, self.heads)


@dataclass(frozen=True)
class FusionConfig(Strict):
    """Fusion encoder of X-VLM: text that attends to an image or a box of it, as wide as the text encoder."""

    depth: int
    heads: int
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        _positive(self, "depth", "heads", "mlp_ratio")


@dataclass(frozen=True)
class WordMaskingConfig(Strict):
    """Which words masked language modelling hides.

    Attributes:
        share: of the tokens, 0..1; at least one token of a text is hidden.
        most: tokens of a text that are hidden at most.
        ngram_prob: chance of a word to be hidden together with the next one or two, 0..1.
    """

    share: float = 0.25
    most: int = 8
    ngram_prob: float = 0.2

    def __post_init__(self) -> None:
        for name in ("share", "ngram_prob"):
            require(0 <= getattr(self, name) <= 1, f"{name}: must lie in 0..1, got {getattr(self, name)}")
        _positive(self, "most")


@dataclass(frozen=True)
class MaskingConfig(Strict):
    """Which patches are masked for TG-MIM and which are dropped for captioning.

    Attributes:
        score_space: where the cosine of patches and tokens is taken.
        mask_ratio: r_h, share of the patches that TG-MIM masks, 0..1.
        drop_ratio: r_l, share of the patches that captioning does not see, 0..1 (1 excluded).
        ic_mask_prob: share of the attentive steps on which captioning is masked, 0..1.
        attentive_start: share of the steps before which masks are random and captioning sees all, 0..1.
        tgmim_start: share of the steps before which TG-MIM is left out, and the second image pass with it, 0..1
            (1 excluded).
        block: side in patches of the squares that are selected together.
        masked_input: `token` replaces masked patches by a learnable token before the encoder (SimMIM),
            `drop` leaves them out of the encoder and puts the token into the decoder (MAE).
        local_dim: width of the two heads of the space `local`.
        local_group: pairs that are contrasted token by token with one another.
        mask_by, drop_by: what chooses the patches that TG-MIM masks and those that captioning does not see: the
            score; chance; or, as a control, the boxes of what the caption describes.
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
    mask_by: Literal["score", "random", "oracle"] = "score"
    drop_by: Literal["score", "random", "oracle"] = "score"
    tgmim_start: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mask_ratio", "drop_ratio", "ic_mask_prob", "attentive_start", "tgmim_start"):
            require(0 <= getattr(self, name) <= 1, f"{name}: must lie in 0..1, got {getattr(self, name)}")
        require(self.drop_ratio < 1, "drop_ratio: 1 would leave captioning without a patch")
        require(self.tgmim_start < 1, "tgmim_start: 1 would never train TG-MIM; loss.tgmim_weight=0 leaves it out")
        _positive(self, "block", "local_dim", "local_group")


@dataclass(frozen=True)
class ModelConfig(Strict):
    """A whole model. With `fusion` it is X-VLM's, with boxes of images beside whole ones; see `sycoca.xvlm`.

    What no objective needs is not built. `logit_scale_init` and `logit_scale_max` are the scale itself, not its
    logarithm.

    `gradient_checkpointing` computes whole blocks again in backward, `selective_checkpointing` all but their matrix
    products and attention.
    """

    embed_dim: int
    vision: VisionConfig
    text: TextConfig
    caption_decoder: CaptionDecoderConfig
    image_decoder: ImageDecoderConfig
    masking: MaskingConfig = MaskingConfig()
    loss: LossConfig = field(default_factory=LossConfig)
    fusion: FusionConfig | None = None
    words: WordMaskingConfig = WordMaskingConfig()
    objectives: tuple[str, ...] = ("itc", "ic", "tgmim")
    logit_scale_init: float = 1 / 0.07
    logit_scale_max: float = 100.0
    gradient_checkpointing: bool = False
    selective_checkpointing: bool = False

    def __post_init__(self) -> None:
        _positive(self, "embed_dim", "logit_scale_init", "logit_scale_max")
        _heads(self.text.width, self.caption_decoder.heads)
        if self.vision.pooler != "cls":
            _heads(self.embed_dim, self.vision.pooler_heads)
        require(len(self.objectives) > 0, f"objectives: name at least one of {', '.join(OBJECTIVES)}")
        for name in self.objectives:
            known = ", ".join(OBJECTIVES)
            require(name in OBJECTIVES, f"objectives: '{name}' is none of {known}{nearest(name, OBJECTIVES)}")
        require(len(set(self.objectives)) == len(self.objectives), "objectives: each may be named once")
        shown = "objectives: 'tgmim' hides patches, which the convolutions of vision.stem show to their neighbours"
        require(self.vision.stem == "patch" or self.num_masked == 0, shown)
        self._check_xvlm()
        rows, cols = self.vision.grid
        block = self.masking.block
        require(
            rows % block == 0 and cols % block == 0,
            f"masking.block: {block} does not divide the grid of {rows} x {cols} patches",
        )
        space = self.masking.score_space
        if self.scores and self.masking.attentive_start < 1:
            if space == "local":
                require(self.local_weight > 0, "loss.local_weight: 0 leaves the heads of the space 'local' untrained")
            else:
                pooled = f"masking.score_space: '{space}' compares what vision.pooler '{self.vision.pooler}' has mixed"
                require(self.vision.pooler == "cls", f"{pooled}; 'local' compares patches")
                reason = f"masking.score_space: '{space}' is trained by the objective 'itc', which is off"
                require(self.learns("itc"), reason)

    def _check_xvlm(self) -> None:
        text, vision = self.text, self.vision
        for name in self.objectives:
            if name in _FUSED:
                absent = f"objectives: '{name}' needs the fusion encoder; give fusion.depth and fusion.heads"
                require(self.fusion is not None, absent)
            elif name in ("ic", "tgmim"):
                reason = "predicts the next word" if name == "ic" else "reads the words as captioning does"
                require(text.kind == "causal", f"objectives: '{name}' {reason}, which needs text.kind 'causal'")
                whole = f"objectives: '{name}' leaves out patches, which vision.swin has no place for"
                require(vision.swin is None, whole)
        if "mlm" in self.objectives:
            reason = "'mlm' fills in words from both sides"
            require(text.kind == "bidirectional", f"objectives: {reason}, which needs text.kind 'bidirectional'")
            require(text.mask_id is not None, f"text.mask_id: {reason}, needs the id of [MASK]")
        whole = text.kind == "bidirectional" and self.fusion is not None
        require(whole or not text.writes, "text.writes: of 'bidirectional' text under model.fusion; else by 'ic'")
        if self.fusion is None:
            require(vision.region_form == "local", "vision.region_form: 'pooled' needs the model.fusion of X-VLM")
            return
        _heads(text.width, self.fusion.heads)
        pooler = f"vision.pooler: '{vision.pooler}' mixes the patches of a whole image, model.fusion has boxes of it"
        require(vision.pooler == "cls", pooler)
        deep = f"vision.local_depth: {vision.local_depth} of {vision.depth} blocks"
        require(vision.region_form == "pooled" or vision.local_depth <= vision.depth, deep)

    def learns(self, objective: str) -> bool:
        """Whether an objective is named and weighs more than nothing."""
        weights = {"ic": ("caption_weight",), "bbox": ("l1_weight", "giou_weight")}
        names = weights.get(objective, (f"{objective}_weight",))
        return objective in self.objectives and any(getattr(self.loss, name) > 0 for name in names)

    @property
    def fuses(self) -> bool:
        """Whether an objective needs the fusion encoder."""
        return self.text.writes or any(self.learns(name) for name in _FUSED)

    @property
    def writes(self) -> bool:
        """Whether captions are written: by the captioning decoder, or by the fusion encoder that was taught to."""
        return self.text.writes or self.learns("ic")

    @property
    def drops(self) -> bool:
        """Whether training draws what it leaves out."""
        swin, bert = self.vision.swin, self.text.bert
        return (swin is not None and swin.drop_path > 0) or (bert is not None and bert.dropout > 0)

    @property
    def memory_width(self) -> int:
        """Width of what captioning attends to, and of the image before its projection."""
        return self.vision.width if self.vision.pooler == "cls" else self.embed_dim

    @property
    def num_masked(self) -> int:
        """Patches that TG-MIM masks, whole blocks."""
        return self._whole_blocks(self.masking.mask_ratio) if self.learns("tgmim") else 0

    @property
    def predicts_features(self) -> bool:
        """Whether TG-MIM predicts features rather than pixels."""
        return self.num_masked > 0 and self.loss.tgmim_kind == "ema_features"

    @property
    def num_dropped(self) -> int:
        """Patches that captioning does not see, whole blocks."""
        return self._whole_blocks(self.masking.drop_ratio) if self.learns("ic") else 0

    @property
    def selects(self) -> bool:
        """Whether any patch is ever selected; without it the model is CoCa."""
        return self.num_masked > 0 or self.num_dropped > 0

    @property
    def scores(self) -> bool:
        """Whether patches are ever selected by the score."""
        return "score" in self._chosen_by

    @property
    def needs_boxes(self) -> bool:
        """Whether patches are ever selected by the boxes of what a caption describes."""
        return "oracle" in self._chosen_by

    @property
    def _chosen_by(self) -> tuple[str, ...]:
        masks = (self.masking.mask_by,) if self.num_masked > 0 else ()
        return masks + ((self.masking.drop_by,) if self.num_dropped > 0 else ())

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
        return 1.0 if self.scores and self.masking.score_space == "local" else 0.0

    def _whole_blocks(self, ratio: float) -> int:
        area = self.masking.block**2
        return int(ratio * self.vision.num_patches) // area * area
