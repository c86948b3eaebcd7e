"""The folder of a run: a free one, one to resume, and the configuration that lies in it. Nothing here imports torch."""

import json
import os
from pathlib import Path

from sycoca.config import ConfigError, from_dict, nearest
from train.config import RunConfig


def read_run_config(run_dir: Path) -> RunConfig:
    """The configuration that a run wrote into its folder."""
    path = run_dir / "config.json"
    try:
        return from_dict(RunConfig, json.loads(path.read_text(encoding="utf-8"))["run"])
    except FileNotFoundError:
        raise ConfigError(f"{run_dir}: no config.json, so nothing to resume") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def resume_dir(asked: Path | None) -> Path:
    """The folder to resume: the one given, else the newest under runs/ that has a checkpoint."""
    if asked is not None:
        if not asked.is_dir():
            known = [str(path) for path in asked.parent.glob("*/")]
            raise ConfigError(f"--run-dir {asked}: no such folder{nearest(str(asked), known)}")
        candidates = [asked]
    else:
        candidates = sorted(Path("runs").glob("*/"), key=lambda path: path.stat().st_mtime, reverse=True)
    for candidate in candidates:
        if any(candidate.glob("checkpoints/step_*")):
            return candidate
    raise ConfigError(f"--resume: no checkpoint in {asked or 'runs/'}")


def free_run_dir(asked: Path | None, name: str) -> Path:
    """The folder of a fresh run. Every rank derives the same one, as none creates it before all have."""
    if asked is not None:
        if asked.exists() and not asked.is_dir():
            raise ConfigError(f"--run-dir {asked}: is a file")
        if asked.is_dir() and any(asked.iterdir()):
            raise ConfigError(
                f"--run-dir {asked}: already holds a run; add --resume to continue it, or name another folder"
            )
        return asked
    number = 1
    while (path := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path


def check_writable(run_dir: Path) -> None:
    """Raises ConfigError where the folder of the run cannot be made or written."""
    parent = run_dir
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--run-dir {run_dir}: no permission to write in {parent.resolve()}")
