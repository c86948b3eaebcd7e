"""The DeepSpeed JSON: which keys it may hold, and who owns what it says.

DeepSpeed ignores unknown top-level keys without a word and fails late on wrong types, so the file is checked here
first, without importing DeepSpeed. Keys of features that this trainer does not use are refused by name.
"""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from sycoca.config import ConfigError, from_dict, nearest
from train.config import Section, require


@dataclass(frozen=True)
class OffloadParam(Section):
    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    buffer_count: int = 5
    buffer_size: int = 100_000_000
    max_in_cpu: int = 1_000_000_000
    pin_memory: bool = False


@dataclass(frozen=True)
class OffloadOptimizer(Section):
    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    buffer_count: int = 4
    pin_memory: bool = False
    pipeline_read: bool = False
    pipeline_write: bool = False
    fast_init: bool = False
    ratio: float = 1.0
    super_offload: bool = False
    cpuadam_cores_perc: float = 0.8


@dataclass(frozen=True)
class ZeroOptimization(Section):
    stage: Literal[0, 1, 2, 3] = 0
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: int = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: int = 500_000_000
    overlap_comm: bool | None = None
    compute_grad_norm: bool = True
    load_from_fp32_weights: bool = True
    elastic_checkpoint: bool = False
    offload_param: OffloadParam | None = None
    offload_optimizer: OffloadOptimizer | None = None
    sub_group_size: int = 1_000_000_000
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_param_persistence_threshold: int = 100_000
    stage3_model_persistence_threshold: int = 9_223_372_036_854_775_807
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_max_reuse_distance: int = 1_000_000_000
    stage3_gather_16bit_weights_on_model_save: bool = False
    stage3_module_granularity_threshold: int = 0
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    ignore_unused_parameters: bool = True
    round_robin_gradients: bool = False
    parameter_alignment: bool = False
    zero_hpz_partition_size: int = 1
    zero_quantized_weights: bool = False
    zero_quantized_nontrainable_weights: bool = False
    zero_quantized_gradients: bool = False
    memory_efficient_linear: bool = True
    pipeline_loading_checkpoint: bool = False
    override_module_apply: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False


@dataclass(frozen=True)
class Fp16(Section):
    enabled: bool | Literal["auto"] = False
    auto_cast: bool = False
    loss_scale: float = 0
    initial_scale_power: int = 16
    loss_scale_window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: int = 1
    fp16_master_weights_and_grads: bool = False


@dataclass(frozen=True)
class Bf16(Section):
    enabled: bool | Literal["auto"] = False
    immediate_grad_update: bool = True
    check_grad_overflow: bool = False
    bf16_master_weights_and_grads: bool = False
    bf16_optimizer_states: bool = False


@dataclass(frozen=True)
class TorchAutocast(Section):
    enabled: bool | Literal["auto"] = False
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    lower_precision_safe_modules: tuple[str, ...] | None = None


@dataclass(frozen=True)
class OptimizerParams(Section):
    lr: float | Literal["auto"] | None = None
    betas: tuple[float, float] | Literal["auto"] | None = None
    eps: float | Literal["auto"] | None = None
    weight_decay: float | Literal["auto"] | None = None


@dataclass(frozen=True)
class Optimizer(Section):
    type: Literal["AdamW", "Lamb", "auto"]
    params: OptimizerParams = OptimizerParams()


@dataclass(frozen=True)
class SchedulerParams(Section):
    warmup_min_lr: Literal[0, "auto"] | None = None
    warmup_max_lr: float | Literal["auto"] | None = None
    warmup_num_steps: int | Literal["auto"] | None = None
    warmup_type: Literal["linear"] | None = None
    total_num_steps: int | Literal["auto"] | None = None
    cos_min_ratio: float | Literal["auto"] | None = None


