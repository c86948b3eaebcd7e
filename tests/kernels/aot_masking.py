"""Ahead-of-time compilation of the masking kernels, and of the region kernels, as the launchers would compile them.

`python -m tests.kernels.aot_masking few|all` prints one JSON line per kernel, configuration and architecture. The
launchers run on CPU tensors with the kernels replaced by recorders, so that what is compiled is what would run.
"""

import contextlib
import itertools
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import patch_loss_triton, patches_triton, select_triton, tuning
from tests.kernels import aot_xvlm
from tests.kernels.aot import compile_launch

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HALF, FULL = torch.bfloat16, torch.float32


class Recorder:
    """Stands for a kernel; keeps the arguments of its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((args, options))


@contextlib.contextmanager
def recorded(module):
    kernels = {name: getattr(module, name) for name in vars(module) if name.endswith("_kernel")}
    recorders = {name: Recorder(kernel) for name, kernel in kernels.items()}
    for name, recorder in recorders.items():
        setattr(module, name, recorder)
    try:
        yield recorders.values()
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


def compiled(kernel, args, options, architecture):
    """Resources and instructions of a launch, specialised as Triton's launcher does."""
    signature, constants, attributes = {}, {}, {}
    values = dict(zip(kernel.arg_names, args)) | {k: v for k, v in options.items() if k in kernel.arg_names}
    for place, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif value is None or name in options or (value == 1 and isinstance(value, int)):
            signature[name] = "constexpr"
            constants[(place,)] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    launch = {key: options[key] for key in ("num_warps", "num_stages", "maxnreg") if key in options}
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = disassemble("-res-usage", file.name)
        sass = disassemble("-sass", file.name)
    return {
        "kernel": kernel.fn.__name__,
        "architecture": architecture,
        "options": {key: value for key, value in options.items() if isinstance(value, int | bool)},
        "half": any(isinstance(a, torch.Tensor) and a.dtype == HALF for a in args),
        "shared": binary.metadata.shared,
        "registers": max(int(n) for n in re.findall(r"REG:(\d+)", usage)),
        "stack": max(int(n) for n in re.findall(r"STACK:(\d+)", usage)),
        "instructions": {name: len(re.findall(rf"\b{name}\b", sass)) for name in ("HGMMA", "HMMA", "LDL", "STL")}
        | {"LDGSTS": len(re.findall(r"\bLDGSTS", sass)), "wide": len(re.findall(r"\b(?:LDG|STG)\.E\S*\.128", sass))},
    }


def disassemble(option, path):
    run = subprocess.run([TOOLS / "cuobjdump", option, path], capture_output=True, text=True, check=True)
    return run.stdout


def select_cases(every):
    """(P, T, D, dtype, block, columns): all tiles that `tuning.select_tile` can choose, or the one of base_16."""
    yield 196, 77, 512, HALF, 2, 14
    yield 196, 77, 512, HALF, 1, 196
    yield 196, 77, 512, FULL, 1, 196
    if every:
        for P, T, D, dtype in itertools.product((16, 32, 64, 128, 256, 512, 1024), (32, 77), (32, 64), (HALF, FULL)):
            yield P, T, D, dtype, 1, P


def record_select(every):
    for P, T, D, dtype, block, columns in select_cases(every):
        valid = torch.ones(1, T, dtype=torch.bool)
        v, t = torch.ones(1, P, D, dtype=dtype), torch.ones(1, T, D, dtype=dtype)
        select_triton.select(v, t, valid, P // 2, P // 2, block, columns, 1e-8)


def record_patches(every):
    for D, dtype in ((768, HALF), (768, FULL), (512, HALF), (100, HALF), (3, FULL)) if every else ((768, HALF),):
        x, index = torch.ones(2, 196, D, dtype=dtype), torch.zeros(2, 98, dtype=torch.int64)
        pos, prefix, rows = torch.ones(196, D), torch.ones(D), torch.ones(2, 98, D, dtype=dtype)
        patches_triton.gather(x, index, pos, prefix)
        patches_triton.gather_backward(rows, index, 196, True, True)
        patches_triton.scatter(rows, index, prefix, 196, pos)
        patches_triton.scatter_backward(x, index, True, True, True)
        if every:
            patches_triton.gather(x, index, None, None)
            patches_triton.gather_backward(rows, index, 196, True, False)
            patches_triton.gather_backward(rows, index, 196, False, True)
            patches_triton.scatter_backward(x, index, True, False, False)
            patches_triton.scatter_backward(x, index, False, True, True)


def record_patch_loss(every):
    cases = [(16, 3, "l1")]
    if every:
        cases += [(16, 3, "mse"), (16, 3, "mse_normalised"), (14, 3, "l1"), (64, 4, "mse_normalised"), (1, 1, "l1")]
    for p, C, kind in cases:
        images, index = torch.ones(1, C, 2 * p, 2 * p), torch.zeros(1, 4, dtype=torch.int64)
        pred = torch.ones(1, 4, p * p * C, dtype=HALF)
        patch_loss_triton.loss(pred, images, index, p, kind, 1.0, 1e-6)
        patch_loss_triton.loss_backward(torch.tensor(1.0), pred, images, index, p, kind, 0.5, 1e-6)


def launches(every):
    """(kernel, arguments, options, architecture) of every launch to be compiled."""
    choose = tuning.select_tile
    for architecture in (80, 90):
        tuning.select_tile = lambda *sizes, hopper=architecture == 90: choose(*sizes[:-1], hopper)
        records = [(select_triton, record_select)]
        if every or architecture == 90:
            records += [(patches_triton, record_patches), (patch_loss_triton, record_patch_loss)]
        for module, record in records:
            with recorded(module) as recorders:
                record(every)
            yield from distinct(recorders, architecture)


def distinct(recorders, architecture):
    """Launches that compile to different kernels."""
    seen = set()
    for recorder in recorders:
        for args, options in recorder.launches:
            types = tuple(a.dtype if isinstance(a, torch.Tensor) else a is None for a in args)
            key = recorder.kernel.fn.__name__, tuple(options.items()), types
            if key not in seen:
                seen.add(key)
                yield recorder.kernel, args, options, architecture


if __name__ == "__main__":
    for launch in launches(sys.argv[1] == "all"):
        print(json.dumps(compiled(*launch)), flush=True)
    for facts, launch in aot_xvlm.launches(sys.argv[1]):
        print(json.dumps(compile_launch(*launch) | facts), flush=True)
