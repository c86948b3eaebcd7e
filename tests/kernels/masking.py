"""What the tests of the masking operators share: devices, chosen patches, the error rule."""

import torch

import kernels
from kernels import dispatch

# the interpreter is slow, and multiplies the bits of bf16 operands
INTERPRETED = dispatch.interpreting()
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)


def fused(operator: str) -> list[str]:
    """The implementations that are held against the reference in this process."""
    if INTERPRETED:
        return ["triton"]
    return [impl for impl in kernels.implementations(operator) if impl != "reference"]


def device_of(impl: str) -> str:
    return "cuda" if impl == "triton" and not INTERPRETED else "cpu"


def chosen(B: int, P: int, K: int, generator: torch.Generator, ascending: bool = True) -> torch.Tensor:
    """K different patches of P for each sample, (B, K)."""
    index = torch.rand(B, P, generator=generator).argsort(1)[:, :K]
    return index.sort(1).values if ascending else index


def assert_within_budget(got: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, what: str) -> None:
    """The error may be twice that of plain torch in the input dtype, plus 4 ulp of the largest magnitude."""
    assert got.dtype == plain.dtype and got.shape == truth.shape, what
    if truth.numel() == 0:
        return
    truth = truth.double().cpu()
    error = (got.double().cpu() - truth).abs().max().item()
    budget = (plain.double().cpu() - truth).abs().max().item()
    ulp = torch.finfo(got.dtype).eps * truth.abs().max().item()
    assert error <= 2 * budget + 4 * ulp, f"{what}: error {error:.3g}, budget {budget:.3g}, ulp {ulp:.3g}"
    assert torch.isfinite(got).all(), what