@dataclass(frozen=True)
class Scheduler(Section):
    type: Literal["WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "auto"]
    params: SchedulerParams = SchedulerParams()


@dataclass(frozen=True)
class CommsLogger(Section):
    enabled: bool = False
    prof_all: bool = True
    prof_ops: tuple[str, ...] = ()
    verbose: bool = False
    debug: bool = False


@dataclass(frozen=True)
class DeepSpeedJson(Section):
    """Top-level keys of the file. Those without a default here fall back to the preset."""

    zero_optimization: ZeroOptimization = ZeroOptimization()
    gradient_clipping: float = 1.0
    train_batch_size: int | Literal["auto"] | None = None
    train_micro_batch_size_per_gpu: int | Literal["auto"] | None = None
    gradient_accumulation_steps: int | Literal["auto"] | None = None
    optimizer: Optimizer | None = None
    scheduler: Scheduler | None = None
    fp16: Fp16 | None = None
    bf16: Bf16 | None = None
    torch_autocast: TorchAutocast | None = None
    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: float = 1.0
    disable_allgather: bool = False
    comms_logger: CommsLogger | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False

    @property
    def offloads(self) -> bool:
        """Whether the optimizer's state lies on the host or beyond."""
        offload = self.zero_optimization.offload_optimizer
        return offload is not None and offload.device != "none"

    def __post_init__(self) -> None:
        clipping = self.gradient_clipping
        require(0 <= clipping < math.inf, f"gradient_clipping: {clipping}, needs to be at least 0 and finite")


# What DeepSpeed knows and this trainer has no use for: its own loaders, engines and monitors.
UNUSED = frozenset(
    [
        "activation_checkpointing",
        "aio",
        "amp",
        "autotuning",
        "checkpoint",
        "comet",
        "compile",
        "compression_training",
        "csv_monitor",
        "curriculum_learning",
        "data_efficiency",
        "data_types",
        "dataloader_drop_last",
        "datastates",
        "disable_python_gc",
        "elasticity",
        "flops_profiler",
        "gradient_allreduce_op",
        "hybrid_engine",
        "log_level",
        "managed_gradient_accumulation",
        "pipeline",
        "progressive_layer_drop",
        "quantize_training",
        "sequence_parallel_size",
        "seq_parallel_communication_data_type",
        "sparse_attention",
        "sparse_gradients",
        "steps_per_print",
        "tensor_parallel",
        "tensorboard",
        "timers",
        "use_data_before_expert_parallelism",
        "vocabulary_size",
        "wandb",
        "weight_quantization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    ]
)

OWNED_BY_PRESET = frozenset(
    [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "optimizer",
        "scheduler",
        "fp16",
        "bf16",
        "torch_autocast",
    ]
)


def find(name: str, beside: Path) -> Path:
    """The JSON file called `name`: as given, else in the folder `beside`.

    Raises:
        ConfigError: there is none.
    """
    for path in (Path(name), beside / name):
        try:
            if path.is_file():
                return path
        except OSError as error:
            raise ConfigError(f"--config {path}: {error.strerror}") from None
    known = sorted(path.name for path in beside.glob("*.json"))
    near = nearest(Path(name).name, known) or f"; known: {', '.join(known)}"
    raise ConfigError(f"--config {name}: no such file{near}")


def read(path: Path) -> tuple[dict[str, Any], DeepSpeedJson]:
    """Reads and checks a DeepSpeed JSON file.

    Args:
        path: an existing file.

    Returns:
        The file's object as it stands, and its typed form.

    Raises:
        ConfigError: not JSON, a key twice, an unknown key (the nearest right one is named) or a wrong type.
    """
    try:
        data = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_no_key_twice,
            parse_float=_number,
            parse_constant=_no_constant,
        )
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds {type(data).__name__}, needs an object")
    for key in data:
        if key in UNUSED:
            known = ", ".join(field.name for field in fields(DeepSpeedJson))
            raise ConfigError(f"{path}: {key} is DeepSpeed's, but this trainer does not use it; it takes {known}")
    try:
        return data, from_dict(DeepSpeedJson, data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ConfigError(f"key {twice} stands twice")
    return result


def _no_constant(text: str) -> None:
    raise ConfigError(f"{text} is no number of JSON")


def _number(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value  # bucket sizes are often written 5e8
