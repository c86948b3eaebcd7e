"""Ahead-of-time compilation of kernel launches, as a device's launcher would compile them.

The launchers run on CPU tensors with the kernels replaced by recorders, so that what is compiled is what would run.
"""

import contextlib
import pathlib
import re
import subprocess
import tempfile
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
    torch.uint8: "u8",
}
TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDL", "STL", "USETMAXREG")
# Multiprocessors of an A100 and an H200.
PROCESSORS = {80: 108, 90: 132}


class Recorder:
    """Stands for a kernel; keeps the arguments of its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((args, options))


@contextlib.contextmanager
def recorded(architecture, *modules):
    """Recorders in place of the kernels of the modules, on a make-believe device."""
    recorders = []
    properties = SimpleNamespace(multi_processor_count=PROCESSORS[architecture])
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("torch.cuda.get_device_capability", lambda *_: divmod(architecture, 10)))
        stack.enter_context(mock.patch("torch.cuda.get_device_properties", lambda *_: properties))
        for module in modules:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                recorders.append(Recorder(getattr(module, name)))
                stack.enter_context(mock.patch.object(module, name, recorders[-1]))
        yield recorders


def compile_launch(kernel, args, options, architecture):
    """Resources and instructions of a launch, specialised as Triton's launcher does."""
    signature, constants, attributes = {}, {}, {}
    values = dict(zip(kernel.arg_names, args)) | {k: v for k, v in options.items() if k in kernel.arg_names}
    constant_names = {kernel.arg_names[p.num] for p in kernel.params if p.is_constexpr}
    for place, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, GluonDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
        elif value is None or name in constant_names or (value == 1 and isinstance(value, int)):
            signature[name] = "constexpr"
            constants[(place,)] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    launch = {key: options[key] for key in ("num_warps", "num_stages", "enable_fp_fusion") if key in options}
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch)
    constexprs = {name: value for name, value in values.items() if name in constant_names}
    return {"kernel": kernel.fn.__name__, "architecture": architecture, "options": constexprs | launch} | inspect(
        binary
    )


def inspect(binary):
    """Resources and instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, sass = (_disassemble(option, file.name) for option in ("-res-usage", "-sass"))
    return {
        "shared": binary.metadata.shared,
        "registers": max(int(n) for n in re.findall(r"REG:(\d+)", usage)),
        "stack": max(int(n) for n in re.findall(r"STACK:(\d+)", usage)),
        "instructions": {name: len(re.findall(rf"\b{name}\b", sass)) for name in INSTRUCTIONS},
    }


def _disassemble(option, path):
    return subprocess.run([TOOLS / "cuobjdump", option, path], capture_output=True, text=True, check=True).stdout
