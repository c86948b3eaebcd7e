import ctypes
import os
import pathlib

import pytest
import torch
import torch.nn.functional as F

import kernels

MIB = 2**20


def peak_mib(B, D, dtype):
    """Largest memory of a step above inputs and gradients, MiB; in a forked process, from its resident set."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os._exit(_child(B, D, dtype, send))
    os.close(send)
    with os.fdopen(receive) as pipe:
        answer = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return float(answer) - 2 * B * D * dtype.itemsize / MIB


def _child(B, D, dtype, send):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    image, text = (F.normalize(torch.randn(B, D), dim=1).to(dtype).requires_grad_() for _ in "it")
    # The library's own buffers are there before, as in a training process.
    kernels.fused_itc_loss(image[:2048], text[:2048], 14.3, impl="cpu").backward()
    image.grad = text.grad = None
    # Memory that was freed but is still held would hide what the step takes.
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = status_kib("VmRSS")
    kernels.fused_itc_loss(image, text, 14.3, impl="cpu").backward()
    os.write(send, str((status_kib("VmHWM") - before) / 1024).encode())
    return 0


def status_kib(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


@pytest.mark.usefixtures("warm_operators")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_quadratic_is_held(dtype):
    B, D = 16384, 16
    logits_mib = B * B * 4 / MIB
    # Pages of libraries that the kernel had reclaimed come back during the step; that can only add.
    assert min(peak_mib(B, D, dtype) for _ in range(3)) < logits_mib / 16


@pytest.mark.full
@pytest.mark.usefixtures("warm_operators")
@pytest.mark.parametrize(
    ("B", "D", "dtype", "limit_mib"),
    [
        # 16 bytes per logit is what open_clip's loss holds: 4096 MiB at this size.
        (16384, 512, torch.float32, 4096 / 20),
        (16384, 512, torch.bfloat16, 4096 / 16),
        (65536, 512, torch.float32, 1024),
    ],
)
def test_documented_peaks(B, D, dtype, limit_mib):
    assert peak_mib(B, D, dtype) < limit_mib
