"""What lies beside a fine-tuned model and says what it was fine-tuned for; and which model is meant by default."""

import json
from pathlib import Path
from typing import Any

from sycoca.config import ConfigError, nearest

FACTS = "task.json"
_FUSED = frozenset(["itm", "mlm", "bbox"])


def task_facts(folder: Path) -> dict[str, Any]:
    """What a model's folder, or the folder of its run, says about its fine-tuning; empty where it says nothing."""
    path = next((p for p in (folder / FACTS, folder / "model" / FACTS) if p.is_file()), None)
    if path is None:
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8")) | {"folder": str(path.parent)}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a task's JSON: {error}") from None


def vqa_method(asked: str, facts: dict[str, Any]) -> str:
    """How questions are answered; by default as the model was fine-tuned to.

    Raises:
        ConfigError: a classifier is asked for and there is none.
    """
    tuned = facts.get("method") if facts.get("task") == "vqa" else None
    if asked == "classify" and tuned != "classify":
        raise ConfigError("vqa=classify: this model was not fine-tuned to classify answers")
    return (tuned or "rank") if asked == "auto" else asked


def model_folder(asked: str | None) -> Path:
    """The folder of the model asked for, without one the newest run that left a model.

    Raises:
        ConfigError: there is none.
    """
    if asked is None:
        runs = [p for p in Path("runs").glob("*/") if (p / "model" / "config.json").is_file()]
        if not runs:
            raise ConfigError("--model: no run with a model in runs/; train one or name a folder")
        return max(runs, key=lambda p: p.stat().st_mtime)
    path = Path(asked).expanduser()
    if not path.is_dir():
        known = [str(p) for p in path.parent.glob("*/")] if path.parent.is_dir() else []
        raise ConfigError(f"--model {asked}: no such folder{nearest(str(path), known)}")
    if (path / "open_clip_config.json").is_file():
        raise ConfigError(
            f"--model {asked}: a model of OpenCLIP; convert it first: found = sycoca.load_pretrained({str(path)!r}); "
            "found.model.save_pretrained(FOLDER, tokenizer=found.tokenizer)"
        )
    if not any((path / part / "config.json").is_file() for part in ("model", ".")):
        raise ConfigError(f"--model {asked}: no model in this folder")
    if not any((path / part / "model.safetensors").is_file() for part in ("model", ".")):
        raise ConfigError(f"--model {asked}: a run without model/; make it with: python -m train.export RUN RUN/model")
    return path


def model_settings(folder: Path) -> dict[str, Any]:
    """What a model's folder says about it, as plain data, without importing torch.

    `learned` are its objectives, with `ic` among them where fine-tuning taught it to write captions; `teachable` says
    whether that can be done.
    """
    path = next(p for p in (folder / "model" / "config.json", folder / "config.json") if p.is_file())
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        objectives, text = tuple(data.get("objectives", ())), data["text"]
        return {
            "image_size": int(data["vision"]["image_size"]),
            "objectives": objectives,
            "learned": objectives + ("ic",) * bool(text.get("writes")),
            "teachable": text.get("kind") == "bidirectional" and not _FUSED.isdisjoint(objectives),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a model's configuration ({type(error).__name__}: {error})") from None
