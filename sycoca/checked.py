"""Configuration dataclasses from plain data: every key and type checked, refusals in one line."""

import difflib
import json
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line and names the key."""


def require(condition: object, message: str) -> None:
    """Raises ConfigError with `message` unless the condition is true."""
    if not condition:
        raise ConfigError(message)


def from_dict(cls: type[T], data: dict[str, Any]) -> T:
    """Builds a configuration dataclass from plain data, every key and type checked.

    Args:
        cls: a frozen dataclass that derives from `Strict`.
        data: nested dictionaries, lists and scalars, as a JSON file holds them.

    Returns:
        An instance of `cls`.

    Raises:
        ConfigError: unknown key (with the nearest right one), missing key, wrong type or refused value.
    """
    try:
        # Strict JSON mode: "12" is no integer and True no number, yet a list may stand for a tuple.
        return _adapter(cls).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise ConfigError(_one_line(cls, error)) from None
    except (TypeError, RecursionError) as error:
        raise ConfigError(f"{cls.__name__}: not plain data: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested data of a configuration, the inverse of `from_dict` (tuples become lists)."""
    return json.loads(json.dumps(asdict(config)))


def nearest(key: str, known: Any) -> str:
    """The clause `; did you mean 'x'?` for the closest of the known names, or an empty string."""
    close = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def known_keys(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of every leaf key of a configuration dataclass, nested ones included."""
    keys = []
    for name, hint in get_type_hints(cls).items():
        if name.startswith("_"):
            continue
        hint = group_in(hint)
        keys += known_keys(hint, f"{prefix}{name}.") if is_dataclass(hint) else [prefix + name]
    return keys


def group_in(hint: Any) -> Any:
    """The dataclass in an annotation that also allows None, else the annotation."""
    return next((option for option in get_args(hint) if is_dataclass(option)), hint)


@cache
def _adapter(cls: type) -> TypeAdapter:
    return TypeAdapter(cls)


def _one_line(cls: type, error: ValidationError) -> str:
    first = min(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
    loc, kind = [str(part) for part in first["loc"]], first["type"]
    key = ".".join(loc) or cls.__name__
    if kind == "unexpected_keyword_argument":
        owner = cls
        for part in loc[:-1]:
            owner = group_in(get_type_hints(owner).get(part, owner)) if is_dataclass(owner) else owner
        local = nearest(loc[-1], [f.name for f in fields(owner)]) if is_dataclass(owner) else ""
        elsewhere = [k for k in known_keys(cls) if k.rsplit(".", 1)[-1] == loc[-1]]
        return f"{key}: unknown key" + (f"; did you mean '{elsewhere[0]}'?" if elsewhere else local)
    if kind in ("missing", "missing_argument"):
        return f"{key}: missing"
    if kind == "value_error":
        return f"{key}.{first['ctx']['error']}" if loc else str(first["ctx"]["error"])
    if kind == "literal_error":
        options = [part.strip().strip("'") for part in first["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return f"{key}: {first['input']!r} is none of {', '.join(options)}{nearest(first['input'], options)}"
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"


class Strict:
    """Base of a configuration dataclass: a key that it does not declare is an error."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
