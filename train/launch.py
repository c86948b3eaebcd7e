"""The command line of a run: a preset, typed `key=value` overrides, and what a DeepSpeed JSON adds.

Who owns what: the JSON's batch, precision, optimizer and schedule win over the preset; against an explicit override
that differs they are an error; "auto" leaves the preset's. Nothing here imports torch.
"""

import argparse
import difflib
import importlib.util
import json
import os
import sys
import types
import typing
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sycoca.config import ConfigError, from_dict, nearest, to_dict
from train import deepspeed_json
from train.config import PRESETS, RunConfig
from train.data import DataError, open_dataset
from train.initial import check_text, started_from
from train.precedence import taken_over
from train.recipe import chosen, recipes
from train.run_folder import check_writable, checkpoint_steps, free_run_dir, read_run_config, resume_dir

# With another value of these, or of the model's, what is continued would be another run.
_FIXED = frozenset(
    ["data.train", "data.val", "data.tokenizer", "train.seed", "train.micro_batch", "train.accumulation"]
)
# What has an option of its own on the command line.
_CHOSEN_APART = frozenset(["preset", "task", "model", "init"])
# The bytes and the special tokens.
_LEAST_VOCABULARY = 256 + 3


@dataclass(frozen=True)
class Launch:
    """What the command line and the files it names ask for, checked."""

    config: RunConfig
    deepspeed: dict[str, Any]
    run_dir: Path
    resume: bool
    reshape: bool = False
    trusted: bool = False
    notes: tuple[str, ...] = ()


class Parser(argparse.ArgumentParser):
    """Mistakes are a ConfigError: told once, by one rank, in one line."""

    def error(self, message: str) -> typing.NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
        if not message.startswith("unrecognized arguments: "):
            raise ConfigError(message)
        raise ConfigError(f"{unknown}: unknown option{nearest(unknown, self._option_string_actions)}")


def parser(prog: str) -> argparse.ArgumentParser:
    p = Parser(
        prog=prog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Pre-trains SyCoCa or CoCa under DeepSpeed ZeRO.",
        epilog="examples:\n"
        "  deepspeed train/pretrain.py --config ds_zero2.json\n"
        "  deepspeed train/pretrain.py --config ds_zero2.json --preset small --data captions.tsv train.epochs=10\n"
        "  deepspeed train/pretrain.py --config ds_zero2.json --resume --run-dir runs/tiny\n",
    )
    p.add_argument(
        "--config", required=True, metavar="JSON", help="DeepSpeed JSON, looked up as given, then beside this script"
    )
    p.add_argument(
        "--preset",
        help=f"one of {', '.join([*PRESETS, *recipes()])}, or the .toml of a recipe; "
        "without it the one that fits the hardware",
    )
    p.add_argument(
        "--data", help="training source: scenes, a table, COCO, tar shards, a mixture (docs/guides/own_data.md)"
    )
    p.add_argument(
        "--init",
        metavar="MODEL",
        help="start from this model: its folder, that of a run or of open_clip's CoCa, or a name on the hub",
    )
    p.add_argument("--run-dir", type=Path, help="folder of the run; without it a free one under runs/")
    p.add_argument("--resume", action="store_true", help="continue --run-dir, or else the newest run")
    p.add_argument("--reshape", action="store_true", help="with --resume: on another number of ranks or ZeRO stage")
    p.add_argument(
        "--trust-checkpoint", action="store_true", help="with --resume: read objects of any class, which may run code"
    )
    p.add_argument("--print-config", action="store_true", help="print the effective configuration and stop")
    p.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    p.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, such as train.steps=100 or lr=1e-3")
    return p


