"""The command line of a fine-tuning: the same rules for DeepSpeed JSON and overrides as in pre-training.

Nothing here imports torch.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sycoca.config import ConfigError, to_dict
from train import deepspeed_json
from train.command_line import Parser, apply_overrides, split_overrides
from train.config import OptimizerConfig, ScheduleConfig, Section, TrainConfig, at_least, require_batch, shares
from train.data import Source
from train.precedence import deepspeed_dict, settle, taken_over, with_batch
from train.resuming import add_restart, check_end, check_restart, check_resumed, check_world
from train.run_folder import check_writable, checkpoint_steps, free_run_dir, read_run_config, resume_dir
from train.tasks.class_names import class_names, templates
from train.tasks.facts import model_folder, model_settings
from train.tasks.options import FINETUNED, TaskOptions, check_answering, check_meant, check_objectives, check_task
from train.tasks.sources import holds_out, open_source

# How long a run is, and how it is watched and saved, may change when it is resumed.
_WATCHED = ("log_every", "save_every", "save_minutes", "keep_last", "keep_every", "spike_factor", "timeout_s")
_LENGTH = frozenset(
    ["data.max_left_out", "data.workers", *(f"train.{name}" for name in ("steps", "epochs", *_WATCHED))]
)


@dataclass(frozen=True)
class TuningData(Section):
    """`train` and `val` as the task's sources are written; `crop_scale` is the share of the area of a random crop.

    A run stops when it finds more than `max_left_out` of the training samples unusable.
    """

    train: str = "scenes"
    val: str | None = None
    workers: int = 1
    crop_scale: tuple[float, float] | None = None
    max_left_out: float = 0.1

    def __post_init__(self) -> None:
        at_least(self, workers=0)
        shares(self, "max_left_out")


@dataclass(frozen=True)
class FinetuneConfig(Section):
    """A fine-tuning as a whole; `model` is the folder that it starts from."""

    task: str
    model: str
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    data: TuningData
    train: TrainConfig
    options: TaskOptions


@dataclass(frozen=True)
class Tuning:
    """What the command line and the files it names ask for, checked, the sources open."""

    config: FinetuneConfig
    deepspeed: dict[str, Any]
    run_dir: Path
    resume: bool
    train: Source
    val: Source
    restart: bool = False

    def effective(self) -> dict[str, Any]:
        """The effective configuration as plain data, as it is printed and written into the run's folder."""
        return {"run": to_dict(self.config), "deepspeed": self.deepspeed}


# Learning rate, steps and batch on a CPU, where models are small and fresh from scratch; on a GPU rate and epochs.
_CPU = {
    "retrieval": (1e-3, 100, 64),
    "captioning": (1e-3, 60, 32),
    "vqa": (2e-3, 50, 32),
    "grounding": (1e-3, 100, 32),
    "nlvr": (1e-3, 100, 32),
    "classification": (4e-3, 150, 32),
}
_GPU = {
    "retrieval": (1e-5, 5.0),
    "captioning": (1e-5, 5.0),
    "vqa": (2e-5, 10.0),
    "grounding": (3e-5, 10.0),
    "nlvr": (3e-5, 10.0),
    "classification": (5e-5, 20.0),
}
# Of the learning rate: rewards are noisier than labels.
_SCST_SHARE = 0.2


def defaults(task: str, model: str, has_cuda: bool) -> FinetuneConfig:
    """The configuration of a task before the command line is read."""
    if has_cuda:
        lr, epochs = _GPU[task]
        train = TrainConfig(epochs=epochs, micro_batch=128)
        data = TuningData(workers=4, crop_scale=(0.5, 1.0))
        schedule, optimizer = ScheduleConfig(warmup_steps=200), OptimizerConfig(lr=lr, weight_decay=0.05)
    else:
        lr, steps, batch = _CPU[task]
        train = TrainConfig(steps=steps, micro_batch=batch, log_every=20, save_every=1000, keep_last=1)
        data, schedule = TuningData(), ScheduleConfig(name="linear", warmup_steps=10)
        optimizer = OptimizerConfig(lr=lr, weight_decay=0.05)
    # Ranking answers costs a forward pass for each of them.
    options = TaskOptions() if has_cuda else TaskOptions(limit=24 if task == "vqa" else 500, beams=1, layer_decay=0.8)
    return FinetuneConfig(task, model, optimizer, schedule, data, train, options)


def _parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="finetune.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Fine-tunes a model for a task under DeepSpeed ZeRO, and judges it before and after.",
        epilog="examples:\n"
        "  deepspeed train/finetune.py retrieval --config ds_zero2.json --model runs/tiny --data flickr8k\n"
        "  deepspeed train/finetune.py captioning --config ds_zero2.json --data coco.json scst=true\n"
        "  deepspeed train/finetune.py vqa --config ds_zero2.json vqa=generate \\\n"
        "    --data 'vqav2:train_questions.json?annotations=train_answers.json&images=train2014' \\\n"
        "    --val 'vqav2:val_questions.json?annotations=val_answers.json&images=val2014'\n"
        "  deepspeed train/finetune.py classification --config ds_zero2.json --data train.tar --val test.tar\n",
    )
    p.add_argument("task", help=f"one of {', '.join(FINETUNED)}")
    p.add_argument("--config", required=True, metavar="JSON", help="DeepSpeed JSON, as given, then beside this script")
    p.add_argument("--model", help="folder of a model or of a run; the newest run without it")
    p.add_argument("--data", help="what is trained on, as the task's own sources are written")
    p.add_argument("--val", help="what is judged on; the training source's own val part without it")
    p.add_argument("--run-dir", type=Path, help="folder of the run; without it a free one under runs/")
    p.add_argument("--resume", action="store_true", help="continue --run-dir")
    add_restart(p)
    p.add_argument("--print-config", action="store_true", help="print the effective configuration and stop")
    p.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    p.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, such as train.steps=100 or lr=1e-5")
    return p


