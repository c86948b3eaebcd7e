"""The command line of a run: a preset, typed `key=value` overrides, and what a DeepSpeed JSON adds.

Who owns what: the JSON's batch, precision, optimizer and schedule win over the preset; against an explicit override
that differs they are an error; "auto" leaves the preset's. Nothing here imports torch.
"""

import argparse
import importlib.util
import json
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sycoca.backbone_config import missing_package
from sycoca.config import ConfigError, to_dict
from train import deepspeed_json
from train.backbones import check_sizes, with_backbones
from train.command_line import Parser, apply_overrides, split_overrides
from train.config import PRESETS, RunConfig, require_batch
from train.data import DataError, Source, open_dataset, readable
from train.deepspeed_json import DeepSpeedJson, ZeroOptimization
from train.initial import check_text, started_from
from train.precedence import deepspeed_dict, settle, taken_over, with_batch
from train.recipe import chosen, recipes
from train.resuming import add_restart, check_end, check_restart, check_resumed, check_world, reshaped
from train.run_folder import check_writable, checkpoint_steps, free_run_dir, read_run_config, resume_dir

# With another value of these, or of the model's, what is continued would be another run.
_FIXED = frozenset(
    ["data.train", "data.val", "data.tokenizer", "data.regions", "train.seed", "optimizer.name", "optimizer.matrix_lr"]
    + ["pretrained.vision", "pretrained.text"]
    + [f"train.{name}" for name in ("micro_batch", "accumulation", "global_batch", "region_batch")]
)
# The bytes and the special tokens.
_LEAST_VOCABULARY = 256 + 3


@dataclass(frozen=True)
class Launch:
    """What the command line and the files it names ask for, checked, the sources open."""

    config: RunConfig
    deepspeed: dict[str, Any]
    run_dir: Path
    resume: bool
    train: Source
    val: Source
    regions: Source | None = None
    reshape: bool = False
    trusted: bool = False
    restart: bool = False
    notes: tuple[str, ...] = ()

    @property
    def stage(self) -> int:
        """Of ZeRO."""
        return self.deepspeed.get("zero_optimization", {}).get("stage", 0)


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
    add_restart(p)
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
    check_restart(args)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    ds_path = deepspeed_json.find(args.config, script.parent)
    ds_raw, ds = deepspeed_json.read(ds_path)
    run_dir = resume_dir(args.run_dir) if args.resume else None
    if run_dir is None:
        config = chosen(args.preset, has_cuda)
    else:
        config, batch, stage = read_run_config(run_dir)
        if args.reshape and config.optimizer.name == "muon":
            raise ConfigError("--reshape: not for optimizer.name=muon; the run goes on as it was, or anew with --init")
        if args.reshape:
            asked = split_overrides(args.overrides, config).get("train.micro_batch")
            config = reshaped(config, batch, world, asked)
        config = replace(config, train=replace(config.train, global_batch=batch))
        check_world(config, batch, world, "; add --reshape")
        if (asked := ds.zero_optimization.stage) != stage and not args.reshape:
            raise ConfigError(
                f"--resume: the run has ZeRO stage {stage}, {ds_path.name} asks for stage {asked}; add --reshape"
            )
    before = config
    if args.resume and args.preset not in (None, config.preset):
        raise ConfigError(f"--preset {args.preset} differs from the resumed run's, {config.preset}")
    init = args.init or config.init
    if args.resume and init != config.init:
        raise ConfigError(f"--resume: the run started from {config.init or 'fresh weights'}, not from --init {init}")
    if init is not None and not args.resume:
        config = started_from(config, init)
    if not args.resume:
        config = with_backbones(config, args.overrides)
    overrides = split_overrides(args.overrides, config)
    if args.data is not None:
        if overrides.get("data.train", args.data) != args.data:
            raise ConfigError(f"--data {args.data} and data.train={overrides['data.train']} differ")
        overrides["data.train"] = args.data
    config = apply_overrides(config, overrides)
    if init is not None and not args.resume:
        check_text(config.model, init)
    if config.pretrained.any and not args.resume:
        check_sizes(config)
    if line := missing_package(config.model):
        raise ConfigError(line)
    taken = taken_over(ds, config, overrides, ds_path.name, world)
    config = settle(apply_overrides(config, taken), overrides, has_cuda)
    if run_dir is None:
        run_dir, newest = free_run_dir(args.run_dir, config.preset, restart=args.restart), 0
    else:
        newest = checkpoint_steps(run_dir)[-1]
        check_resumed(before, config, lambda key: key.startswith("model.") or key in _FIXED)
    config = replace(config, train=with_batch(config.train, {*overrides, *taken}, world))
    _check_groups(config, world)
    _check_options(config, ds)
    train, val = _open(config, world)
    regions = _open_regions(config, train)
    config, spared = _without_colours(config, [train, regions], asked="data.randaugment" in overrides)
    _check_boxes(config, train)
    check_end(config, config.train.total_steps(len(train), world), newest)
    _check_tokenizer(config)
    launch = Launch(
        config,
        deepspeed_dict(ds_raw, ds, config, world),
        run_dir,
        args.resume,
        train,
        val,
        regions,
        args.reshape,
        args.trust_checkpoint,
        args.restart,
        (*_notes(config), *spared),
    )
    if config.train.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"train.wandb={config.train.wandb}: Weights & Biases is not installed: pip install wandb")
    check_writable(run_dir)
    if args.print_config:
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(effective(launch), indent=2))
        sys.exit(0)
    return launch


