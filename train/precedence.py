"""What a DeepSpeed JSON says of batch, precision, optimizer and schedule, against preset and command line.

global batch = micro batch x accumulation x ranks
"""

import json
from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

from sycoca.config import ConfigError
from train.config import RunConfig, TrainConfig
from train.deepspeed_json import OWNED_BY_PRESET, DeepSpeedJson

_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_AUTOCAST = {"bfloat16": "bf16", "float16": "fp16"}


class _Said(NamedTuple):
    """A value for the configuration, and the words of the file that it comes from."""

    value: Any
    words: str


def taken_over(
    ds: DeepSpeedJson, config: RunConfig, overrides: dict[str, Any], name: str, world: int
) -> dict[str, Any]:
    """What the JSON sets of the configuration.

    Args:
        ds: the JSON; what it leaves out or calls "auto" is the preset's.
        config: preset and overrides.
        overrides: full dotted key -> value of what the command line says.
        name: of the file, for messages.
        world: number of ranks.

    Returns:
        Full dotted key -> value.

    Raises:
        ConfigError: file and command line differ, or the file contradicts itself.
    """
    said = {
        **_batch(ds, config, overrides, name, world),
        **_precision(ds, name),
        **_optimizer(ds, name),
    }
    for key, (value, words) in said.items():
        if key in overrides and overrides[key] != value:
            raise ConfigError(f"{name} says {words}, but the command line says {key}={overrides[key]}")
    if "train.steps" in said and overrides.get("train.epochs") is not None:
        raise ConfigError(
            f"{name} says {said['train.steps'].words}, but the command line says "
            f"train.epochs={overrides['train.epochs']}; one of them says how long the run is"
        )
    return {key: value for key, (value, _) in said.items()}


