"""The folder of a run: a free one, one to resume, and the configuration that lies in it. Nothing here imports torch."""

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sycoca.config import ConfigError, from_dict, nearest
from train.config import RunConfig

_TAG = re.compile(r"step_(\d{8})")
_CONFIG = "config.json"
_MADE_AT_START = ("tokenizer.json", "metrics.jsonl", "before.json", "before.html")


class Hold:
    """A run's folder, held by one process at a time until it ends."""

    def __init__(self, run_dir: Path) -> None:
        self._file = (run_dir / ".lock").open("a")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"--run-dir {run_dir}: another process is writing there") from None
        # A loader worker that outlives its rank for a moment must not hold the folder.
        os.register_at_fork(after_in_child=self._file.close)


def is_held(run_dir: Path) -> bool:
    """Whether a process writes into a run's folder."""
    try:
        with (run_dir / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def _refusals(option: str, path: Path | None) -> Iterator[None]:
    """What the system refuses becomes one line that names the path."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{option} {path or ''}: {error.filename}: {error.strerror}".replace(" :", ":")) from None


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints in a run's folder, ascending."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        tags = [_TAG.fullmatch(entry.name) for entry in entries if entry.is_dir()]
    return sorted(int(tag[1]) for tag in tags if tag)


class Written(NamedTuple):
    """What a run wrote into its folder: its configuration, its global batch in pairs, its ZeRO stage."""

    config: Any
    batch: int
    stage: int


def read_run_config(run_dir: Path, kind: type = RunConfig) -> Written:
    """The configuration, of a dataclass `kind`, that lies in a run's folder."""
    path = run_dir / _CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        ds = data["deepspeed"]
        stage = ds.get("zero_optimization", {}).get("stage", 0)
        return Written(from_dict(kind, data["run"]), int(ds["train_batch_size"]), int(stage))
    except FileNotFoundError:
        raise ConfigError(f"{run_dir}: no config.json, so nothing to resume") from None
    except KeyError as error:
        raise ConfigError(f"{path}: {error.args[0]}: missing") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def resume_dir(asked: Path | None) -> Path:
    """The folder to resume: the one given, else the newest under runs/ that has a checkpoint."""
    with _refusals("--run-dir" if asked else "--resume", asked):
        if asked is not None:
            if not asked.is_dir():
                known = [str(path) for path in asked.parent.glob("*/")]
                raise ConfigError(f"--run-dir {asked}: no such folder{nearest(str(asked), known)}")
            candidates = [asked]
        else:
            candidates = sorted(Path("runs").glob("*/"), key=lambda path: path.stat().st_mtime, reverse=True)
        for candidate in candidates:
            if checkpoint_steps(candidate):
                return candidate
            if (candidate / _CONFIG).exists():
                raise ConfigError(
                    f"--resume: no checkpoint in {candidate}, the run ended before its first one; "
                    f"--restart --run-dir {candidate} starts it anew"
                )
    raise ConfigError(f"--resume: no checkpoint in {asked or 'runs/'}")


def free_run_dir(asked: Path | None, name: str, *, restart: bool = False) -> Path:
    """The folder of a fresh run. Every rank derives the same one, as none creates it before all have.

    Args:
        asked: on the command line.
        name: of the folder under runs/, where none was asked for.
        restart: whether it may hold a run that has no checkpoint.
    """
    with _refusals("--run-dir", asked):
        if restart and asked is None:
            raise ConfigError("--restart: name the run with --run-dir")
        if asked is not None:
            if asked.exists() and not asked.is_dir():
                raise ConfigError(f"--run-dir {asked}: is a file")
            if not asked.is_dir() or not any(path.name != ".lock" for path in asked.iterdir()):
                return asked
            if checkpoint_steps(asked):
                raise ConfigError(
                    f"--run-dir {asked}: already holds a run; "
                    f"{'use --resume' if restart else 'add --resume'} to continue it, or name another folder"
                )
            if not (asked / _CONFIG).exists():
                raise ConfigError(f"--run-dir {asked}: holds other files; name another folder")
            if not restart:
                raise ConfigError(
                    f"--run-dir {asked}: holds a run that ended before its first checkpoint; add --restart to start it "
                    "anew, or name another folder"
                )
            return asked
        number = 1
        while (path := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
            number += 1
        return path


def forget_start(run_dir: Path) -> None:
    """Drops what a run without a checkpoint has made of its data.

    Raises:
        ConfigError: the run has a checkpoint.
    """
    if checkpoint_steps(run_dir):
        raise ConfigError(f"--restart: {run_dir} holds checkpoints; use --resume to continue it")
    for name in _MADE_AT_START:
        (run_dir / name).unlink(missing_ok=True)


def check_writable(folder: Path, option: str = "--run-dir") -> None:
    """Raises ConfigError where a folder that an option names cannot be made or written."""
    with _refusals(option, folder):
        parent = folder
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise ConfigError(f"{option} {folder}: {parent} is a file")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise ConfigError(f"{option} {folder}: no permission to write in {parent.resolve()}")