def _notes(config: RunConfig) -> tuple[str, ...]:
    train, notes = config.train, []
    if train.accumulation > 1:
        what = "contrasted as one batch: encoders run twice" if config.model.learns("itc") else "one gradient step"
        notes.append(f"{train.global_batch} pairs in {train.accumulation} micro batches a rank, {what}")
    if train.freeze:
        notes.append(f"frozen: {', '.join(train.freeze)}")
    return tuple(notes)


def effective(launch: Launch) -> dict[str, Any]:
    """The effective configuration as plain data, as it is printed and written into the run's folder."""
    return {"run": to_dict(launch.config), "deepspeed": launch.deepspeed}


def _check_groups(config: RunConfig, world: int) -> None:
    size, train = config.model.masking.local_group, config.train
    if config.model.fusion is not None and train.accumulation > 1:
        raise ConfigError(f"train.accumulation: {train.accumulation}, but X-VLM takes its batch at once")
    if config.model.local_weight > 0 and world * train.accumulation > 1 and train.micro_batch % size:
        raise ConfigError(
            f"model.masking.local_group {size} does not divide train.micro_batch {train.micro_batch}: {world} rank(s) "
            f"and {train.accumulation} part(s) would contrast other groups than one process does at once; "
            f"local_group={math.gcd(size, train.micro_batch)} fits"
        )


def _check_options(config: RunConfig, ds: DeepSpeedJson) -> None:
    train, zero = config.train, ds.zero_optimization
    for name in train.freeze:
        if config.init is None and getattr(config.pretrained, name) is None:
            without = f"without --init or pretrained.{name} that encoder would stay random"
            raise ConfigError(f"train.freeze={','.join(train.freeze)}: {without}")
    if config.optimizer.name == "lamb" and zero.stage:
        reason = f"it scales the steps of whole tensors, and ZeRO stage {zero.stage} makes flat pieces"
        raise ConfigError(f"optimizer.name=lamb: {reason}")
    if config.optimizer.name == "muon":
        if ds.offloads:
            line = "not with an offloaded optimizer; optimizer.name=adamw can be offloaded"
            raise ConfigError(f"optimizer.name=muon: {line}")
        ours = ZeroOptimization()
        for name in ("round_robin_gradients", "parameter_alignment", "elastic_checkpoint", "sub_group_size"):
            if getattr(zero, name) != getattr(ours, name):
                reason = "it would lay the matrices out in another way than they are put together again"
                raise ConfigError(f"optimizer.name=muon: not with zero_optimization.{name} in the JSON; {reason}")
        if ds.bf16 is not None and ds.bf16.bf16_master_weights_and_grads:
            raise ConfigError("optimizer.name=muon: needs fp32 master weights, not bf16.bf16_master_weights_and_grads")
    if config.optimizer.name != "adamw" and train.precision == "fp16":
        raise ConfigError(f"optimizer.name={config.optimizer.name}: not tested with train.precision=fp16")
    if train.ema is None:
        return
    if zero.stage == 0 and any(section is not None and section.enabled is True for section in (ds.fp16, ds.bf16)):
        raise ConfigError(f"train.ema={train.ema}: with fp16 or bf16 weights it needs ZeRO stage 1, 2 or 3")
    if zero.offload_optimizer is not None and zero.offload_optimizer.device == "nvme":
        raise ConfigError(f"train.ema={train.ema}: DeepSpeed would not move the average to the nvme device")


