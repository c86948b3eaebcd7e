"""`pytest bench/test_xvlm.py --benchmark-only`: the region operators beside what they replace."""

import pytest
import torch

from bench import xvlm, xvlm_step
from bench.measure import interleaved

TIMES_FASTER = 5


@pytest.fixture(scope="module")
def found(device):
    """The cases at full size, checked, and the name of the fused form."""
    fused, dtype = ("triton", torch.bfloat16) if device.type == "cuda" else ("cpu", torch.float32)
    return fused, xvlm.cases(device, dtype, fused)


@pytest.mark.parametrize("number", range(len(xvlm.PAIRS) + 2 * len(xvlm.REGIONS) + 1))
@pytest.mark.parametrize("contestant", ["fused", "composition", "reference"])
def test_regions(benchmark, device, found, number, contestant):
    fused, cases = found
    case = cases[number]
    if contestant == "fused":
        xvlm.check(case, fused)
    call = case.contestants[fused if contestant == "fused" else contestant]
    benchmark.group = f"{case.name} {case.sizes}"

    def synchronised():
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=3, warmup_rounds=1)


def test_hard_negatives_beside_the_published_loop(benchmark, found):
    """On one thread, where processor time is taken: what else runs on the machine does not count."""
    fused, cases = found
    case = next(case for case in cases if case.sizes.get("B") == max(xvlm.PAIRS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        timings = interleaved({name: case.contestants[name] for name in (fused, xvlm.LOOP)}, 7)
        benchmark.pedantic(case.contestants[fused], rounds=3)
    finally:
        torch.set_num_threads(threads)
    assert timings[xvlm.LOOP].p50_ms >= TIMES_FASTER * timings[fused].p50_ms


def test_a_region_step_that_shares_its_work(benchmark):
    """Other work beside it takes from the factor of 2 that a quiet machine shows."""
    calls = xvlm_step.steps("xvlm_tiny", 128)
    losses = [call() for call in calls.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = interleaved(calls, 3)
        benchmark.pedantic(calls["shared"], rounds=1)
    finally:
        torch.set_num_threads(threads)
    assert found["published"].p50_ms >= 1.8 * found["shared"].p50_ms