def parse(argv: list[str], *, script: Path, has_cuda: bool) -> Launch:
    """Reads command line, DeepSpeed JSON and preset into one checked configuration.

    Args:
        argv: arguments behind the script's name.
        script: the script; JSON files are also looked up beside it.
        has_cuda: whether a CUDA device is at hand; chooses the default preset and precision.

    Returns:
        The launch, with every "auto" resolved.

    Raises:
        ConfigError: one line naming the key or path and the nearest right one.
    """
    args = parser(script.name).parse_intermixed_args(argv)
    for option, given in (("--reshape", args.reshape), ("--trust-checkpoint", args.trust_checkpoint)):
        if given and not args.resume:
            raise ConfigError(f"{option} says how to resume; add --resume")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    ds_path = deepspeed_json.find(args.config, script.parent)
    ds_raw, ds = deepspeed_json.read(ds_path)
    run_dir = resume_dir(args.run_dir) if args.resume else None
    if run_dir is None:
        config = chosen(args.preset, has_cuda)
    else:
        config, batch, stage = read_run_config(run_dir)
        if args.reshape:
            config = _reshaped(config, batch, world)
        check_world(config, batch, world)
        if (asked := ds.zero_optimization.stage) != stage and not args.reshape:
            raise ConfigError(
                f"--resume: the run has ZeRO stage {stage}, {ds_path.name} asks for stage {asked}; add --reshape"
            )
    before = config
    if args.resume and args.preset not in (None, config.preset):
        raise ConfigError(f"--preset {args.preset} differs from the resumed run's, {config.preset}")
    overrides = split_overrides(args.overrides, config)
    if args.data is not None:
        if overrides.get("data.train", args.data) != args.data:
            raise ConfigError(f"--data {args.data} and data.train={overrides['data.train']} differ")
        overrides["data.train"] = args.data
    init = args.init or config.init
    if args.resume and init != config.init:
        raise ConfigError(f"--resume: the run started from {config.init or 'fresh weights'}, not from --init {init}")
    if init is not None and not args.resume:
        config = started_from(config, init)
    config = apply_overrides(config, overrides)
    if init is not None and not args.resume:
        check_text(config.model, init)
    config = apply_overrides(config, taken_over(ds, config, overrides, ds_path.name, world))
    config = settle(config, overrides, has_cuda)
    if run_dir is None:
        run_dir, newest = free_run_dir(args.run_dir, config.preset), 0
    else:
        newest = checkpoint_steps(run_dir)[-1]
        _check_resumed(before, config, newest)
    launch = Launch(
        config,
        deepspeed_dict(ds_raw, ds, config, world),
        run_dir,
        args.resume,
        args.reshape,
        args.trust_checkpoint,
        _notes(config),
    )
    _check_sources(config, world, newest)
    _check_tokenizer(config)
    if config.train.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"train.wandb={config.train.wandb}: Weights & Biases is not installed: pip install wandb")
    check_writable(run_dir)
    if args.print_config:
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(effective(launch), indent=2))
        sys.exit(0)
    return launch


def check_world(config: Any, batch: int, world: int) -> None:
    train = config.train
    asked = train.micro_batch * train.accumulation * world
    if batch != asked:
        ranks = batch // (train.micro_batch * train.accumulation)
        raise ConfigError(
            f"--resume: the run has train_batch_size {batch} on {ranks} rank(s), {world} rank(s) would make it {asked}"
            "; add --reshape"
        )


def _reshaped(config: RunConfig, batch: int, world: int) -> RunConfig:
    """The configuration of the same run, its global batch shared by another number of ranks."""
    parts = config.train.accumulation
    micro_batch, rest = divmod(batch, parts * world)
    if rest or not micro_batch:
        raise ConfigError(f"--reshape: {world} rank(s) cannot share a train_batch_size of {batch} in {parts} part(s)")
    return replace(config, train=replace(config.train, micro_batch=micro_batch))