def parse(argv: list[str], *, script: Path, has_cuda: bool) -> Tuning:
    """Reads command line, DeepSpeed JSON and model folder into one checked configuration.

    Args:
        argv: arguments behind the script's name.
        script: the script; JSON files are also looked up beside it.
        has_cuda: whether a CUDA device is at hand.

    Returns:
        The fine-tuning, its sources open.

    Raises:
        ConfigError, DataError: one line naming the key or path and the nearest right one.
    """
    args = _parser().parse_intermixed_args(argv)
    check_task(args.task, FINETUNED, script.name)
    check_restart(args)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    ds_path = deepspeed_json.find(args.config, script.parent)
    ds_raw, ds = deepspeed_json.read(ds_path)
    if args.resume:
        if args.run_dir is None:
            raise ConfigError("--resume: name the run with --run-dir")
        run_dir = resume_dir(args.run_dir)
        config, batch, stage = read_run_config(run_dir, FinetuneConfig)
        check_world(config, batch, world)
        config = replace(config, train=replace(config.train, global_batch=batch))
        if stage != ds.zero_optimization.stage:
            raise ConfigError(f"--resume: the run has ZeRO stage {stage}, {ds_path.name} asks for another")
        if config.task != args.task:
            raise ConfigError(f"--resume: the run is of {config.task}, not of {args.task}")
    else:
        config = defaults(args.task, str(model_folder(args.model)), has_cuda)
    before = config
    overrides = split_overrides(args.overrides, config)
    check_meant(args.task, {key.removeprefix("options.") for key in overrides if key.startswith("options.")})
    for option, key in (("data", "data.train"), ("val", "data.val")):
        if (given := getattr(args, option)) is not None:
            if overrides.get(key, given) != given:
                raise ConfigError(f"--{option} {given} and {key}={overrides[key]} differ")
            overrides[key] = given
    config = apply_overrides(config, overrides)
    if config.options.scst and not args.resume and "optimizer.lr" not in overrides:
        gentler = replace(config.optimizer, lr=config.optimizer.lr * _SCST_SHARE)
        config = replace(config, optimizer=gentler)
    taken = taken_over(ds, config, overrides, ds_path.name, world)
    config = settle(apply_overrides(config, taken), overrides, has_cuda)
    if args.task == "vqa" and config.options.vqa in ("auto", "rank"):
        if config.options.vqa == "rank":
            raise ConfigError("vqa=rank needs no fine-tuning; give classify or generate")
        config = replace(config, options=replace(config.options, vqa="classify"))
    if config.options.scst and ds.zero_optimization.stage == 3:
        raise ConfigError(
            f"scst=true writes captions while it trains, which ZeRO stage 3 ({ds_path.name}) does not allow"
        )
    newest = 0
    if args.resume:
        check_resumed(before, config, lambda key: key not in _LENGTH)
        newest = checkpoint_steps(run_dir)[-1]
    else:
        name = f"{args.task}{'-scst' if config.options.scst else ''}"
        run_dir = free_run_dir(args.run_dir, name, restart=args.restart)
    if config.optimizer.name != "adamw":
        raise ConfigError(f"optimizer.name={config.optimizer.name}: fine-tuning takes adamw")
    config = replace(config, train=with_batch(config.train, {*overrides, *taken}, world))
    train, val = _open(config, world)
    check_end(config, config.train.total_steps(len(train), world), newest)
    check_writable(run_dir)
    tuning = Tuning(config, deepspeed_dict(ds_raw, ds, config, world), run_dir, args.resume, train, val, args.restart)
    if args.print_config:
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(tuning.effective(), indent=2))
        sys.exit(0)
    return tuning


def _open(config: FinetuneConfig, world: int) -> tuple[Source, Source]:
    data, options = config.data, config.options
    settings = model_settings(Path(config.model))
    check_objectives(config.task, settings, config.model, teaches=True)
    if config.task == "vqa":
        check_answering(config.options.vqa, settings["learned"], config.model)
    if config.task == "grounding" and "bbox" not in settings["objectives"]:
        raise ConfigError(
            f"--model {config.model}: fine-tuning regresses boxes, which needs a model trained with 'bbox'; "
            "by 'itm' alone grounding is judged as it is"
        )
    classes = class_names(options.classes)
    if options.templates is not None:
        templates(options.templates, classes or ())
    if options.meteor or options.spice:
        from train.tasks.coco_java import require_java

        require_java(spice=options.spice)
    if data.val is None and not holds_out(config.task, data.train):
        raise ConfigError(f"data.train={data.train}: holds nothing out; give --val as well, what is judged on")
    size, apart = settings["image_size"], data.val is not None
    train = open_source(config.task, data.train, "train", image_size=size, classes=classes, whole=apart)
    known = train.classes if config.task == "classification" else None
    val = open_source(config.task, data.val or data.train, "val", image_size=size, classes=known, whole=apart)
    require_batch(config.train, data.train, len(train), world)
    return train, val
