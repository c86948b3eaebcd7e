"""Choice of the implementation that runs.

`auto` follows `tuning.py`; an explicit name runs or raises, it never falls back.
"""

import functools
import importlib.util
import os
import sys
from collections.abc import Iterable
from typing import NamedTuple

import torch

from kernels import tuning

# Order of preference is tuning's business; this is the order in which `implementations` lists them.
OPERATORS: dict[str, tuple[str, ...]] = {
    "fused_itc_loss": ("reference", "cpu", "triton", "gluon"),
    "fused_siglip_loss": ("reference", "cpu", "triton"),
    "attentive_select": ("reference", "cpu", "triton"),
    "gather_patches": ("reference", "cpu", "triton"),
    "scatter_patches": ("reference", "cpu", "triton"),
    "masked_patch_loss": ("reference", "cpu", "triton"),
    "region_pool": ("reference", "cpu", "triton"),
    "sample_hard_negatives": ("reference", "cpu", "triton"),
    "box_loss": ("reference", "cpu", "triton"),
}


def checks_enabled() -> bool:
    """Whether values inside tensors are checked (`KERNELS_CHECK=1`), at the price of a synchronisation."""
    return os.environ.get("KERNELS_CHECK", "") == "1"


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def operators() -> tuple[str, ...]:
    """Public names of the operators that have more than one implementation."""
    return tuple(OPERATORS)


def implementations(operator: str) -> tuple[str, ...]:
    """Names of the implementations of an operator that can run in this process.

    Args:
        operator: public name of the operator, such as `"fused_itc_loss"`.

    Returns:
        The names that `impl=` takes, `"auto"` excluded.

    Raises:
        ValueError: the operator is unknown.
    """
    return tuple(name for name in _declared(operator) if _obstacle(name, None) is None)


class Choice(NamedTuple):
    """What `impl="auto"` takes on a device, and why.

    Attributes:
        taken: name of the implementation that a large problem gets.
        reason: the rule and the measured row behind it, or that nobody measured it.
        obstacles: why each of the others that cannot run there cannot, by name.
    """

    taken: str
    reason: str
    obstacles: dict[str, str]


def explain(operator: str, device: torch.device | str = "cpu") -> Choice:
    """Which implementation of an operator runs on tensors of a device.

    Args:
        operator: public name of the operator, such as `"fused_itc_loss"`.
        device: where the tensors would be.

    Returns:
        The choice.

    Raises:
        ValueError: the operator is unknown.
    """
    device = torch.device(device)
    found = {name: _obstacle(name, device) for name in _declared(operator)}
    runnable = tuple(name for name, obstacle in found.items() if obstacle is None)
    taken = tuning.preferred(operator, device, runnable, size=sys.maxsize)
    obstacles = {name: obstacle for name, obstacle in found.items() if obstacle is not None}
    return Choice(taken, tuning.reason(operator, device, runnable), obstacles)


def select(operator: str, impl: str, device: torch.device, **sizes: int) -> str:
    """Name of the implementation to run on tensors of `device`; `sizes` are what `tuning.py` decides by."""
    if impl == "auto":
        # A compiler traces through the plain function only.
        find = _runnable.__wrapped__ if torch.compiler.is_compiling() else _runnable
        return tuning.preferred(operator, device, find(operator, device, interpreting()), **sizes)
    declared = _declared(operator)
    if impl not in declared:
        raise ValueError(f"{operator}: impl must be 'auto' or one of {', '.join(declared)}, got {impl!r}")
    obstacle = _obstacle(impl, device)
    if obstacle is not None:
        raise ValueError(f"{operator}: impl={impl!r} {obstacle}")
    return impl


@functools.cache
def _runnable(operator: str, device: torch.device, interpreted: bool) -> tuple[str, ...]:
    # Asked for at every call, where tens of microseconds are the whole cost of a small problem.
    return tuple(name for name in _declared(operator) if _obstacle(name, device) is None)


def require(condition: bool, operator: str, limit: str, value: object, error: type[Exception] = ValueError) -> None:
    """Raise `error` naming operator, limit and value unless the condition holds."""
    if not condition:
        raise error(f"{operator}: {limit}, got {value}")


def require_same_device(operator: str, tensors: Iterable[torch.Tensor | None]) -> None:
    """Raise unless all tensors that are given lie on one device."""
    devices = {t.device for t in tensors if t is not None}
    require(len(devices) <= 1, operator, "all tensors must be on one device", sorted(map(str, devices)))


def _declared(operator: str) -> tuple[str, ...]:
    if operator not in OPERATORS:
        raise ValueError(f"unknown operator {operator!r}; there are {', '.join(OPERATORS)}")
    return OPERATORS[operator]


def _obstacle(impl: str, device: torch.device | None) -> str | None:
    """Why an implementation cannot run on `device` (None: on any device of this process), or None if it can."""
    if impl == "cpu" and device is not None and device.type != "cpu":
        return f"needs CPU tensors, got {device}"
    if impl == "gluon":
        return _gluon_obstacle(device)
    if impl == "triton":
        if not has_triton():
            return "needs the package triton"
        if interpreting():
            return (
                None
                if device is None or device.type == "cpu"
                else f"is interpreted and needs CPU tensors, got {device}"
            )
        if device is None:
            return None if torch.cuda.is_available() else "needs a CUDA device or TRITON_INTERPRET=1"
        return None if device.type == "cuda" else f"needs CUDA tensors or TRITON_INTERPRET=1, got {device}"
    return None


def _gluon_obstacle(device: torch.device | None) -> str | None:
    if not has_triton():
        return "needs the package triton"
    if interpreting() or not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return f"needs CUDA tensors, and Triton's compiler, got {device}"
    capability = torch.cuda.get_device_capability(device)
    return None if capability[0] == 9 else f"needs compute capability 9, got {capability[0]}.{capability[1]}"