def _check_resumed(before: RunConfig, after: RunConfig, newest: int) -> None:
    old = leaves(before)
    for key, value in leaves(after).items():
        if value != old[key] and (key.startswith("model.") or key in _FIXED):
            raise ConfigError(f"--resume: {key} is {old[key]} in the run and cannot become {value}")
    if after.train.steps is not None and after.train.steps < newest:
        raise ConfigError(
            f"--resume: train.steps was {before.train.steps}, cannot become {after.train.steps}: "
            f"the newest checkpoint is of step {newest}"
        )


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of every field that is not itself a group of fields."""
    result = {}
    for field in fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name
        result.update(leaves(value, name + ".") if is_dataclass(value) else {name: value})
    return result


def split_overrides(texts: list[str], config: Any) -> dict[str, Any]:
    """Full dotted key -> value of the overrides of a command line; each key may be given once."""
    result: dict[str, Any] = {}
    for text in texts:
        key, value = split_override(text, config)
        if key in result:
            raise ConfigError(f"{key} is given twice, as {result[key]} and as {value}")
        result[key] = value
    return result


def split_override(text: str, config: Any) -> tuple[str, Any]:
    """`key=value` -> (full dotted key, value). A key may be shortened to any ending that only one field has."""
    key, equals, value = text.partition("=")
    known = [name for name in leaves(config) if name not in _CHOSEN_APART]
    if not equals:
        raise ConfigError(f"{text!r} is not of the form key=value{nearest(text, known)}")
    full = [name for name in known if name == key] or [name for name in known if name.endswith("." + key)]
    if len(full) > 1:
        raise ConfigError(f"{key} is ambiguous: {', '.join(full)}")
    if not full:
        endings = {ending: name for name in known for ending in (name, name.rpartition(".")[2])}
        close = difflib.get_close_matches(key, endings, 1, 0.4)
        raise ConfigError(f"{key}: unknown key" + (f"; did you mean '{endings[close[0]]}'?" if close else ""))
    return full[0], _value(value, _annotation(config, full[0]))


def _annotation(config: Any, name: str) -> Any:
    head, _, rest = name.partition(".")
    if rest:
        return _annotation(getattr(config, head), rest)
    return typing.get_type_hints(type(config))[head]


def _value(text: str, annotation: Any) -> Any:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    if any(typing.get_origin(option) is tuple for option in options):
        items = text.strip("[]()").split(",") if text.strip("[]()") else []
        element = next(typing.get_args(option)[0] for option in options if typing.get_origin(option) is tuple)
        return [_value(item.strip(), element) for item in items]
    if str in options or any(typing.get_origin(option) is Literal for option in options):
        return text
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text


def apply_overrides(config: Any, overrides: dict[str, Any]) -> Any:
    """The configuration with dotted keys replaced; types are checked."""
    data = to_dict(config)
    for name, value in overrides.items():
        *groups, leaf = name.split(".")
        group = data
        for part in groups:
            group = group[part]
        group[leaf] = value
    return from_dict(type(config), data)


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


def deepspeed_dict(raw: dict, ds: deepspeed_json.DeepSpeedJson, config: Any, world: int) -> dict[str, Any]:
    """What DeepSpeed is given: the file's own keys, and batch and precision as they were settled."""
    result = {key: value for key, value in raw.items() if key not in deepspeed_json.OWNED_BY_PRESET}
    train = config.train
    result["train_micro_batch_size_per_gpu"] = train.micro_batch
    result["gradient_accumulation_steps"] = train.accumulation
    result["train_batch_size"] = train.micro_batch * train.accumulation * world
    result.setdefault("gradient_clipping", ds.gradient_clipping)
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


def _notes(config: RunConfig) -> tuple[str, ...]:
    k = config.train.accumulation
    if k == 1:
        return ()
    return (f"gradient_accumulation_steps {k}: {k} separate contrastive batches, their losses averaged",)


def effective(launch: Launch) -> dict[str, Any]:
    """The effective configuration as plain data, as it is printed and written into the run's folder."""
    return {"run": to_dict(launch.config), "deepspeed": launch.deepspeed}


def _check_sources(config: RunConfig, world: int, newest: int) -> None:
    data, train, size = config.data, config.train, config.model.vision.image_size
    apart = data.val is not None
    try:
        samples = len(open_dataset(data.train, "train", image_size=size, whole=apart))
        held_out = len(open_dataset(data.val or data.train, "val", image_size=size, whole=apart))
    except DataError as error:
        raise ConfigError(str(error)) from None
    batches = samples // (train.micro_batch * world)
    if batches == 0:
        raise ConfigError(
            f"data.train={data.train}: {samples} samples do not fill a batch of train.micro_batch "
            f"{train.micro_batch} x {world} rank(s)"
        )
    if held_out < 2:
        raise ConfigError(f"data.{'val' if apart else 'train'}={data.val or data.train}: {held_out} held out, needs 2")
    if train.epochs is not None and (steps := int(train.epochs * (batches // train.accumulation))) < newest:
        raise ConfigError(
            f"--resume: train.epochs {train.epochs} end at step {steps}, the newest checkpoint is of step {newest}"
        )


def _check_tokenizer(config: RunConfig) -> None:
    name = config.data.tokenizer
    if name == "bpe":
        if (rows := config.model.text.vocab_size) < _LEAST_VOCABULARY:
            raise ConfigError(f"model.text.vocab_size is {rows}, data.tokenizer=bpe needs at least {_LEAST_VOCABULARY}")
    elif name == "clip":
        if importlib.util.find_spec("open_clip") is None:
            raise ConfigError(
                f'data.tokenizer=clip (preset {config.preset}) needs CLIP\'s vocabulary: pip install "sycoca[openclip]"'
            )
    else:
        try:
            json.loads(Path(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"data.tokenizer={name}: no such file; known: bpe, clip, or a tokenizer.json") from None
        except OSError as error:
            raise ConfigError(f"data.tokenizer={name}: {error.strerror}") from None
        except ValueError:
            raise ConfigError(f"data.tokenizer={name}: not a JSON file") from None
