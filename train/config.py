"""The configuration of a run and the presets.

Nothing here imports torch, so that a mistake is reported at once, before any process group exists.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import ConfigDict

from sycoca.checked import require
from sycoca.config import ModelConfig, nearest
from sycoca.presets import MODEL_PRESETS


class Section:
    """Base of configuration dataclasses: unknown keys are errors."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


def at_least(config: Any, **least: int) -> None:
    for name, bound in least.items():
        value = getattr(config, name)
        require(value is None or value >= bound, f"{name}: {value}, needs at least {bound}")


def _finite(config: Any, *names: str, zero: bool = False) -> None:
    for name in names:
        value = getattr(config, name)
        held = value is None or (0 < value < math.inf or (zero and value == 0))
        require(held, f"{name}: {value}, needs to be {'at least' if zero else 'above'} 0 and finite")


def shares(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(0 <= value <= 1, f"{name}: {value}, must lie in 0..1")


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """`lamb` scales the step of each tensor, for very large batches; it runs without ZeRO, whose shards cut tensors.

    `muon` orthogonalises the steps of the linear maps of blocks and inside of heads, whose rate is `matrix_lr` and
    which average their gradients by `matrix_momentum`; `lr` and the rest are AdamW's, which takes all other parameters.
    """

    name: Literal["adamw", "lamb", "muon"] = "adamw"
    lr: float = 5e-4
    matrix_lr: float = 0.02
    matrix_momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.2

    def __post_init__(self) -> None:
        _finite(self, "lr", "eps", "matrix_lr")
        _finite(self, "weight_decay", zero=True)
        require(
            0 <= self.matrix_momentum < 1, f"matrix_momentum: {self.matrix_momentum}, needs to be in 0..1, 1 excluded"
        )
        require(all(0 <= beta < 1 for beta in self.betas), f"betas: {self.betas}, each needs to be in 0..1, 1 excluded")


@dataclass(frozen=True)
class ScheduleConfig(Section):
    """`decay_share` (of all steps) belongs to wsd; `final_share` is the last learning rate over the peak."""

    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: int = 10_000
    decay_share: float = 0.2
    final_share: float = 0.0

    def __post_init__(self) -> None:
        at_least(self, warmup_steps=0)
        shares(self, "decay_share", "final_share")


@dataclass(frozen=True)
class DataConfig(Section):
    """`train` and `val` are sources as `open_dataset` takes them; without `val` the training source's own val part.

    `crop_scale` is the range of a random crop's share of the area; None crops the centre. `flip` is the share of
    pictures shown mirrored, which makes captions that say left and right wrong; texts with boxes are spared that.
    `randaugment` is how many of its operations are drawn for a picture, and their strength in 0..10; texts with boxes
    are spared those that move pixels. A run stops when it finds more than `max_left_out` of the training samples
    unusable.
    `tokenizer` is a file, clip, or learned from the captions: bpe, or wordpiece for a bidirectional text encoder.
    `regions` is the source of texts with boxes; None takes the training source. An image gives at most `max_regions` of
    them, its own caption, in `whole_share` of the cases, among them; `region_crop` shows it cropped about one of them.
    """

    train: str = "scenes"
    val: str | None = None
    val_pairs: int = 256
    workers: int = 4
    tokenizer: str = "clip"
    crop_scale: tuple[float, float] | None = (0.9, 1.0)
    flip: float = 0.0
    randaugment: tuple[int, float] | None = None
    max_left_out: float = 0.1
    regions: str | None = None
    max_regions: int = 5
    whole_share: float = 1.0
    region_crop: bool = True

    def __post_init__(self) -> None:
        at_least(self, val_pairs=2, workers=0, max_regions=1)
        shares(self, "flip", "max_left_out", "whole_share")
        if self.crop_scale is not None:
            low, high = self.crop_scale
            require(0 < low <= high <= 1, f"crop_scale: {self.crop_scale}, needs 0 < low <= high <= 1")
        if self.randaugment is not None:
            count, strength = self.randaugment
            fits = count >= 1 and 0 <= strength <= 10
            require(fits, f"randaugment: {count},{strength}, needs at least 1 operation of a strength in 0..10")


@dataclass(frozen=True)
class TrainConfig(Section):
    """Exactly one of `steps` and `epochs` is set. `micro_batch` is the number of pairs a rank takes at once,
    `global_batch` that of a step of all ranks, of which `accumulation` follows; a step of several micro batches encodes
    them twice, so that every pair is contrasted with all others.

    A checkpoint is written every `save_every` steps and every `save_minutes` minutes; the `keep_last` newest stay, and
    those whose step `keep_every` divides. A loss above `spike_factor` times the median of those before is told.
    Every `evaluate_every` steps the model is judged on the held-out pairs, as it is at the end.
    `compile` compiles the blocks, which takes minutes before the first step.
    `wandb` is the Weights & Biases project that gets the figures too.
    """

    steps: int | None = None
    epochs: float | None = None
    micro_batch: int = 256
    accumulation: int = 1
    global_batch: int | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    seed: int = 0
    log_every: int = 10
    save_every: int = 1000
    save_minutes: float | None = None
    keep_last: int = 3
    keep_every: int | None = None
    evaluate_every: int | None = None
    spike_factor: float | None = 2.0
    timeout_s: float = 1800.0
    compile: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        at_least(self, steps=1, micro_batch=1, accumulation=1, global_batch=1)
        at_least(self, log_every=1, save_every=1, keep_last=1, keep_every=1, evaluate_every=1)
        _finite(self, "epochs", "timeout_s", "save_minutes", "spike_factor")
        # What torch seeds with is 64 bits wide.
        require(0 <= self.seed < 2**63, f"seed: {self.seed}, needs to be in 0..2**63, 2**63 excluded")

    def total_steps(self, samples: int, world: int) -> int:
        """Optimizer steps of a run over a source of so many samples on so many ranks; 0 where they make none."""
        if self.steps is not None:
            return self.steps
        return int(self.epochs * (samples // (self.micro_batch * world) // self.accumulation))


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """What pre-training adds.

    `region_batch` is the number of texts with boxes that a rank takes beside its pairs, in the same step.
    `itc_schedule` is that of `kernels.fused_itc_loss`: `gather` holds all captions' features, `ring` those of one rank
    at a time. `freeze` names encoders that stay as they are (LiT, arXiv 2111.07991, freezes `vision`). `layer_decay` is
    the factor on the learning rate from each layer of an encoder to the one below. `ema` keeps an average of the
    weights, exported as `model_ema`; the value is its decay. The image encoder of that average is what
    `model.loss.tgmim_kind` `ema_features` predicts the features of.
    """

    region_batch: int = 0
    itc_schedule: Literal["gather", "ring"] = "gather"
    freeze: tuple[Literal["vision", "text"], ...] = ()
    layer_decay: float = 1.0
    ema: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, region_batch=0)
        require(0 < self.layer_decay <= 1, f"layer_decay: {self.layer_decay}, needs to be above 0, at most 1")
        require(self.ema is None or 0 < self.ema < 1, f"ema: {self.ema}, needs to be in 0..1, both excluded")
        require(len(set(self.freeze)) == len(self.freeze), "freeze: each may be named once")


@dataclass(frozen=True)
class PretrainedConfig(Section):
    """Encoders that others have trained, each a folder or a name on the hub: a Swin for `vision`, a BERT for `text` and
    the fusion encoder. Sizes and vocabulary are theirs.

    `anew_rate` is the factor on the learning rate of what begins anew beside them.
    """

    vision: str | None = None
    text: str | None = None
    anew_rate: float = 2.0

    def __post_init__(self) -> None:
        _finite(self, "anew_rate")
        for name in ("vision", "text"):
            require(getattr(self, name) != "", f"{name}: names a folder or a repository of the hub, not nothing")

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return self.vision is not None or self.text is not None


@dataclass(frozen=True)
class RunConfig(Section):
    """A run; `init` names the model that it starts from."""

    preset: str
    model: ModelConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    train: PretrainConfig = PretrainConfig()
    init: str | None = None
    pretrained: PretrainedConfig = PretrainedConfig()

    def __post_init__(self) -> None:
        given = "vision" if self.pretrained.vision is not None else "text"
        both = self.init is not None and self.pretrained.any
        require(not both, f"pretrained.{given}: --init {self.init} brings its own encoders")
        theirs = self.model.vision.swin is not None or self.model.text.bert is not None
        slow = "train.compile: true, but blocks of transformers (model.vision.swin, model.text.bert) are not compiled"
        require(not (theirs and self.train.compile), slow)
        taught = "model.text.writes: train/finetune.py captioning teaches it, and --init keeps it"
        require(self.init is not None or not self.model.text.writes, taught)
        boxes, asked = self.train.region_batch, self.model.learns("bbox")
        require(boxes > 0 or not asked, "train.region_batch: 0, the objective 'bbox' needs texts with boxes")
        captions = self.data.max_regions == 1 and self.data.whole_share == 1
        alone = "data.max_regions: 1 with data.whole_share 1 leaves captions alone, the objective 'bbox' needs boxes"
        require(not (asked and boxes > 0 and captions), alone)
        require(boxes == 0 or self.model.fusion is not None, f"train.region_batch: {boxes}, boxes need model.fusion")
        kinds = {"causal": ("bpe", "clip"), "bidirectional": ("wordpiece",)}
        text, name = self.model.text, self.data.tokenizer
        wrong = f"data.tokenizer: '{name}', a {text.kind} text encoder needs {kinds[text.kind][0]} or a file"
        require(name in kinds[text.kind] or name not in sum(kinds.values(), ()), wrong)
        if self.model.predicts_features:
            kind = "model.loss.tgmim_kind: 'ema_features' predicts what an image encoder of averaged weights sees"
            require(self.train.ema is not None, f"{kind}; train.ema=0.999 keeps the average")
            require("vision" not in self.train.freeze, f"{kind}; with train.freeze=vision there is none")


def require_batch(train: TrainConfig, source: str, samples: int, world: int) -> None:
    """Raises ConfigError where the training source does not fill a single batch."""
    needed = train.micro_batch * train.accumulation * world
    require(
        samples >= needed,
        f"data.train={source}: {samples} samples do not fill a batch of {needed}, train.micro_batch "
        f"{train.micro_batch} x train.accumulation {train.accumulation} x {world} rank(s)",
    )


_XVLM_BASE = RunConfig(
    preset="xvlm_base",
    model=MODEL_PRESETS["xvlm_base"],
    optimizer=OptimizerConfig(lr=1e-4, eps=1e-8, weight_decay=0.01),
    schedule=ScheduleConfig(name="linear", warmup_steps=2500),
    data=DataConfig(tokenizer="wordpiece", crop_scale=(0.2, 1.0), flip=0.5, randaugment=(2, 7)),
    train=PretrainConfig(steps=200_000, micro_batch=128, region_batch=128),
)

PRESETS: dict[str, RunConfig] = {
    "tiny": RunConfig(
        preset="tiny",
        model=MODEL_PRESETS["tiny"],
        optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.05),
        schedule=ScheduleConfig(name="wsd", warmup_steps=40, decay_share=0.3),
        data=DataConfig(workers=1, tokenizer="bpe", crop_scale=None),
        train=PretrainConfig(steps=720, micro_batch=32, log_every=20, save_every=360, keep_last=2, precision="fp32"),
    ),
    "small": RunConfig(
        preset="small",
        model=MODEL_PRESETS["small"],
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1),
        schedule=ScheduleConfig(warmup_steps=200),
        data=DataConfig(workers=2, tokenizer="bpe", val_pairs=1000),
        train=PretrainConfig(epochs=30, micro_batch=128),
    ),
    "base_16": RunConfig(
        preset="base_16", model=MODEL_PRESETS["base_16"], train=PretrainConfig(epochs=20, micro_batch=512)
    ),
    "coca_base": RunConfig(
        preset="coca_base",
        model=MODEL_PRESETS["coca_base"],
        optimizer=OptimizerConfig(betas=(0.9, 0.999), eps=1e-8),
        train=PretrainConfig(epochs=20, micro_batch=256),
    ),
    "large_14": RunConfig(
        preset="large_14", model=MODEL_PRESETS["large_14"], train=PretrainConfig(epochs=20, micro_batch=128)
    ),
    "xvlm_tiny": RunConfig(
        preset="xvlm_tiny",
        model=MODEL_PRESETS["xvlm_tiny"],
        optimizer=OptimizerConfig(name="muon", lr=1e-3, matrix_lr=0.012, weight_decay=0.05),
        schedule=ScheduleConfig(name="wsd", warmup_steps=40, decay_share=0.5),
        data=DataConfig(workers=1, tokenizer="wordpiece", crop_scale=None, whole_share=0.3, region_crop=False),
        train=PretrainConfig(
            steps=540,
            micro_batch=4,
            region_batch=80,
            log_every=20,
            save_every=270,
            keep_last=2,
            precision="fp32",
        ),
    ),
    "xvlm_base": _XVLM_BASE,
    "xvlm_swin_base": replace(_XVLM_BASE, preset="xvlm_swin_base", model=MODEL_PRESETS["xvlm_swin_base"]),
}


def preset(name: str | None, has_cuda: bool) -> RunConfig:
    """The preset called `name`; without a name the one that fits the hardware.

    Raises:
        ConfigError: there is none of that name.
    """
    name = name or ("small" if has_cuda else "tiny")
    require(name in PRESETS, f"--preset {name}: unknown{nearest(name, PRESETS) or '; known: ' + ', '.join(PRESETS)}")
    return PRESETS[name]
