"""What the command lines of all scripts share: mistakes in one line, and typed `key=value` overrides.

Nothing here imports torch.
"""

import argparse
import difflib
import json
import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any, Literal

from sycoca.checked import group_in
from sycoca.config import ConfigError, from_dict, known_keys, nearest, to_dict

# What has an option of its own on the command line.
_CHOSEN_APART = frozenset(["preset", "task", "model", "init"])


class Parser(argparse.ArgumentParser):
    """Mistakes are a ConfigError: told once, by one rank, in one line."""

    def error(self, message: str) -> typing.NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
        if not message.startswith("unrecognized arguments: "):
            raise ConfigError(message)
        raise ConfigError(f"{unknown}: unknown option{nearest(unknown, self._option_string_actions)}")


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of every field that is not itself a group of fields."""
    result = {}
    for field in fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name
        result.update(leaves(value, name + ".") if is_dataclass(value) else {name: value})
    return result


def keys_of(config: Any) -> list[str]:
    """Dotted names of all that a command line may set, the fields of groups that are None among them."""
    return [name for name in {**leaves(config), **dict.fromkeys(known_keys(type(config)))} if name not in _CHOSEN_APART]


def split_overrides(texts: list[str], config: Any) -> dict[str, Any]:
    """Full dotted key -> value of the overrides of a command line; each key may be given once."""
    result: dict[str, Any] = {}
    for text in texts:
        key, value = split_override(text, config)
        if key in result:
            raise ConfigError(f"{key} is given twice, as {result[key]} and as {value}")
        result[key] = value
    return result


def split_override(text: str, config: Any) -> tuple[str, Any]:
    """`key=value` -> (full dotted key, value). A key may be shortened to any ending that only one field has."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{text!r} is not of the form key=value{nearest(text, keys_of(config))}")
    name = full_key(key, config)
    return name, _value(value, _annotation(type(config), name))


def full_key(key: str, config: Any) -> str:
    """The full dotted name of a key, which may be shortened to any ending that only one field has."""
    known = keys_of(config)
    full = [name for name in known if name == key] or [name for name in known if name.endswith("." + key)]
    if len(full) > 1:
        raise ConfigError(f"{key} is ambiguous: {', '.join(full)}")
    if not full:
        endings = {ending: name for name in known for ending in (name, name.rpartition(".")[2])}
        close = difflib.get_close_matches(key, endings, 1, 0.4)
        raise ConfigError(f"{key}: unknown key" + (f"; did you mean '{endings[close[0]]}'?" if close else ""))
    return full[0]


def _annotation(cls: type, name: str) -> Any:
    head, _, rest = name.partition(".")
    annotation = typing.get_type_hints(cls)[head]
    return _annotation(group_in(annotation), rest) if rest else annotation


def _value(text: str, annotation: Any) -> Any:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    if any(typing.get_origin(option) is tuple for option in options):
        items = text.strip("[]()").split(",") if text.strip("[]()") else []
        element = next(typing.get_args(option)[0] for option in options if typing.get_origin(option) is tuple)
        return [_value(item.strip(), element) for item in items]
    if str in options or any(typing.get_origin(option) is Literal for option in options):
        return text
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text


def apply_overrides(config: Any, overrides: dict[str, Any]) -> Any:
    """The configuration with dotted keys replaced, groups that are None made; types are checked."""
    data = to_dict(config)
    for name, value in overrides.items():
        *groups, leaf = name.split(".")
        group = data
        for part in groups:
            if group[part] is None:
                group[part] = {}
            group = group[part]
        group[leaf] = value
    return from_dict(type(config), data)
