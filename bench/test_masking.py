"""`pytest bench/test_masking.py --benchmark-only`: the masking operators beside what they replace."""

import pytest
import torch

from bench import masking

NAMES = [case.name for case in masking.cases(1, torch.device("cpu"), torch.float32, "cpu")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("contestant", ["fused", "composition", "reference", "index_select"])
def test_masking(benchmark, device, full_size, name, contestant):
    B, dtype, fused = (2048, torch.bfloat16, "triton") if full_size else (64, torch.float32, "cpu")
    case = next(case for case in masking.cases(B, device, dtype, fused) if case.name == name)
    call = case.contestants.get(fused if contestant == "fused" else contestant)
    if call is None:
        pytest.skip(f"{name} has no {contestant}")
    if contestant == "fused":
        masking.agree(case, fused)
    benchmark.group = f"{name} B={B}"

    def run():
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
