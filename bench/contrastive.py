"""Measurements of the contrastive operators, each a row."""

import math
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from bench import rows
from bench.baselines import contrastive_peers, four_products, siglip_peers
from bench.measure import interleaved, peak_mib
from kernels import reference

SCALE, BIAS = 14.3, -10.0
# Mean cosine of pairs and of non-pairs.
COSINES = {"random": (0.0, 0.0), "clip-like": (0.38, 0.07), "converged": (0.94, 0.05), "anti-correlated": (-0.1, -0.1)}
# A gradient below it is judged by its absolute error.
SMALL_NORM = 1e-6
# Measured rate of the 8192^3 bf16 product on an H200.
H200_TFLOPS = 788.0


def features(B: int, D: int, dtype: torch.dtype, device: torch.device, scalars: int = 1) -> tuple[Tensor, ...]:
    """Unit features (B, D) of image and text, and scale (and bias); fresh, and all learn."""
    pair = (F.normalize(torch.randn(B, D, device=device), dim=1).to(dtype) for _ in "it")
    values = (torch.tensor([value], device=device) for value in (SCALE, BIAS)[:scalars])
    return tuple(x.requires_grad_() for x in (*pair, *values))


def step(loss: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    """Forward and backward with new gradients; 16-bit features meet the fp32 scale under autocast."""
    x = inputs[0]

    def run() -> None:
        with torch.autocast(x.device.type, x.dtype if x.dtype != torch.float32 else None, x.dtype != torch.float32):
            value = loss(*inputs)
        # A peer may have no gradient for the scale.
        torch.autograd.grad(value, inputs, allow_unused=True)

    return run


def forward(loss: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    return lambda: loss(*inputs)


def measure_itc(
    B: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    rounds: int,
    peers: Collection[str] | None = None,
    file: str | None = None,
) -> list[dict[str, Any]]:
    """Time, memory and share of the limit of the contrastive loss and of `peers` (None: all), on the same inputs."""
    inputs = features(B, D, dtype, device)
    losses: dict[str, Callable[..., Tensor]] = {"ours": kernels.fused_itc_loss}
    if "gluon" in kernels.implementations("fused_itc_loss"):
        losses["ours, gluon"] = partial(kernels.fused_itc_loss, impl="gluon")
    losses |= {n: loss for n, loss in contrastive_peers(device).items() if peers is None or n in peers}
    return _measure("fused_itc_loss", losses, inputs, 4, rounds, file)


def measure_siglip(
    B: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    rounds: int,
    file: str | None = None,
) -> list[dict[str, Any]]:
    """As `measure_itc`, for the sigmoid loss."""
    losses = {"ours": kernels.fused_siglip_loss} | siglip_peers(device)
    return _measure("fused_siglip_loss", losses, features(B, D, dtype, device, 2), 3, rounds, file)


def measure_small(B: int, D: int, device: torch.device, *, rounds: int, file: str | None) -> list[dict[str, Any]]:
    """Time of both losses at a size where calls cost as much as products: what `auto` takes, and the plain forms."""
    measured = []
    for loss, scalars in ((kernels.fused_itc_loss, 1), (kernels.fused_siglip_loss, 2)):
        inputs = features(B, D, torch.float32, device, scalars)
        losses = {"ours": loss, "ours, cpu": partial(loss, impl="cpu"), "reference": partial(loss, impl="reference")}
        peers = contrastive_peers(device) if scalars == 1 else siglip_peers(device)
        losses |= {name: peer for name, peer in peers.items() if name in ("open_clip", "eager")}
        timings = interleaved({name: step(each, inputs) for name, each in losses.items()}, rounds)
        shape = {
            "operator": f"fused_{'itc' if scalars == 1 else 'siglip'}_loss, small",
            "B": B,
            "D": D,
            "dtype": "float32",
        }
        measured += [{**shape, "case": name, **timing._asdict()} for name, timing in timings.items()]
    return [rows.write(file, **row) for row in measured] if file else measured


def _measure(
    operator: str, losses: dict, inputs: tuple[Tensor, ...], products: int, rounds: int, file: str | None
) -> list[dict[str, Any]]:
    B, D = inputs[0].shape
    device = inputs[0].device
    peaks, failed = _trials(losses, inputs)
    cases = {name: step(losses[name], inputs) for name in peaks}
    cases |= {f"{name} forward": forward(losses[name], inputs) for name in peaks if name.startswith("ours")}
    if device.type == "cpu":
        cases["products"] = four_products(*(x.detach() for x in inputs[:2]))
    # Trials have warmed a CPU; a GPU chooses its products once more in the first round.
    timings = interleaved(cases, rounds, warm=device.type == "cpu")
    flop = products * 2 * B * B * D
    measured = []
    for name, timing in timings.items():
        row = {"operator": operator, "case": name, "B": B, "D": D, "dtype": str(inputs[0].dtype).removeprefix("torch.")}
        row |= timing._asdict()
        if device.type == "cuda":
            share = flop / (timing.p50_ms * 1e-3) / (H200_TFLOPS * 1e12)
            row["share_of_limit"] = share * (0.25 if name.endswith("forward") else 1.0)
        elif products == 4 and name != "products":
            row["over_products"] = timing.p50_ms / timings["products"].p50_ms
        if name in peaks:
            row["peak_mib"] = peaks[name]
        measured.append(row)
    measured += [{"operator": operator, "case": name, "B": B, "D": D, "error": text} for name, text in failed.items()]
    return [rows.write(file, **row) for row in measured] if file else measured


def _mib(gradients: tuple[Tensor, ...]) -> float:
    """The gradients that a step returns are no overhead."""
    return sum(x.numel() * x.element_size() for x in gradients) / 2**20


def _trials(losses: dict, inputs: tuple[Tensor, ...]) -> tuple[dict[str, float], dict[str, str]]:
    """Peak memory, MiB above inputs and gradients, of the losses that run on these inputs, and why others do not."""
    peaks, failed = {}, {}
    on_gpu = inputs[0].is_cuda
    for name, loss in losses.items():
        run = step(loss, inputs)
        try:
            if on_gpu:
                # The first call compiles.
                run()
            peaks[name] = peak_mib(run, forked=False) - _mib(inputs)
        except Exception as reason:  # a peer may break in any way; the row says how
            if name == "ours":
                raise
            failed[name] = f"{type(reason).__name__}: {str(reason).splitlines()[0][:160] if str(reason) else ''}"
            if on_gpu:
                torch.cuda.empty_cache()
    return peaks, failed


def measure_graph(B: int, D: int, device: torch.device, *, rounds: int, file: str | None) -> list[dict[str, Any]]:
    """Replay of a captured step, ours and the compiled composition."""
    inputs = features(B, D, torch.bfloat16, device)
    cases = {}
    for name, loss in {"ours": kernels.fused_itc_loss, "compiled": contrastive_peers(device)["compiled"]}.items():
        run = step(loss, inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        cases[name] = graph.replay
    timings = interleaved(cases, rounds)
    return [
        rows.write(file, operator="fused_itc_loss", case=f"{name}, graph", B=B, D=D, dtype="bfloat16", **t._asdict())
        for name, t in timings.items()
    ]


def gradient_errors(
    B: int, D: int, scale: float, device: torch.device, dtype: torch.dtype = torch.bfloat16, peers: bool = True
) -> Iterator[tuple[str, dict[str, float]]]:
    """(regime, loss -> error) of the image gradients against fp64, relative unless they vanish.

    16-bit products under autocast, on fp32 leaves.
    """
    losses = {"ours": kernels.fused_itc_loss} | (contrastive_peers(device) if peers else {})
    for regime, (positive, negative) in COSINES.items():
        pair = [x.to(dtype).float() for x in _correlated(B, D, positive, negative, device)]
        inputs = [x.requires_grad_() for x in (*pair, torch.tensor([scale], device=device))]
        exact = [x.detach().double().requires_grad_() for x in inputs]
        truth = torch.autograd.grad(reference.itc_loss(*exact), exact)[0]
        found = {}
        for name, loss in losses.items():
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype != torch.float32):
                value = loss(*inputs)
            gradient = torch.autograd.grad(value, inputs, allow_unused=True)[0]
            error, size = (gradient - truth).norm().item(), truth.norm().item()
            found[name] = error if size < SMALL_NORM else error / size
        yield regime, found


def measure_accuracy(scale: float, device: torch.device, *, file: str, **options) -> None:
    """Rows of `gradient_errors` at the size where the documented bars are judged."""
    B, D = 4096, 512
    dtype = str(options.get("dtype", torch.bfloat16)).removeprefix("torch.")
    for regime, errors in gradient_errors(B, D, scale, device, **options):
        shape = {"B": B, "D": D, "dtype": dtype, "scale": scale}
        rows.write(file, operator="fused_itc_loss", case=f"accuracy, {regime}", **shape, gradient_errors=errors)


def _correlated(B: int, D: int, positive: float, negative: float, device: torch.device) -> list[Tensor]:
    """Unit features whose pairs have mean cosine `positive`, and non-pairs `negative`."""
    cone, pair, *noise = (F.normalize(torch.randn(n, D, device=device), dim=1) for n in (1, B, B, B))
    own = positive - negative
    common, own, rest = math.sqrt(abs(negative)), math.sqrt(own), math.sqrt(1 - abs(negative) - own)
    sides = common * cone, math.copysign(common, negative) * cone
    return [F.normalize(side + own * pair + rest * x, dim=1) for side, x in zip(sides, noise)]
