"""`pytest bench/test_masking.py --benchmark-only`: the masking operators beside what they replace."""

import pytest
import torch

from bench import masking

CPU = torch.device("cpu")
NAMES = [case.name for case in masking.cases(masking.BASE_16._replace(B=1), CPU, torch.float32, "cpu")]
SMALL = [
    pytest.param(sizes, case.name, id=f"{sizes.B}x{sizes.P}x{sizes.D} {case.name}")
    for sizes in masking.SMALL
    for case in masking.cases(sizes._replace(B=1), CPU, torch.float32, "auto")
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("contestant", ["fused", "composition", "reference", "index_select"])
def test_masking(benchmark, device, full_size, name, contestant):
    sizes = masking.BASE_16._replace(B=2048) if full_size else masking.BASE_16
    dtype, fused = (torch.bfloat16, "triton") if full_size else (torch.float32, "cpu")
    run(benchmark, device, sizes, dtype, fused, name, contestant)


@pytest.mark.parametrize("sizes, name", SMALL)
@pytest.mark.parametrize("contestant", ["fused", "reference"])
def test_small(benchmark, device, sizes, name, contestant):
    run(benchmark, device, sizes, torch.float32, "auto", name, contestant)


def run(benchmark, device, sizes, dtype, fused, name, contestant):
    case = next(case for case in masking.cases(sizes, device, dtype, fused) if case.name == name)
    call = case.contestants.get(fused if contestant == "fused" else contestant)
    if call is None:
        pytest.skip(f"{name} has no {contestant}")
    if contestant == "fused":
        masking.agree(case, fused)
    benchmark.group = f"{name} B={sizes.B} P={sizes.P} D={case.D}"

    def synchronised():
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=3, warmup_rounds=1)
