"""A batch in parts: `python -m bench.two_pass [--preset NAME] [--pairs N] [--times 1 4 16 64]`.

Forward, backward and optimizer of SyCoCa on N pairs at a time, the batch as many times as large, each size in a process
of its own; beside it the same batches at once, as far as `--at-once` says. Peak memory is above what model, optimizer
and libraries hold before the first step. Rows: `bench/results/two_pass.jsonl`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import rows
from bench.step import ROOT, captions
from bench.step_worker import held_mib, mixed, peak_mib
from sycoca.config import ConfigError
from sycoca.contrast import Spread
from sycoca.images import normalise
from sycoca.model import Batch, StepPlan, SyCoCa, parameter_groups
from sycoca.presets import MODEL_PRESETS
from sycoca.two_pass import first_pass
from train.config import PRESETS
from train.optim import build_optimizer

OPERATOR = "training step in parts"


def steps(preset: str, pairs: int, parts: int, rounds: int) -> dict:
    """Takes `rounds` steps and one before them, here and now; times and memory of this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = MODEL_PRESETS[preset]
    torch.manual_seed(0)
    model = SyCoCa(config).to(device)
    optimizer = build_optimizer(parameter_groups(model, 0.1), PRESETS[preset].optimizer)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    tokens = captions("scenes", pairs, preset)
    before = _forget_peak(device)
    # Pictures are made here so that they count: all of them are held until the step is taken.
    side, generator = config.vision.image_size, torch.Generator().manual_seed(0)
    held = [
        Batch(
            torch.randint(0, 256, (pairs, side, side, 3), dtype=torch.uint8, generator=generator),
            tokens,
            torch.arange(pairs) + number * pairs,
            None,
        )
        for number in range(parts)
    ]
    plan = StepPlan(config.selects, config.num_dropped > 0)

    def load(batch: Batch) -> Batch:
        images, words, seeds, _ = (None if x is None else x.to(device, non_blocking=True) for x in batch)
        return Batch(normalise(images), words, seeds, None)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        if parts == 1:
            with mixed(device):
                loss = model(load(held[0]), plan).total
            loss.backward()
        else:
            with mixed(device):
                known = first_pass(model, held, Spread(), load)
            for part, batch in zip(known, held, strict=True):
                with mixed(device):
                    loss = part.losses(model, load(batch), plan).total / parts
                loss.backward()
        optimizer.step()

    taken = []
    for number in range(rounds + 1):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number:
            taken.append((time.perf_counter() - started) * 1e3)
    return {"p50_ms": statistics.median(taken), "peak_mib": peak_mib(device) - before}


def _forget_peak(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return held_mib(device)


def measured(preset: str, pairs: int, parts: int, rounds: int, file: str) -> dict | None:
    """A row of `pairs` x `parts`, measured in a process of its own; None where it ran out of memory."""
    command = [sys.executable, "-m", "bench.two_pass", "--worker", "--preset", preset, "--pairs", str(pairs)]
    command += ["--times", str(parts), "--rounds", str(rounds), "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return None
    shape = {"operator": OPERATOR, "preset": preset, "micro_batch": pairs, "parts": parts, "B": pairs * parts}
    found = json.loads(done.stdout)
    per_pair = {"ms_per_pair": found["p50_ms"] / (pairs * parts)}
    return rows.write(file, case="two passes" if parts > 1 else "one pass", rounds=rounds, **shape, **found, **per_pair)


def line(row: dict) -> str:
    """A row for a person."""
    return (
        f"{row['case']:12}{row['micro_batch']:6} x {row['parts']:<4}{row['ms_per_pair']:9.3f} ms a pair"
        f"{row['peak_mib']:9.0f} MiB"
    )


def largest(preset: str, total: int, rounds: int, file: str) -> None:
    """The largest batch at once, and `total` pairs in parts of that size: how much longer a pair takes."""
    pairs, best = 64, None
    while pairs <= total and (row := measured(preset, pairs, 1, rounds, file)) is not None:
        print(line(row), flush=True)
        pairs, best = 2 * pairs, row
    if best is None:
        raise ConfigError(f"bench.two_pass: {preset} does not take 64 pairs here")
    row = measured(preset, best["micro_batch"], total // best["micro_batch"], rounds, file)
    print(line(row), f"\n{row['ms_per_pair'] / best['ms_per_pair']:.2f} times the time per pair")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base_16" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--pairs", type=int, default=256 if torch.cuda.is_available() else 32)
    parser.add_argument("--times", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--at-once", type=int, nargs="*", default=[4], help="of these, measured in one part too")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.preset not in MODEL_PRESETS:
        print(f"bench.two_pass: --preset {options.preset}: known are {', '.join(MODEL_PRESETS)}", file=sys.stderr)
        return 2
    if options.worker:
        torch.set_num_threads(options.threads)
        print(json.dumps(steps(options.preset, options.pairs, options.times[0], options.rounds)))
        return 0
    for parts in options.times:
        for pairs, pieces in [(options.pairs, parts)] + [(options.pairs * parts, 1)] * (parts in options.at_once):
            row = measured(options.preset, pairs, pieces, options.rounds, "two_pass")
            print(line(row) if row else f"{pairs} x {pieces}: failed", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
