"""Ranks that were started differently are told apart before they train together."""

import os
import platform
import socket
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from train.command_line import leaves
from train.exits import EXIT_REFUSED, StopRun
from train.launch import Launch

if TYPE_CHECKING:
    from train.tasks.launch import Tuning


def require_alike(launch: "Launch | Tuning") -> None:
    """All ranks call it, as the first thing they do together.

    Raises:
        StopRun: on all ranks alike, where one has another configuration, run folder or version than rank 0; the line
            names the rank, its machine, and the first things that differ.
    """
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (socket.gethostname(), settings(launch)))
    (host, first), *others = told
    for rank, (its_host, its) in enumerate(others, 1):
        if different := [key for key in {**first, **its} if first.get(key) != its.get(key)]:
            shown = ", ".join(f"{key} is {its.get(key)}, not {first.get(key)}" for key in different[:3])
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            raise StopRun(f"rank {rank} on {its_host} differs from rank 0 on {host}: {shown}{more}", EXIT_REFUSED)


def settings(launch: "Launch | Tuning") -> dict[str, str]:
    """What has to be the same on all ranks, by name."""
    import deepspeed

    said = {key: repr(value) for key, value in leaves(launch.config).items()}
    said |= {f"DeepSpeed JSON: {key}": value for key, value in _flat(launch.deepspeed).items()}
    said |= {"--run-dir": os.path.abspath(launch.run_dir), "--resume": repr(launch.resume)}
    said |= {"torch": torch.__version__, "deepspeed": deepspeed.__version__, "python": platform.python_version()}
    return said


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, str]:
    result = {}
    for key, value in data.items():
        result |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: repr(value)}
    return result
