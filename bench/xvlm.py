"""Benchmarks of the region operators at the sizes of X-VLM's pre-training, and on a CPU at small ones.

`python -m bench.xvlm [--threads N]` appends a row per contestant to `bench/results/xvlm.jsonl`, and says how the hard
negatives compare with the published loop. On one thread the processor's time is taken.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from bench import baselines
from bench import rows as rows_file
from bench.measure import Timing, interleaved, keep_freed_memory, peak_mib

LOOP = "published loop"
# of image-text matching: the published batch of a device, and a large one
PAIRS = (128, 1024)
SCALE = 1 / 0.07


class Regions(NamedTuple):
    """B images of side x side patches of width D, and K regions of them."""

    B: int
    side: int
    D: int
    K: int


# a region batch on Swin-B and on ViT-B/16
REGIONS = Regions(48, 7, 1024, 128), Regions(48, 14, 768, 128)
SMALL_PAIRS, SMALL_REGIONS, SMALL_BOXES = (
    (16, 256, 512),
    (Regions(8, 7, 128, 20), Regions(16, 7, 256, 40)),
    (16, 1024, 8192),
)
# all pairs of more boxes fill gigabytes
MOST_PAIRWISE = 1024


class Case(NamedTuple):
    """One measured operation: its contestants, how results are compared, and its sizes in a row."""

    name: str
    contestants: dict[str, Callable[[], object]]
    agree: Callable[[object, object], bool]
    sizes: dict[str, int]


def negatives(B: int, D: int, device: torch.device, dtype: torch.dtype, fused: str) -> Case:
    """Both directions, the product included."""
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(B, D, generator=generator), dim=1).to(device, dtype) for _ in range(2))
    seed = torch.tensor([1], device=device)

    def run(impl: str) -> Callable[[], object]:
        return lambda: kernels.sample_hard_negatives(image, text, SCALE, seed=seed, impl=impl)

    contestants = {
        fused: run(fused),
        LOOP: lambda: baselines.negatives_by_loop(image, text, SCALE),
        "composition": lambda: baselines.negatives_by_matrix(image.float(), text.float(), SCALE),
        "reference": run("reference"),
    }
    return Case("sample_hard_negatives", contestants, _draw_alike, {"B": B, "D": D})


def regions(sizes: Regions, device: torch.device, dtype: torch.dtype, fused: str) -> list[Case]:
    """Forward, and forward and backward."""
    generator = torch.Generator().manual_seed(0)
    B, side, D, K = sizes
    x = torch.randn(B, side, side, D, generator=generator).to(device, dtype)
    ends = torch.rand(K, 2, 2, generator=generator).sort(1).values * side
    rects = torch.stack([ends[:, 0].floor(), ends[:, 1].ceil()], 1).flatten(1).int()
    image_index = torch.randint(0, B, (K,), generator=generator).sort().values
    cell = torch.arange(side)
    columns, rows = ((cell >= rects[:, k, None]) & (cell < rects[:, k + 2, None]) for k in (0, 1))
    inside = (rows[:, :, None] & columns[:, None]).flatten(1).to(device)
    rects, image_index = rects.to(device), image_index.to(device)
    leaf, dy = x.clone().requires_grad_(), torch.ones(K, D, device=device, dtype=dtype)

    def run(impl: str) -> Callable[[Tensor], Tensor]:
        return lambda x: kernels.region_pool(x, rects, image_index, impl=impl)

    pools = {
        fused: run(fused),
        "composition": lambda x: baselines.regions_by_copy(x.flatten(1, 2), inside, image_index),
        "reference": run("reference"),
    }

    def forward(pool: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: pool(x)

    def step(pool: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(pool(leaf), leaf, dy)

    shape = {"B": B, "P": side * side, "K": K, "D": D}
    return [
        Case("region_pool forward", {name: forward(pool) for name, pool in pools.items()}, _close, shape),
        Case("region_pool", {name: step(pool) for name, pool in pools.items()}, _close, shape),
    ]


def boxes(E: int, device: torch.device, fused: str) -> Case:
    """Forward and backward of both losses."""
    generator = torch.Generator().manual_seed(0)
    pred, target = (torch.rand(E, 4, generator=generator).to(device) for _ in range(2))
    valid = (torch.rand(E, generator=generator) < 0.8).to(device)
    valid[0] = True
    pred.requires_grad_()

    def run(losses: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], object]:
        def step() -> object:
            l1, giou = losses()
            return l1.detach(), giou.detach(), *torch.autograd.grad(l1 + giou, pred)

        return step

    contestants = {
        fused: run(lambda: kernels.box_loss(pred, target, valid, impl=fused)),
        "reference": run(lambda: kernels.box_loss(pred, target, valid, impl="reference")),
    }
    if E <= MOST_PAIRWISE:
        contestants["composition"] = run(lambda: baselines.boxes_pairwise(pred, target, valid))
    return Case("box_loss", contestants, _close, {"B": E})


def _close(got: object, expected: object) -> bool:
    pairs = zip(*((x,) if isinstance(x, Tensor) else x for x in (got, expected)))
    return all(
        (a.double() - b.double()).abs().max() <= 16 * torch.finfo(a.dtype).eps * max(1.0, b.abs().max())
        for a, b in pairs
    )


def _draw_alike(got: object, expected: object) -> bool:
    """All but what lies within rounding of a border."""
    return all((a != b).float().mean() <= 0.01 for a, b in zip(got, expected))


def cases(device: torch.device, dtype: torch.dtype, fused: str) -> list[Case]:
    """All cases at full size."""
    return [
        *(negatives(B, 256, device, dtype, fused) for B in PAIRS),
        *(case for sizes in REGIONS for case in regions(sizes, device, dtype, fused)),
        boxes(128, device, fused),
    ]


def small(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """Around the sizes from which on `tuning.py` takes the fused form."""
    return [
        *(negatives(B, 256, device, dtype, "cpu") for B in SMALL_PAIRS),
        *(case for sizes in SMALL_REGIONS for case in regions(sizes, device, dtype, "cpu")),
        *(boxes(E, device, "cpu") for E in SMALL_BOXES),
    ]


def check(case: Case, fused: str) -> None:
    """Raise unless the fused form gives what the reference gives."""
    if not case.agree(case.contestants[fused](), case.contestants["reference"]()):
        raise AssertionError(f"{case.name} {case.sizes}: {fused} differs from the reference")


def measure(device: torch.device, file: str) -> None:
    """Measure all cases and append their rows to a result file: correctness first, contestants in turns."""
    if device.type == "cuda":
        for case in cases(device, torch.bfloat16, "triton"):
            case.contestants["compiled"] = torch.compile(case.contestants["composition"])
            _measure(case, "triton", "bfloat16", file, 50)
        return
    keep_freed_memory(True)
    for case in [*cases(device, torch.float32, "cpu"), *small(device, torch.float32)]:
        found = _measure(case, "cpu", "float32", file, 15)
        if LOOP in found:
            print(f"{found[LOOP].p50_ms / found['cpu'].p50_ms:.1f} times faster than the {LOOP}")


def _measure(case: Case, fused: str, dtype: str, file: str, rounds: int) -> dict[str, Timing]:
    check(case, fused)
    found = interleaved(case.contestants, rounds)
    for name, timing in found.items():
        peak = peak_mib(case.contestants[name])
        dtype = "float32" if case.name == "box_loss" else dtype
        rows_file.write(
            file, operator=case.name, case=name, **case.sizes, dtype=dtype, **timing._asdict(), peak_mib=peak
        )
        shape = " ".join(f"{key} {value}" for key, value in case.sizes.items())
        print(f"{case.name:24} {shape:26} {name:16} {timing.p50_ms:9.3f} ms {peak:8.1f} MiB", flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="threads of torch; by default as many as it takes itself")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    measure(torch.device("cuda" if torch.cuda.is_available() else "cpu"), "xvlm")
