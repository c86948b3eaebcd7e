"""What a resumed run may change. Nothing here imports torch."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sycoca.config import ConfigError
from train.command_line import leaves


def check_world(config: Any, batch: int, world: int, hint: str = "") -> None:
    """Raises ConfigError where so many ranks would make another global batch; `hint` ends the line."""
    train = config.train
    asked = train.micro_batch * train.accumulation * world
    if batch != asked:
        ranks = batch // (train.micro_batch * train.accumulation)
        raise ConfigError(
            f"--resume: the run has train_batch_size {batch} on {ranks} rank(s), {world} rank(s) would make it "
            f"{asked}{hint}"
        )


def reshaped(config: Any, batch: int, world: int, asked: int | None) -> Any:
    """The configuration of the same run, its global batch shared by another number of ranks.

    The micro batch, which memory limits, stays where it can; one that is asked for is taken.
    """
    train = config.train
    micro_batch = train.micro_batch if asked is None else asked
    parts, rest = divmod(batch, micro_batch * world) if micro_batch > 0 else (0, 0)
    if asked is None and (rest or not parts):
        parts = train.accumulation
        micro_batch, rest = divmod(batch, parts * world)
    if rest or not micro_batch or not parts:
        pieces = f"{parts} part(s)" if asked is None else f"micro batches of {asked}"
        raise ConfigError(f"--reshape: {world} rank(s) cannot share a train_batch_size of {batch} in {pieces}")
    boxes = train.region_batch * (batch // (train.micro_batch * train.accumulation))
    region_batch, rest = divmod(boxes, world)
    if rest:
        raise ConfigError(f"--reshape: {world} rank(s) cannot share {boxes} texts with boxes")
    return replace(config, train=replace(train, micro_batch=micro_batch, region_batch=region_batch, accumulation=parts))


def check_resumed(before: Any, after: Any, fixed: Callable[[str], bool]) -> None:
    """Raises ConfigError where a setting differs whose dotted key is `fixed`."""
    old = leaves(before)
    for key, value in leaves(after).items():
        if value != old.get(key) and fixed(key):
            raise ConfigError(f"--resume: {key} is {old.get(key)} in the run and cannot become {value}")


def check_end(after: Any, steps: int, newest: int) -> None:
    """Raises ConfigError where the resumed run would end, after `steps`, before its newest checkpoint."""
    if steps < newest:
        train = after.train
        asked = f"train.steps {steps}" if train.epochs is None else f"train.epochs {train.epochs} end at step {steps}"
        raise ConfigError(f"--resume: {asked}, the newest checkpoint is of step {newest}")


def add_restart(parser: Any) -> None:
    parser.add_argument(
        "--restart",
        action="store_true",
        help="start --run-dir anew where it holds a run that ended before its first checkpoint",
    )


def check_restart(args: Any) -> None:
    if args.restart and args.resume:
        raise ConfigError("--restart starts a run anew, --resume continues it; give one of them")
