"""Benchmarks of the masking operators at the shapes of base_16.

`python -m bench.masking` appends a row per contestant to `bench/results/masking.jsonl`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from bench import masking_baselines as baselines
from bench import rows as rows_file
from bench.measure import interleaved, keep_freed_memory, peak_mib

PATCHES, CHOSEN, TOKENS, PATCH_SIZE, IMAGE_SIZE = 196, 98, 77, 16, 224


class Case(NamedTuple):
    """One measured operation: its contestants, and the bytes that no implementation can avoid moving."""

    name: str
    contestants: dict[str, Callable[[], object]]
    bytes_moved: int


def cases(B: int, device: torch.device, dtype: torch.dtype, fused: str) -> list[Case]:
    """All cases for a batch; `fused` names the implementation that is compared."""
    return [
        *(select(B, D, lengths, device, dtype, fused) for D in (512, 64) for lengths in ("captions", "full")),
        *rows(B, 768, device, dtype, fused),
        *(patch_loss(B, kind, device, dtype, fused) for kind in ("l1", "mse_normalised")),
    ]


def select(B: int, D: int, lengths: str, device: torch.device, dtype: torch.dtype, fused: str) -> Case:
    """Captions of 8 to 40 of 77 tokens, or full ones; half of the patches masked, half dropped."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(B, PATCHES, D, generator=generator).to(device, dtype)
    tokens = torch.randn(B, TOKENS, D, generator=generator).to(device, dtype)
    count = torch.randint(8, 41, (B, 1), generator=generator) if lengths == "captions" else torch.tensor(TOKENS)
    valid = (torch.arange(TOKENS) < count).expand(B, -1).contiguous()
    moved = (B * PATCHES + int(valid.sum())) * D * patches.element_size() + B * PATCHES * (4 + 2 * 8)
    valid = valid.to(device)
    sizes = {"num_masked": CHOSEN, "num_dropped": CHOSEN}

    def run(impl: str) -> Callable[[], object]:
        return lambda: kernels.attentive_select(patches, tokens, valid, **sizes, impl=impl)

    contestants = {
        fused: run(fused),
        "composition": lambda: baselines.select(patches, tokens, valid, **sizes),
        "reference": run("reference"),
    }
    return Case(f"attentive_select D={D} {lengths}", contestants, moved)


