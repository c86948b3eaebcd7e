"""Recipes: TOML files of what a run changes of a preset. Nothing here imports torch.

base = "coca_base"          the preset
[train]                     then any group of `RunConfig`, with the keys that differ
"""

import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sycoca.config import ConfigError, from_dict, nearest
from train.config import PRESETS, RunConfig, preset

FOLDER = Path(__file__).parent / "recipes"


def recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the project."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def chosen(name: str | None, has_cuda: bool) -> RunConfig:
    """The preset or recipe of a name, or the recipe of a path that ends in .toml; without a name the hardware's preset.

    Raises:
        ConfigError: there is none, or the recipe is wrong.
    """
    known = recipes()
    if name is None or name in PRESETS:
        return preset(name, has_cuda)
    if name in known:
        return read(known[name])
    if name.endswith(".toml"):
        return read(Path(name))
    names = [*PRESETS, *known]
    raise ConfigError(f"--preset {name}: unknown{nearest(name, names) or '; known: ' + ', '.join(names)}")


def read(path: Path) -> RunConfig:
    """The configuration that a recipe describes.

    Raises:
        ConfigError: one line naming the file and the key.
    """
    try:
        changes = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--preset {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--preset {path}: not TOML: {error}") from None
    base = changes.pop("base", None)
    if base not in PRESETS:
        raise ConfigError(
            f"--preset {path}: base is {base!r}{nearest(str(base), PRESETS) or '; known: ' + ', '.join(PRESETS)}"
        )
    whole = _merged(asdict(PRESETS[base]), changes)
    whole["preset"] = path.stem
    # A recipe gives one length of the run; the other is the preset's.
    length = changes.get("train", {}) if isinstance(changes.get("train", {}), dict) else {}
    for given, other in (("epochs", "steps"), ("steps", "epochs")):
        if given in length and other not in length:
            whole["train"][other] = None
    try:
        return from_dict(RunConfig, whole)
    except ConfigError as error:
        raise ConfigError(f"--preset {path}: {error}") from None


def _merged(old: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(old.get(key), dict)
        merged[key] = _merged(old[key], value) if nested else value
    return merged
