"""Plans of studies: TOML files of rows that differ from one another in a few keys of a run's configuration.

about = "what the study asks"
base = "tiny"                              a preset or recipe
seeds = [0, 1, 2]
minutes = 5                                longest time of a run, optional
claims = [["SyCoCa", "CoCa"]]              the first is said to be better, optional
[common]                                   what all rows change of the base
[rows."SyCoCa"]                            and what this one changes; keys as on a command line

A run is known by a digest of its configuration, so that plans share the runs that they have in common. Nothing here
imports torch.
"""

import hashlib
import json
import shlex
import tomllib
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

from sycoca.config import ConfigError, nearest, to_dict
from train.command_line import apply_overrides, full_key, leaves
from train.config import RunConfig
from train.recipe import chosen

FOLDER = Path(__file__).parent / "plans"
_KEYS = ("about", "base", "seeds", "minutes", "claims", "common", "rows")
_SEED = "train.seed"
# Keys that are younger than studies which have been run. At these values a run is the one that it was without them.
_YOUNGER = {
    "model.masking.tgmim_start": 0.0,
    "model.vision.swin": None,
    "model.text.bert": None,
    "model.text.writes": False,
    "model.text.prompt": "",
    "model.vision.stem": "patch",
    "model.loss.whole_views": 0.0,
    "optimizer.matrix_lr": 0.02,
    "optimizer.matrix_momentum": 0.95,
    "data.randaugment": None,
    "pretrained": {"anew_rate": 2.0, "text": None, "vision": None},
}


class PlannedRun(NamedTuple):
    """One training of a study.

    Attributes:
        row: its row's name.
        seed: of the training.
        config: the whole configuration.
        overrides: full dotted key -> value, where it differs from the base.
        key: digest of the configuration.
    """

    row: str
    seed: int
    config: RunConfig
    overrides: dict[str, Any]
    key: str

    def arguments(self, base: str) -> list[str]:
        """What `train/pretrain.py` is called with, but for the DeepSpeed JSON and the folder."""
        return ["--preset", base, *(f"{key}={_spelled(value)}" for key, value in self.overrides.items())]


@dataclass(frozen=True)
class Plan:
    """A study: `runs` row by row and seed by seed, `claims` as (better, worse) rows."""

    name: str
    about: str
    base: str
    seeds: tuple[int, ...]
    runs: tuple[PlannedRun, ...]
    claims: tuple[tuple[str, str], ...] = ()
    minutes: float | None = None

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the rows, in order."""
        return tuple(dict.fromkeys(run.row for run in self.runs))

    def of(self, row: str) -> tuple[PlannedRun, ...]:
        """The runs of a row, one for each seed."""
        return tuple(run for run in self.runs if run.row == row)


def plans() -> dict[str, Path]:
    """Name -> file of the plans that come with the project."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def read_plan(
    name: str, *, only: list[str] | None = None, seeds: list[int] | None = None, overrides: dict[str, Any] | None = None
) -> Plan:
    """The plan of a name, or of a path that ends in .toml.

    Args:
        name: of the plan.
        only: rows to take; None for all.
        seeds: instead of the plan's.
        overrides: key -> value, as on a command line, for all rows.

    Raises:
        ConfigError: one line naming the file, the row and the key.
    """
    known = plans()
    path = known.get(name) or Path(name)
    if name not in known and not name.endswith(".toml"):
        raise ConfigError(f"{name}: no such plan{nearest(name, known)}; known: {', '.join(known)}, or a .toml of yours")
    data = _parsed(path)
    for key in data:
        if key not in _KEYS:
            raise ConfigError(f"{path}: {key}: unknown key{nearest(key, _KEYS)}")
    base_name = _typed(path, data, "base", str, "a preset or recipe")
    rows = _typed(path, data, "rows", dict, "rows, each a table of keys")
    common = _flat(_typed(path, {"common": {}, **data}, "common", dict, "a table of keys"))
    about = _typed(path, {"about": "", **data}, "about", str, "a sentence")
    minutes = data.get("minutes")
    if minutes is not None and not (type(minutes) in (int, float) and minutes > 0):
        raise ConfigError(f"{path}: minutes: {minutes!r}, needs to be a number above 0")
    seeds = _seeds(path, data.get("seeds", [0]) if seeds is None else seeds)
    claims = _claims(path, data.get("claims", []), rows)
    if only is not None:
        for row in only:
            if row not in rows:
                raise ConfigError(f"{path}: no row {row!r}{nearest(row, rows)}; rows: {'; '.join(rows)}")
        rows = {row: keys for row, keys in rows.items() if row in only}
    try:
        base = chosen(base_name, False)
    except ConfigError as error:
        raise ConfigError(f"{path}: base: {str(error).removeprefix('--preset ')}") from None
    runs = []
    for row, keys in rows.items():
        if not isinstance(keys, dict):
            raise ConfigError(f"{path}: rows: {row}: {keys!r} is not a table of keys")
        try:
            runs += _runs(base, row, seeds, common | _flat(keys) | (overrides or {}))
        except ConfigError as error:
            raise ConfigError(f"{path}: row {row!r}: {error}") from None
    claims = tuple(claim for claim in claims if set(claim) <= rows.keys())
    return Plan(path.stem, about, base_name, seeds, tuple(runs), claims, minutes)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None


