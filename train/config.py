"""The configuration of a run and the presets.

Nothing here imports torch, so that a mistake is reported at once, before any process group exists.
"""

from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

from sycoca.config import MODEL_PRESETS, ConfigError, ModelConfig, nearest


class Section:
    """Base of configuration dataclasses: unknown keys are errors."""

    __pydantic_config__ = ConfigDict(extra="forbid")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class OptimizerConfig(Section):
    name: Literal["adamw"] = "adamw"
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.2


@dataclass(frozen=True)
class ScheduleConfig(Section):
    """`decay_share` (of all steps) belongs to wsd; `final_share` is the last learning rate over the peak."""

    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: int = 10_000
    decay_share: float = 0.2
    final_share: float = 0.0


@dataclass(frozen=True)
class DataConfig(Section):
    """`train` and `val` are sources as `open_dataset` takes them; without `val` the training source's own val part.

    `crop_scale` is the range of a random crop's share of the area; None crops the centre.
    """

    train: str = "scenes"
    val: str | None = None
    val_pairs: int = 256
    workers: int = 4
    tokenizer: str = "clip"
    crop_scale: tuple[float, float] | None = (0.9, 1.0)


@dataclass(frozen=True)
class TrainConfig(Section):
    """Exactly one of `steps` and `epochs` is set. `micro_batch` is the number of pairs a rank takes at once."""

    steps: int | None = None
    epochs: float | None = None
    micro_batch: int = 256
    accumulation: int = 1
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    seed: int = 0
    log_every: int = 10
    save_every: int = 1000
    keep_last: int = 3
    timeout_s: float = 1800.0


@dataclass(frozen=True)
class RunConfig(Section):
    preset: str
    model: ModelConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()


PRESETS: dict[str, RunConfig] = {
    "tiny": RunConfig(
        preset="tiny",
        model=MODEL_PRESETS["tiny"],
        optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.05),
        schedule=ScheduleConfig(name="wsd", warmup_steps=40, decay_share=0.3),
        data=DataConfig(workers=1, tokenizer="bpe", crop_scale=None),
        train=TrainConfig(steps=700, micro_batch=32, log_every=20, save_every=350, keep_last=2, precision="fp32"),
    ),
    "small": RunConfig(
        preset="small",
        model=MODEL_PRESETS["small"],
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1),
        schedule=ScheduleConfig(warmup_steps=200),
        data=DataConfig(workers=2, tokenizer="bpe", val_pairs=1000),
        train=TrainConfig(epochs=30, micro_batch=128),
    ),
    "base_16": RunConfig(
        preset="base_16", model=MODEL_PRESETS["base_16"], train=TrainConfig(epochs=20, micro_batch=512)
    ),
    "coca_base": RunConfig(
        preset="coca_base",
        model=MODEL_PRESETS["coca_base"],
        optimizer=OptimizerConfig(betas=(0.9, 0.999), eps=1e-8),
        train=TrainConfig(epochs=20, micro_batch=256),
    ),
    "large_14": RunConfig(
        preset="large_14", model=MODEL_PRESETS["large_14"], train=TrainConfig(epochs=20, micro_batch=128)
    ),
}


def preset(name: str | None, has_cuda: bool) -> RunConfig:
    """The preset called `name`; without a name the one that fits the hardware.

    Raises:
        ConfigError: there is none of that name.
    """
    name = name or ("small" if has_cuda else "tiny")
    require(name in PRESETS, f"--preset {name}: unknown{nearest(name, PRESETS) or '; known: ' + ', '.join(PRESETS)}")
    return PRESETS[name]
