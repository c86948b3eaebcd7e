"""Checkpoints of a run: written beside, renamed into place, the last few kept.

A checkpoint is DeepSpeed's (any ZeRO stage) plus the integers that the data order and the schedules need.
"""

import os
import shutil
from pathlib import Path

import torch.distributed as dist

from train.run_folder import checkpoint_steps


def newest_checkpoint(run_dir: Path) -> int:
    """Step of the newest complete checkpoint.

    Raises:
        FileNotFoundError: the run has none.
    """
    steps = checkpoint_steps(run_dir)
    if not steps:
        raise FileNotFoundError(f"{run_dir} holds no checkpoint")
    return steps[-1]


def save_checkpoint(engine, run_dir: Path, *, step: int, keep: int) -> Path:
    """Saves the engine after `step` optimizer steps and keeps the last `keep` checkpoints. All ranks call it."""
    folder = run_dir / "checkpoints"
    tag = f"step_{step:08d}"
    partial = folder / ".partial"
    is_first = dist.get_rank() == 0
    if is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(partial), tag=tag, client_state={"step": step}, save_latest=False)
    dist.barrier()
    if is_first:
        shutil.rmtree(folder / tag, ignore_errors=True)
        os.replace(partial / tag, folder / tag)
        shutil.rmtree(partial, ignore_errors=True)
        for old in checkpoint_steps(run_dir)[:-keep]:
            shutil.rmtree(folder / f"step_{old:08d}", ignore_errors=True)
    dist.barrier()
    return folder / tag


def load_checkpoint(engine, run_dir: Path, step: int) -> None:
    """Loads weights and optimizer state of the checkpoint at `step` into the engine.

    Raises:
        RuntimeError: DeepSpeed found nothing to load, or a checkpoint of another step.
    """
    path, state = engine.load_checkpoint(str(run_dir / "checkpoints"), tag=f"step_{step:08d}")
    if path is None or state.get("step") != step:
        raise RuntimeError(f"checkpoint step_{step:08d} in {run_dir} could not be loaded")
