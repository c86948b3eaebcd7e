"""Benchmarks of the masking operators at the shapes of base_16, and on a CPU at small ones.

`python -m bench.masking` appends a row per contestant to `bench/results/masking.jsonl`; `--small` measures the small
sizes alone.
"""

import argparse
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from bench import masking_baselines as baselines
from bench import rows as rows_file
from bench.measure import interleaved, keep_freed_memory, peak_mib


class Sizes(NamedTuple):
    """B samples of side x side patches of patch_size pixels, half of them chosen, T tokens, features of width D."""

    B: int
    side: int
    T: int
    D: int
    patch_size: int

    @property
    def P(self) -> int:
        return self.side**2

    @property
    def K(self) -> int:
        return self.P // 2


BASE_16 = Sizes(64, 14, 77, 768, 16)
# from one sample of four patches, on both sides of what `tuning.py` draws the line at
SMALL = (
    Sizes(1, 2, 3, 8, 4),
    Sizes(2, 7, 32, 64, 4),
    Sizes(16, 8, 32, 64, 4),
    Sizes(1, 14, 77, 768, 16),
    Sizes(16, 8, 32, 256, 8),
    Sizes(4, 14, 77, 768, 16),
    Sizes(64, 8, 32, 256, 8),
    Sizes(8, 16, 77, 768, 14),
)


class Case(NamedTuple):
    """One measured operation: its contestants, and the bytes that no implementation can avoid moving."""

    name: str
    contestants: dict[str, Callable[[], object]]
    bytes_moved: int
    D: int


def cases(sizes: Sizes, device: torch.device, dtype: torch.dtype, fused: str) -> list[Case]:
    """All cases; `fused` names the implementation that is compared."""
    widths = (512, 64) if sizes.D == BASE_16.D else (sizes.D,)
    return [
        *(select(sizes, D, lengths, device, dtype, fused) for D in widths for lengths in ("captions", "full")),
        *rows(sizes, device, dtype, fused),
        *(patch_loss(sizes, kind, device, dtype, fused) for kind in ("l1", "mse_normalised")),
    ]


def select(sizes: Sizes, D: int, lengths: str, device: torch.device, dtype: torch.dtype, fused: str) -> Case:
    """Captions of a tenth to a half of the tokens, or full ones; half of the patches masked, half dropped."""
    B, P, K, T = sizes.B, sizes.P, sizes.K, sizes.T
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(B, P, D, generator=generator).to(device, dtype)
    tokens = torch.randn(B, T, D, generator=generator).to(device, dtype)
    captions = torch.randint(T // 10 + 1, T // 2 + 2, (B, 1), generator=generator)
    valid = (torch.arange(T) < (captions if lengths == "captions" else T)).expand(B, -1).contiguous()
    moved = (B * P + int(valid.sum())) * D * patches.element_size() + B * P * (4 + 2 * 8)
    valid = valid.to(device)
    counts = {"num_masked": K, "num_dropped": K}

    def run(impl: str) -> Callable[[], object]:
        return lambda: kernels.attentive_select(patches, tokens, valid, **counts, impl=impl)

    contestants = {
        fused: run(fused),
        "composition": lambda: baselines.select(patches, tokens, valid, **counts),
        "reference": run("reference"),
    }
    return Case(f"attentive_select D={D} {lengths}", contestants, moved, D)


def rows(sizes: Sizes, device: torch.device, dtype: torch.dtype, fused: str) -> list[Case]:
    """Gather and scatter with pos and prefix or fill, both directions, beside one index_select of as many rows."""
    B, P, K, D = sizes.B, sizes.P, sizes.K, sizes.D
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, P, D, generator=generator).to(device, dtype).requires_grad_()
    index = torch.rand(B, P, generator=generator).argsort(1)[:, :K].sort(1).values.to(device)
    short = torch.randn(B, K, D, generator=generator).to(device, dtype).requires_grad_()
    pos = torch.randn(P, D, generator=generator).to(device).requires_grad_()
    token = torch.randn(D, generator=generator).to(device).requires_grad_()
    all_rows, short_rows = x.detach().view(-1, D), short.detach().view(-1, D)
    sample = torch.arange(B, device=device)[:, None]
    # the rows that a gather reads and as many as it writes
    first = (index + sample * P)[:, :1]
    plain_gather = all_rows, torch.cat([first, index + sample * P], 1).flatten()
    # as many rows as a scatter writes, of those that it reads
    plain_scatter = short_rows, (torch.arange(P, device=device) * K // P + sample * K).flatten()
    # a scatter's backward reads more than it writes: half of each
    half = torch.arange(0, P, 4, device=device)
    plain_half = all_rows, (torch.cat([index, half.expand(B, -1)], 1) + sample * P).flatten()
    row_bytes = B * D * x.element_size()

    def gather(impl: str) -> Tensor:
        return kernels.gather_patches(x, index, pos=pos, prefix=token, impl=impl)

    def scatter(impl: str) -> Tensor:
        return kernels.scatter_patches(short, index, token, num_patches=P, pos=pos, impl=impl)

    def copies(source: Tensor, places: Tensor) -> Callable[[], object]:
        return lambda: source.index_select(0, places)

    found = []
    for name, function, leaves, plain, opposite, moved in (
        ("gather_patches", gather, (x, pos, token), plain_gather, plain_scatter, (2 * K + 1, K + P)),
        ("scatter_patches", scatter, (short, pos, token), plain_scatter, plain_half, (K + P,) * 2),
    ):
        forward = {impl: no_grad(function, impl) for impl in (fused, "reference")}
        found.append(Case(f"{name} forward", forward | {"index_select": copies(*plain)}, moved[0] * row_bytes, D))
        backward = {impl: backwards(function, impl, leaves) for impl in (fused, "reference")}
        found.append(Case(f"{name} backward", backward | {"index_select": copies(*opposite)}, moved[1] * row_bytes, D))
    return found


def patch_loss(sizes: Sizes, kind: str, device: torch.device, dtype: torch.dtype, fused: str) -> Case:
    """Forward and backward; the image is read twice, as the target is not kept."""
    B, P, K, p = sizes.B, sizes.P, sizes.K, sizes.patch_size
    generator = torch.Generator().manual_seed(0)
    values = p**2 * 3
    images = torch.randn(B, 3, sizes.side * p, sizes.side * p, generator=generator).to(device)
    pred = torch.randn(B, K, values, generator=generator).to(device, dtype).requires_grad_()
    index = torch.rand(B, P, generator=generator).argsort(1)[:, :K].sort(1).values.to(device)

    def step(function: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(), pred)

    def run(impl: str) -> Callable[[], Tensor]:
        return lambda: kernels.masked_patch_loss(pred, images, index, patch_size=p, kind=kind, impl=impl)

    contestants = {
        fused: step(run(fused)),
        "composition": step(lambda: baselines.patch_loss(pred, images, index, p, kind)),
        "reference": step(run("reference")),
    }
    moved = B * K * values * (3 * pred.element_size() + 2 * images.element_size())
    return Case(f"masked_patch_loss {kind}", contestants, moved, values)


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


@functools.cache
def copy_gbytes_per_second(device: torch.device) -> float:
    """Bytes read and written per second by a copy of 256 MiB."""
    source = torch.empty(64 * 2**20, device=device).zero_()
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, 20)["copy"]
    return 2 * source.nbytes / timing.p50_ms / 1e6