def _typed(path: Path, data: dict[str, Any], key: str, kind: type, what: str) -> Any:
    value = data.get(key)
    if not isinstance(value, kind) or (key == "rows" and not value):
        raise ConfigError(f"{path}: {key}: {'missing' if value is None else repr(value)}, needs {what}")
    return value


def _seeds(path: Path, seeds: Any) -> tuple[int, ...]:
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{path}: seeds: {seeds!r}, needs different whole numbers from 0 on")
    return tuple(seeds)


def _claims(path: Path, claims: Any, rows: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    for claim in claims if isinstance(claims, list) else [claims]:
        if not isinstance(claim, list) or len(claim) != 2:
            raise ConfigError(f"{path}: claims: {claim!r}, needs pairs [better row, worse row]")
        for row in claim:
            if row not in rows:
                raise ConfigError(f"{path}: claims: no row {row!r}{nearest(str(row), rows)}")
    return tuple((better, worse) for better, worse in claims)


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested tables."""
    flat = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _runs(base: RunConfig, row: str, seeds: tuple[int, ...], keys: dict[str, Any]) -> list[PlannedRun]:
    changes: dict[str, Any] = {}
    for key, value in keys.items():
        full = full_key(key, base)
        # A row may say otherwise than what is common to all, by another ending of the same key.
        changes[full] = value
    if _SEED in changes:
        raise ConfigError(f"{_SEED}: the study's seeds are a key of their own, seeds")
    if changes.get("train.steps") is not None:
        changes.setdefault("train.epochs", None)
    runs = []
    for seed in seeds:
        config = apply_overrides(base, changes | {_SEED: seed})
        before, after = leaves(base), leaves(config)
        differs = {key: value for key, value in after.items() if key not in before or value != before[key]}
        runs.append(PlannedRun(row, seed, config, differs, digest(config)))
    return runs


def digest(config: RunConfig) -> str:
    """Twelve hexadecimal digits of a configuration."""
    data = to_dict(config)
    for key, value in _YOUNGER.items():
        *groups, leaf = key.split(".")
        group = reduce(dict.__getitem__, groups, data)
        if group[leaf] == value:
            del group[leaf]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def _spelled(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None:
        return "none"
    if isinstance(value, (tuple, list)):
        return ",".join(map(_spelled, value))
    return value if isinstance(value, str) else json.dumps(value)


def shown(command: list[str]) -> str:
    """A command as a person would type it."""
    return shlex.join(command)
