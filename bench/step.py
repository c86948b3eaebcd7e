"""The whole training step: `python -m bench.step [--against CHECKOUT] [--pairs N] [--rounds N] [--captions SOURCE]`.

Forward, backward, clipping and optimizer of SyCoCa, CoCa and open_clip's CoCa of the same size, each in a process of
its own, one step of each per round so that all meet the same machine. With `--against` also those of another checkout.
Captions come from the source, since what padding costs depends on their lengths. Rows: `bench/results/step.jsonl`.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench import rows
from sycoca.presets import MODEL_PRESETS
from sycoca.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
OURS = ("sycoca", "coca")


class Contestant(NamedTuple):
    """A step in a process of its own."""

    name: str
    process: subprocess.Popen

    def ask(self, line: str) -> dict:
        """What the process answers to a line.

        Raises:
            RuntimeError: it ended instead.
        """
        with contextlib.suppress(BrokenPipeError):
            print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"bench.step: {self.name} ended with status {self.process.wait()}")
        return json.loads(answer)


def captions(source: str, pairs: int, preset: str) -> Tensor:
    """Tokens (B, T) of real captions.

    Args:
        source: as `train.data.open_dataset` takes it.
        pairs: B.
        preset: whose context length and vocabulary are used.
    """
    from train.data import open_dataset

    text = MODEL_PRESETS[preset].text
    words = list(open_dataset(source, "train").texts(4 * pairs + 2000))
    tokenizer = Tokenizer.train(words, min(text.vocab_size, 4096))
    # Captions of one image stand together; a batch holds one of each.
    tokens = tokenizer.encode(words[:: max(1, len(words) // pairs)][:pairs], text.context_length)
    swap = torch.tensor([tokenizer.pad_id, tokenizer.sot_id, tokenizer.eot_id])
    for own, wanted in zip(swap.tolist(), (text.pad_id, text.sot_id, text.eot_id)):
        tokens = torch.where(tokens == own, -1 - wanted, tokens)
    return torch.where(tokens < 0, -1 - tokens, tokens)


@contextlib.contextmanager
def started(names: list[str], roots: dict[str, Path], preset: str, tokens: Tensor, *, recompute: bool = False):
    """The contestants `name` or `name@checkout`, ended with the block."""
    device, extra = ("cuda" if torch.cuda.is_available() else "cpu"), ["--recompute"] if recompute else []
    with tempfile.NamedTemporaryFile(suffix=".pt") as file, contextlib.ExitStack() as stack:
        torch.save(tokens, file.name)
        contestants = []
        for name in names:
            kind, _, checkout = name.partition("@")
            command = [sys.executable, str(Path(__file__).with_name("step_worker.py")), "--contestant", kind]
            command += ["--root", str(roots[checkout]), "--preset", preset, "--tokens", file.name, "--device", device]
            command += ["--threads", str(torch.get_num_threads()), *extra]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(process.wait)
            stack.callback(process.stdin.close)
            contestants.append(Contestant(name, process))
        yield contestants


def measure(
    contestants: list[Contestant], tokens: Tensor, preset: str, *, rounds: int, captions: str, file: str
) -> dict[str, dict]:
    """Measures and writes a row for each contestant; returns the rows by name."""
    pairs = len(tokens)
    taken: dict[str, list[float]] = {c.name: [] for c in contestants}
    losses = {}
    for number in range(-1, rounds):
        for contestant in contestants:
            answer = contestant.ask("step")
            losses.setdefault(contestant.name, answer["loss"])
            if number >= 0:
                taken[contestant.name].append(answer["ms"])
    # The contestants have started and wait, but threads that waited for work spin on for a moment.
    time.sleep(1)
    rate = product_rate()
    lengths = (tokens != MODEL_PRESETS[preset].text.pad_id).sum(1).float()
    shape = {"operator": "training step", "preset": preset, "B": pairs, "captions": captions, "rounds": rounds}
    shape |= {"tokens_mean": round(lengths.mean().item(), 2), "tokens_max": int(lengths.max())}
    written = {}
    for contestant in contestants:
        p50 = statistics.median(taken[contestant.name])
        # Counted last: the plain forms that are counted take memory of their own.
        peak = contestant.ask("peak")["peak_mib"]
        fifths = statistics.quantiles(taken[contestant.name] * 2, n=5, method="inclusive")
        p20, p80 = fifths[0], fifths[3]
        row = {"case": contestant.name, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80}
        row |= {"pairs_per_s": pairs / p50 * 1e3, "peak_mib": peak, "first_loss": losses[contestant.name]}
        if "@" not in contestant.name:
            row["tflops"] = contestant.ask("flops")["flops"] / 1e12
            row |= contestant.ask("phases")
            row["tflops_per_s"] = row["tflops"] / p50 * 1e3
            row["shares"] = contestant.ask("kinds")
            row["product_tflops_per_s"] = rate
            row["mfu"] = row["tflops_per_s"] / rate
        written[contestant.name] = rows.write(file, **shape, **row)
    return written


def product_rate() -> float:
    """TFLOP/s of one large matrix product here, the rate that a step is held against: bf16 on CUDA, else fp32."""
    if torch.cuda.is_available():
        from bench.measure import interleaved

        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
        return 2 * 8192**3 / interleaved({"product": lambda: a @ b}, 20)["product"].p50_ms / 1e9
    a, b = torch.randn(2048, 1024), torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(40):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 2048 * 1024**2 / best / 1e12


def lines(found: dict[str, dict]) -> Iterator[str]:
    """Rows and ratios for a person."""
    for name, row in found.items():
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in list(row.get("shares", {}).items())[:4])
        rate = f", MFU {row['mfu']:.0%} ({row['tflops']:.3f} TFLOP a step)" if "mfu" in row else ""
        yield (
            f"{name:24} {row['p50_ms']:8.0f} ms  {row['pairs_per_s']:7.1f} pairs/s  {row['peak_mib']:6.0f} MiB{rate}"
            + (f"; {shares}" if shares else "")
        )
        for title, shares in (("time by phase", row.get("phases")), ("forward by part", row.get("parts"))):
            if shares:
                seen = (f"{part} {share:.0%}" for part, share in shares.items() if share >= 0.005)
                yield f"    {title}: {', '.join(seen)}"

    def ratio(fast: str, slow: str) -> float:
        return found[slow]["p50_ms"] / found[fast]["p50_ms"]

    for name in found:
        if "@" in name and name.split("@")[0] in found:
            mine = name.split("@")[0]
            share = found[mine]["peak_mib"] / found[name]["peak_mib"]
            yield f"{mine}: {ratio(mine, name):.2f} times the pairs/s of {name}, {share:.2f} times its memory"
    if {"coca", "open_clip"} <= found.keys():
        share = found["coca"]["peak_mib"] / found["open_clip"]["peak_mib"]
        yield f"coca: {ratio('coca', 'open_clip'):.2f} times the pairs/s of open_clip's, {share:.2f} times its memory"
    if set(OURS) <= found.keys():
        work = found["sycoca"]["tflops"] / found["coca"]["tflops"]
        yield f"sycoca over coca: {ratio('coca', 'sycoca'):.2f} times the time, {work:.2f} times the FLOPs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, measured beside this one")
    parser.add_argument("--preset", default="base_16" if torch.cuda.is_available() else "small")
    parser.add_argument("--pairs", type=int, default=2048 if torch.cuda.is_available() else 64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--captions", default="scenes", help="a data source")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing of every block")
    parser.add_argument("--only", nargs="*", help="contestants, for example: sycoca sycoca@before")
    options = parser.parse_args()
    if options.preset not in MODEL_PRESETS:
        print(f"bench.step: --preset {options.preset}: known are {', '.join(MODEL_PRESETS)}", file=sys.stderr)
        return 2
    if MODEL_PRESETS[options.preset].fusion is not None:
        print(f"bench.step: --preset {options.preset}: X-VLM's step is that of bench.xvlm_step", file=sys.stderr)
        return 2
    roots = {"": ROOT}
    names = [*OURS, "open_clip"]
    if options.against:
        roots["before"] = options.against.resolve()
        if not (roots["before"] / "sycoca" / "model.py").is_file():
            print(f"bench.step: --against {options.against}: no checkout of this project", file=sys.stderr)
            return 2
        names += [f"{name}@before" for name in OURS]
    names = options.only or names
    tokens = captions(options.captions, options.pairs, options.preset)
    with started(names, roots, options.preset, tokens, recompute=options.recompute) as contestants:
        source = options.captions if options.captions == "scenes" else Path(options.captions).name
        found = measure(contestants, tokens, options.preset, rounds=options.rounds, captions=source, file="step")
    print("\n".join(lines(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