def measure(device: torch.device, file: str, small: bool = False) -> None:
    """Measure all cases and append their rows to a result file: correctness first, contestants in turns."""
    if device.type == "cuda":
        _measure(BASE_16._replace(B=2048), torch.bfloat16, "triton", device, file, 50)
        return
    dtypes = torch.float32, torch.bfloat16
    for memory in () if small else ("fresh", "kept"):
        keep_freed_memory(memory == "kept")
        for dtype in dtypes:
            _measure(BASE_16, dtype, "cpu", device, file, 15, memory)
    keep_freed_memory(True)
    for dtype in dtypes:
        for sizes in SMALL:
            _measure(sizes, dtype, "auto", device, file, 31, "kept", ("auto", "reference"))


def _measure(
    sizes: Sizes,
    dtype: torch.dtype,
    fused: str,
    device: torch.device,
    file: str,
    rounds: int,
    memory: str = "",
    only: tuple[str, ...] | None = None,
) -> None:
    bandwidth = copy_gbytes_per_second(device)
    for case in cases(sizes, device, dtype, fused):
        agree(case, fused)
        contestants = {name: call for name, call in case.contestants.items() if only is None or name in only}
        if device.type == "cuda" and "composition" in contestants:
            contestants["compiled"] = torch.compile(contestants["composition"])
        for name, timing in interleaved(contestants, rounds).items():
            rate = case.bytes_moved / timing.p50_ms / 1e6
            row = rows_file.write(
                file,
                operator=case.name + (f", {memory} memory" if memory else ""),
                case=name,
                B=sizes.B,
                P=sizes.P,
                K=sizes.K,
                T=sizes.T,
                D=case.D,
                dtype=str(dtype).removeprefix("torch."),
                **timing._asdict(),
                peak_mib=peak_mib(contestants[name]),
                gbytes_per_second=rate,
                copy_share=rate / bandwidth,
            )
            print(
                f"{row['operator']:50} {sizes.B:4} x {sizes.P:3} {row['dtype']:9} {name:13} {timing.p50_ms:9.3f} ms "
                f"{rate:8.1f} GB/s {row['copy_share']:6.1%}",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the small sizes of a CPU alone")
    measure(torch.device("cuda" if torch.cuda.is_available() else "cpu"), "masking", parser.parse_args().small)