def rows(B: int, D: int, device: torch.device, dtype: torch.dtype, fused: str) -> list[Case]:
    """Gather and scatter with pos and prefix or fill, both directions, beside one index_select of as many rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, PATCHES, D, generator=generator).to(device, dtype).requires_grad_()
    index = torch.rand(B, PATCHES, generator=generator).argsort(1)[:, :CHOSEN].sort(1).values.to(device)
    short = torch.randn(B, CHOSEN, D, generator=generator).to(device, dtype).requires_grad_()
    pos = torch.randn(PATCHES, D, generator=generator).to(device).requires_grad_()
    token = torch.randn(D, generator=generator).to(device).requires_grad_()
    all_rows, short_rows = x.detach().view(-1, D), short.detach().view(-1, D)
    sample = torch.arange(B, device=device)[:, None]
    # the rows that a gather reads and as many as it writes
    first = (index + sample * PATCHES)[:, :1]
    plain_gather = all_rows, torch.cat([first, index + sample * PATCHES], 1).flatten()
    # as many rows as a scatter writes, of those that it reads
    plain_scatter = short_rows, (torch.arange(PATCHES, device=device) * CHOSEN // PATCHES + sample * CHOSEN).flatten()
    # a scatter's backward reads more than it writes: half of each
    half = torch.arange(0, PATCHES, 4, device=device)
    plain_half = all_rows, (torch.cat([index, half.expand(B, -1)], 1) + sample * PATCHES).flatten()
    row_bytes = B * D * x.element_size()

    def gather(impl: str) -> Tensor:
        return kernels.gather_patches(x, index, pos=pos, prefix=token, impl=impl)

    def scatter(impl: str) -> Tensor:
        return kernels.scatter_patches(short, index, token, num_patches=PATCHES, pos=pos, impl=impl)

    def copies(source: Tensor, places: Tensor) -> Callable[[], object]:
        return lambda: source.index_select(0, places)

    found = []
    for name, function, leaves, plain, opposite, moved in (
        ("gather_patches", gather, (x, pos, token), plain_gather, plain_scatter, (2 * CHOSEN + 1, CHOSEN + PATCHES)),
        ("scatter_patches", scatter, (short, pos, token), plain_scatter, plain_half, (CHOSEN + PATCHES,) * 2),
    ):
        forward = {impl: no_grad(function, impl) for impl in (fused, "reference")}
        found.append(Case(f"{name} forward", forward | {"index_select": copies(*plain)}, moved[0] * row_bytes))
        backward = {impl: backwards(function, impl, leaves) for impl in (fused, "reference")}
        found.append(Case(f"{name} backward", backward | {"index_select": copies(*opposite)}, moved[1] * row_bytes))
    return found


def patch_loss(B: int, kind: str, device: torch.device, dtype: torch.dtype, fused: str) -> Case:
    """Forward and backward; the image is read twice, as the target is not kept."""
    generator = torch.Generator().manual_seed(0)
    values = PATCH_SIZE**2 * 3
    images = torch.randn(B, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(device)
    pred = torch.randn(B, CHOSEN, values, generator=generator).to(device, dtype).requires_grad_()
    index = torch.rand(B, PATCHES, generator=generator).argsort(1)[:, :CHOSEN].sort(1).values.to(device)

    def step(function: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(), pred)

    def run(impl: str) -> Callable[[], Tensor]:
        return lambda: kernels.masked_patch_loss(pred, images, index, patch_size=PATCH_SIZE, kind=kind, impl=impl)

    contestants = {
        fused: step(run(fused)),
        "composition": step(lambda: baselines.patch_loss(pred, images, index, PATCH_SIZE, kind)),
        "reference": step(run("reference")),
    }
    moved = B * CHOSEN * values * (3 * pred.element_size() + 2 * images.element_size())
    return Case(f"masked_patch_loss {kind}", contestants, moved)


def no_grad(function: Callable[[str], Tensor], impl: str) -> Callable[[], object]:
    def run() -> Tensor:
        with torch.no_grad():
            return function(impl)

    return run


def backwards(function: Callable[[str], Tensor], impl: str, leaves: tuple[Tensor, ...]) -> Callable[[], object]:
    y = function(impl)
    dy = torch.ones_like(y)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def agree(case: Case, fused: str) -> None:
    """Raise unless the fused form gives what the reference gives, up to rounding."""
    got, expected = (flat(case.contestants[name]()) for name in (fused, "reference"))
    # index lists may differ where two scores differ by less than rounding; the scores themselves come first
    count = 1 if case.name.startswith("attentive_select") else len(expected)
    for left, right in zip(got[:count], expected[:count]):
        error = (left.double() - right.double()).abs().max().item()
        limit = 16 * torch.finfo(left.dtype).eps * max(1.0, right.abs().max().item())
        if error > limit:
            raise AssertionError(f"{case.name}: error {error:.3g} above {limit:.3g}")


def flat(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def copy_gbytes_per_second(device: torch.device) -> float:
    """Bytes read and written per second by a copy of 256 MiB."""
    source = torch.empty(64 * 2**20, device=device).zero_()
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, 20)["copy"]
    return 2 * source.nbytes / timing.p50_ms / 1e6


def measure(device: torch.device, file: str) -> None:
    """Measure all cases and append their rows to a result file: correctness first, contestants in turns."""
    if device.type == "cuda":
        _measure(cases(2048, device, torch.bfloat16, "triton"), 2048, torch.bfloat16, "triton", device, file)
        return
    for keep in (False, True):
        keep_freed_memory(keep)
        for dtype in (torch.float32, torch.bfloat16):
            _measure(cases(64, device, dtype, "cpu"), 64, dtype, "cpu", device, file, "kept" if keep else "fresh")


def _measure(
    found: list[Case], B: int, dtype: torch.dtype, fused: str, device: torch.device, file: str, memory: str = ""
) -> None:
    gpu = device.type == "cuda"
    bandwidth = copy_gbytes_per_second(device)
    for case in found:
        agree(case, fused)
        contestants = dict(case.contestants)
        if gpu and "composition" in contestants:
            contestants["compiled"] = torch.compile(contestants["composition"])
        for name, timing in interleaved(contestants, 50 if gpu else 15).items():
            rate = case.bytes_moved / timing.p50_ms / 1e6
            row = rows_file.write(
                file,
                operator=case.name + (f", {memory} memory" if memory else ""),
                implementation=name,
                batch=B,
                dtype=str(dtype).removeprefix("torch."),
                **timing._asdict(),
                peak_mib=peak_mib(contestants[name]),
                gbytes_per_second=rate,
                copy_share=rate / bandwidth,
            )
            print(
                f"{row['operator']:50} {row['dtype']:9} {name:13} {timing.p50_ms:9.3f} ms {rate:8.1f} GB/s "
                f"{row['copy_share']:6.1%}",
                flush=True,
            )


if __name__ == "__main__":
    measure(torch.device("cuda" if torch.cuda.is_available() else "cpu"), "masking")
