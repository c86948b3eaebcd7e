"""Says what is installed, which devices and backends there are, which implementation each operator takes here and why,
and whether the operators' gradients agree with plain torch in double precision."""

import argparse
import ast
import importlib.metadata
import importlib.util
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

SUMMARY = "check this installation"
EXAMPLES = """example:
  python -m sycoca doctor"""

_PACKAGES = ("torch", "triton", "numpy", "pillow", "tokenizers", "safetensors", "huggingface_hub", "deepspeed")
_OPTIONAL = ("open_clip_torch", "transformers", "xformers", "matplotlib", "pyarrow", "tensorboard")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def shadowed() -> str | None:
    """One line where Python finds a package `kernels` that is not ours, None where it finds ours."""
    spec = importlib.util.find_spec("kernels")
    if spec is None or spec.origin is None:
        return "the package kernels, which comes with sycoca, is not there; install sycoca again"
    try:
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        tree = ast.Module([], [])
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    if "attentive_select" in imported:
        return None
    return (
        f"another package named kernels ({Path(spec.origin).parent}), such as Hugging Face's, shadows ours; "
        "the two cannot share an environment: pip uninstall kernels, then install sycoca again"
    )


def run(args: argparse.Namespace) -> int:
    del args
    started = time.perf_counter()
    line = shadowed()
    if line:
        print(f"problem: {line}")
        return 1
    _title("versions")
    _table(_versions())
    _title("devices and backends")
    _table(_devices())
    _title("operators: what runs here, and why")
    _table(_operators())
    _title("gradients against plain torch in double precision")
    wrong = _check_gradients()
    seconds = time.perf_counter() - started
    if wrong:
        print(f"\nproblem: the gradients of {', '.join(wrong)} are wrong here ({seconds:.1f} s)")
        return 1
    print(f"\nall is well ({seconds:.1f} s)")
    return 0


def _title(text: str) -> None:
    print(f"\n{text}")


def _table(rows) -> None:
    for name, value in rows:
        print(f"  {name:<21} {value}", flush=True)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "sycoca", f"{_version('sycoca') or 'not installed, run'} from {Path(__file__).resolve().parents[2]}"
    for package in _PACKAGES:
        yield (
            package,
            _version(package) or ("not installed (training needs it)" if package == "deepspeed" else "MISSING"),
        )
    for package in _OPTIONAL:
        if version := _version(package):
            yield package, version
    if version := _version("kernels"):
        # Ours is imported, as `shadowed` has seen; whoever wants theirs gets ours.
        yield "kernels", f"{version} of Hugging Face is installed too: packages that need it will meet ours and fail"


def _devices() -> Iterator[tuple[str, str]]:
    import torch
    import torch.distributed as dist

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    yield "cpu", f"cores usable {cores}, threads {torch.get_num_threads()}, {capability}"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            memory = device.total_memory / 2**30
            yield f"cuda:{i}", f"{device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB"
    else:
        yield "cuda", "none" if torch.version.cuda else "none (this torch is built without CUDA)"
    backends = [name for name in ("gloo", "nccl", "mpi") if dist.is_available() and dist.is_backend_available(name)]
    yield "distributed", ", ".join(backends) or "none"


def _check_gradients() -> list[str]:
    """Names of the operators whose gradients are wrong; all are shown."""
    from sycoca.commands.self_check import TOLERANCE, gradient_errors

    wrong = []
    for name, error in gradient_errors():
        # A comparison with NaN is false.
        if not error <= TOLERANCE:
            wrong.append(name)
        _table([(name, f"{'WRONG' if name in wrong else 'ok'}, relative error {error:.1e}")])
    return wrong


def _operators() -> Iterator[tuple[str, str]]:
    import torch

    from kernels import explain, operators

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        for operator in operators():
            choice = explain(operator, device)
            yield operator, f"{choice.taken} on {device}: {choice.reason}"
            for name, obstacle in choice.obstacles.items():
                yield "", f"not {name}: {obstacle}"