def _open(config: RunConfig, world: int) -> tuple[Source, Source]:
    data, size = config.data, config.model.vision.image_size
    apart = data.val is not None
    try:
        train = open_dataset(data.train, "train", image_size=size, whole=apart)
        val = open_dataset(data.val or data.train, "val", image_size=size, whole=apart)
    except DataError as error:
        raise ConfigError(str(error)) from None
    require_batch(config.train, data.train, len(train), world)
    if len(val) < 2:
        raise ConfigError(f"data.{'val' if apart else 'train'}={data.val or data.train}: {len(val)} held out, needs 2")
    return train, val


def _open_regions(config: RunConfig, train: Source) -> Source | None:
    data = config.data
    if not config.train.region_batch or data.regions is None:
        return train if config.train.region_batch else None
    try:
        size, apart = config.model.vision.image_size, data.val is not None
        return open_dataset(data.regions, "train", image_size=size, whole=apart)
    except DataError as error:
        raise ConfigError(f"data.regions: {error}") from None


def _without_colours(
    config: RunConfig, sources: list[Source | None], *, asked: bool
) -> tuple[RunConfig, tuple[str, ...]]:
    """Leaves out RandAugment where captions name exact colours, and says so; refuses it where it was asked for."""
    exact = next((source.name for source in sources if source is not None and source.exact), None)
    if config.data.randaugment is None or exact is None:
        return config, ()
    reason = f"captions of {exact} name exact colours, which equalising changes"
    if asked:
        raise ConfigError(f"data.randaugment: {reason}; data.randaugment=none")
    data = replace(config.data, randaugment=None)
    return replace(config, data=data), (f"data.randaugment left out: {reason}",)


def _check_boxes(config: RunConfig, train: Source) -> None:
    if not config.model.needs_boxes:
        return
    data = config.data
    moving = ("crop_scale", data.crop_scale, "none"), ("flip", data.flip or None, "0")
    for key, value, wanted in (*moving, ("randaugment", data.randaugment, "none")):
        if value is not None:
            raise ConfigError(f"data.{key}: the oracle's boxes do not follow it; data.{key}={wanted}")
    if next((sample.regions for _, sample in readable(train)), None) is None:
        raise ConfigError(f"data.train={config.data.train}: the oracle of model.masking needs boxes, and it has none")


def _check_tokenizer(config: RunConfig) -> None:
    name = config.data.tokenizer
    if name == "bpe":
        if (rows := config.model.text.vocab_size) < _LEAST_VOCABULARY:
            raise ConfigError(f"model.text.vocab_size is {rows}, data.tokenizer=bpe needs at least {_LEAST_VOCABULARY}")
    elif name == "wordpiece":
        return
    elif name == "clip":
        if importlib.util.find_spec("open_clip") is None:
            raise ConfigError(
                f'data.tokenizer=clip (preset {config.preset}) needs CLIP\'s vocabulary: pip install "sycoca[openclip]"'
            )
    else:
        try:
            json.loads(Path(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            known = "bpe, wordpiece, clip, or a tokenizer.json"
            raise ConfigError(f"data.tokenizer={name}: no such file; known: {known}") from None
        except OSError as error:
            raise ConfigError(f"data.tokenizer={name}: {error.strerror}") from None
        except ValueError:
            raise ConfigError(f"data.tokenizer={name}: not a JSON file") from None
