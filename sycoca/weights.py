"""Weights in files: read without running anybody's code, fitted to a model key by key, refused in one line.

Positions of a patch grid are interpolated where only the grid differs (bicubic, antialiased, as open_clip does it), and
a Swin's tables of relative positions where only the window does (bicubic, as Swin does it).
"""

import os
import pickle
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_SHOWN = 5
_TABLE = "relative_position_bias_table"
# How torch names what it would not unpickle.
_GLOBAL = re.compile(r"(?:GLOBAL|global|Unsupported class) ([\w.]+)")


class WeightsError(ValueError):
    """Weights or a model folder that cannot be used; the message is one line."""


def read_weights(path: str | os.PathLike, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of a weight file, on the CPU.

    Args:
        path: `.safetensors`, or a file of `torch.save` that holds a state dict, alone or under `state_dict`.
        allow_pickle: also unpickle arbitrary Python objects, which can run any code the file contains.

    Returns:
        Tensors by name, a leading `module.` taken off.

    Raises:
        WeightsError: missing, truncated, no weights, or pickled objects without `allow_pickle`.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else load_torch(path, allow_pickle)
    except SafetensorError as error:
        raise WeightsError(f"{path}: truncated, or no safetensors file ({_first_line(error)})") from None
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or _first_line(error)}") from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{path}: holds no state dict (tensors by name, alone or under 'state_dict')")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def load_torch(path: Path, allow_pickle: bool, *, mmap: bool = False) -> Any:
    """What `torch.save` wrote, on the CPU; other pickled objects than tensors and containers only if allowed.

    Raises:
        WeightsError: truncated, something else, or such objects.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=not allow_pickle, mmap=mmap)
    except pickle.UnpicklingError as error:
        if not _GLOBAL.search(str(error)):
            raise WeightsError(f"{path}: truncated, or no weight file") from None
        raise WeightsError(
            f"{path}: holds the pickled Python object {_GLOBAL.search(str(error))[1]}, and reading such can run any "
            "code; allow_pickle=True (--allow-pickle) reads it all the same"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise WeightsError(f"{path}: truncated, or no weight file ({_first_line(error)})") from None


def write_weights(state: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Writes tensors to `.safetensors`, or with `torch.save` under any other name; whole or not at all."""
    path = Path(path)
    state = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
    partial = path.with_name(f".{path.name}.partial")
    partial.touch()
    mode = partial.stat().st_mode
    try:
        if path.suffix == ".safetensors":
            save_file(state, partial, metadata={"format": "pt"})
            # safetensors leaves a file that its owner alone can read.
            partial.chmod(mode)
        else:
            torch.save(state, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_into(model: nn.Module, state: Mapping[str, Tensor], *, source: str, fresh: tuple[str, ...] = ()) -> None:
    """Gives a model the weights, as fp32.

    Args:
        model: on any device, `meta` included unless parts are fresh.
        state: a tensor for every parameter.
        source: what a refusal names.
        fresh: first parts of the names of parameters that keep their values where `state` lacks them.

    Raises:
        WeightsError: other names or shapes; the first five of each are told.
    """
    wanted = model.state_dict()
    needed = [name for name in wanted if name in state or not name.startswith(fresh or ("\0",))]
    reshaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    architecture_differs(needed, state, reshaped, source=source)
    state = {
        name: tensor.to(wanted[name].device if wanted[name].device.type != "meta" else "cpu", torch.float32)
        for name, tensor in state.items()
    }
    model.load_state_dict(state, strict=False, assign=True)


def architecture_differs(
    wanted: Collection[str], found: Collection[str], reshaped: Sequence[str] = (), *, source: str
) -> None:
    """Refuses weights of other names than `wanted`, or told to be of another shape; the first five of each are named.

    Raises:
        WeightsError: there are such.
    """
    missing = [name for name in wanted if name not in found]
    known = set(wanted)
    unknown = [name for name in found if name not in known]
    told = [
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", reshaped))
        if names
    ]
    if told:
        raise WeightsError(f"{source}: weights of another architecture; {'; '.join(told)}")


def resize_positions(pos: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions (P', D) of a square grid, interpolated to a grid of P = rows * cols patches; (P, D)."""
    side = round(pos.shape[0] ** 0.5)
    if side * side != pos.shape[0]:
        raise WeightsError(f"{pos.shape[0]} positions are no square grid, so they cannot be interpolated")
    image = pos.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return image.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1).to(pos.dtype)


def resize_windows(state: Mapping[str, Tensor], window: int) -> dict[str, Tensor]:
    """Weights whose tables of relative positions ((2 w' - 1)^2, H) are those of windows of another side, in cells."""
    return {name: _resized(table, 2 * window - 1) if name.endswith(_TABLE) else table for name, table in state.items()}


def _resized(table: Tensor, side: int) -> Tensor:
    """Biases (s'^2, H) of s' x s' relative positions, interpolated to (side^2, H)."""
    old = round(table.shape[0] ** 0.5)
    if old == side:
        return table
    image = table.float().view(1, old, old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(side, side), mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).reshape(side * side, -1).to(table.dtype)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