def with_batch(train: TrainConfig, said: Collection[str], world: int) -> TrainConfig:
    """The same with global batch, micro batch and accumulation that agree.

    Args:
        train: whose global batch, where given, is solved for the accumulation, or for the micro batch where only the
            accumulation was said.
        said: full dotted keys that command line or JSON name.
        world: number of ranks.

    Raises:
        ConfigError: they cannot agree; the line names the nearest global batches that could.
    """
    micro_batch, accumulation, total = train.micro_batch, train.accumulation, train.global_batch
    if total is None:
        return replace(train, global_batch=micro_batch * accumulation * world)
    given = [key for key in ("train.micro_batch", "train.accumulation") if key in said]
    if len(given) == 2:
        known, unit = f"{micro_batch} x train.accumulation {accumulation}", micro_batch * accumulation * world
        rest = total != unit
    elif given == ["train.accumulation"]:
        known, unit = f"train.accumulation {accumulation}", accumulation * world
        micro_batch, rest = divmod(total, unit)
    else:
        known, unit = f"train.micro_batch {micro_batch}", micro_batch * world
        accumulation, rest = divmod(total, unit)
    if rest or min(micro_batch, accumulation) < 1:
        if len(given) == 2:
            raise ConfigError(f"train.global_batch {total} is not train.micro_batch {known} x {world} rank(s), {unit}")
        near = sorted({max(1, total // unit) * unit, -(-total // unit) * unit})
        raise ConfigError(
            f"train.global_batch {total} is no multiple of {known} x {world} rank(s); near: {', '.join(map(str, near))}"
        )
    return replace(train, micro_batch=micro_batch, accumulation=accumulation)


def _is_given(value: Any) -> bool:
    return value not in (None, "auto")


def _words(key: str, value: Any) -> str:
    return f"{key}: {json.dumps(value)}"


def _batch(ds: DeepSpeedJson, config: RunConfig, overrides: dict[str, Any], name: str, world: int) -> dict[str, _Said]:
    """`train_batch_size` = micro batch x accumulation x ranks, solved for what neither file nor command line says."""
    parts = {
        "train.micro_batch": "train_micro_batch_size_per_gpu",
        "train.accumulation": "gradient_accumulation_steps",
    }
    for json_key in ("train_batch_size", *parts.values()):
        value = getattr(ds, json_key)
        if _is_given(value) and value < 1:
            raise ConfigError(f"{name}: {json_key} is {value}, needs at least 1")
    said = {
        key: _Said(value, _words(json_key, value))
        for key, json_key in parts.items()
        if _is_given(value := getattr(ds, json_key))
    }
    total = ds.train_batch_size
    if not _is_given(total):
        return said
    known = {key: f"{key}={overrides[key]}" for key in parts if key in overrides}
    known |= {key: words for key, (_, words) in said.items()}
    factors = {key: said[key].value if key in said else overrides[key] for key in known}
    if not factors:
        factors = {"train.accumulation": config.train.accumulation}
        known = {key: f"{key} {value} of the preset" for key, value in factors.items()}
    product = world
    for factor in factors.values():
        product *= factor
    unknown = [key for key in parts if key not in factors]
    if total % product or (not unknown and product != total):
        relation = "is no multiple of" if unknown else "is not the product of"
        raise ConfigError(
            f"{name} says {_words('train_batch_size', total)}, which {relation} "
            f"{', '.join(known[key] for key in factors)} and {world} rank(s)"
        )
    words = _words("train_batch_size", total)
    said["train.global_batch"] = _Said(total, words)
    return said | {key: _Said(total // product, words) for key in unknown}


def _precision(ds: DeepSpeedJson, name: str) -> dict[str, _Said]:
    sections = {key: getattr(ds, key) for key in ("fp16", "bf16", "torch_autocast")}
    given = {key: section.enabled for key, section in sections.items() if section is not None}
    on = [key for key, enabled in given.items() if enabled is True]
    if len(on) > 1:
        raise ConfigError(f"{name}: {on[0]}.enabled and {on[1]}.enabled are both true")
    if on == ["torch_autocast"]:
        dtype = ds.torch_autocast.dtype
        return {"train.precision": _Said(_AUTOCAST[dtype], _words("torch_autocast.dtype", dtype))}
    if on:
        return {"train.precision": _Said(on[0], _words(f"{on[0]}.enabled", True))}
    off = [key for key, enabled in given.items() if enabled is False]
    return {"train.precision": _Said("fp32", _words(f"{off[0]}.enabled", False))} if off else {}


def _optimizer(ds: DeepSpeedJson, name: str) -> dict[str, _Said]:
    said: dict[str, _Said] = {}

    def say(key: str, json_key: str, value: Any) -> None:
        if _is_given(value):
            plain = list(value) if isinstance(value, tuple) else value
            said[key] = _Said(plain, _words(json_key, plain))

    if ds.optimizer is not None:
        if _is_given(ds.optimizer.type):
            say("optimizer.name", "optimizer.type", ds.optimizer.type.lower())
        for field in ("lr", "betas", "eps", "weight_decay"):
            say(f"optimizer.{field}", f"optimizer.params.{field}", getattr(ds.optimizer.params, field))
    if ds.scheduler is None:
        return said
    params = ds.scheduler.params
    if ds.scheduler.type in _SCHEDULES:
        words = _words("scheduler.type", ds.scheduler.type)
        said["schedule.name"] = _Said(_SCHEDULES[ds.scheduler.type], words)
    say("schedule.warmup_steps", "scheduler.params.warmup_num_steps", params.warmup_num_steps)
    say("schedule.final_share", "scheduler.params.cos_min_ratio", params.cos_min_ratio)
    say("train.steps", "scheduler.params.total_num_steps", params.total_num_steps)
    lr = params.warmup_max_lr
    if _is_given(lr) and "optimizer.lr" in said and said["optimizer.lr"].value != lr:
        raise ConfigError(
            f"{name} says {said['optimizer.lr'].words} and {_words('scheduler.params.warmup_max_lr', lr)}; they differ"
        )
    say("optimizer.lr", "scheduler.params.warmup_max_lr", lr)
    return said


def settle(config: Any, overrides: dict[str, Any], has_cuda: bool) -> Any:
    """The configuration with its precision chosen and one length of the run."""
    train = config.train
    if train.precision == "auto":
        train = replace(train, precision="bf16" if has_cuda else "fp32")
    if train.steps is not None and train.epochs is not None:
        if "train.epochs" in overrides and "train.steps" in overrides:
            raise ConfigError("train.steps and train.epochs are both given; one of them says how long the run is")
        train = replace(train, steps=None) if "train.epochs" in overrides else replace(train, epochs=None)
    if train.steps is None and train.epochs is None:
        raise ConfigError("train.steps and train.epochs are both none; one of them says how long the run is")
    return replace(config, train=train)


def deepspeed_dict(raw: dict, ds: DeepSpeedJson, config: Any, world: int) -> dict[str, Any]:
    """What DeepSpeed is given: the file's own keys, and batch and precision as they were settled."""
    result = {key: value for key, value in raw.items() if key not in OWNED_BY_PRESET}
    train = config.train
    result["train_micro_batch_size_per_gpu"] = train.micro_batch
    result["gradient_accumulation_steps"] = train.accumulation
    result["train_batch_size"] = train.micro_batch * train.accumulation * world
    result.setdefault("gradient_clipping", ds.gradient_clipping)
    if ds.offloads:
        # The optimizer is ours, torch's on the host: DeepSpeed's own would be compiled at the first start.
        result["zero_force_ds_cpu_optimizer"] = False
    if config.optimizer.name == "muon":
        # DeepSpeed asks before it runs an optimizer that it does not know under ZeRO.
        result["zero_allow_untested_optimizer"] = True
    section = next(
        (name for name in ("fp16", "bf16") if (s := getattr(ds, name)) is not None and s.enabled is True), None
    )
    if section is not None:
        result[section] = raw[section]
    elif train.precision != "fp32":
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[train.precision]
        given = raw.get("torch_autocast", {})
        result["torch_autocast"] = {**given, "enabled": True, "dtype": dtype}
    return result
