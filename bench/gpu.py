"""The GPU campaign: `python -m bench.gpu`, unattended.

Correctness first: nothing is timed unless the GPU tests pass at this commit. Each stage is a process of its own with a
time limit; a stage that finished at this commit is not run again, so an interrupted campaign goes on where it was. Rows
go to `bench/results/gpu.jsonl`.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch

from bench import contrastive, masking, rows, step, two_pass, xvlm

FILE = "gpu"
STAGE_SECONDS = 530
WIDTHS = (256, 512, 768, 1024)
SWEEP = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)


def _device() -> torch.device:
    return torch.device("cuda")


def _itc(B: int, D: int, *, peers=None, rounds: int = 20, dtype: torch.dtype = torch.bfloat16) -> None:
    contrastive.measure_itc(B, D, dtype, _device(), rounds=rounds, peers=peers, file=FILE)


def _repeats() -> None:
    B, D = 16384, 768
    inputs = contrastive.features(B, D, torch.bfloat16, _device())
    first, different = None, 0
    for _ in range(100):
        gradients = torch.autograd.grad(contrastive.kernels.fused_itc_loss(*inputs), inputs)
        first = first or gradients
        different += not all(torch.equal(a, b) for a, b in zip(first, gradients))
    rows.write(FILE, operator="fused_itc_loss", case="100 runs", B=B, D=D, dtype="bfloat16", different_runs=different)


def _step(preset: str, B: int, *, recompute: bool = False, names: tuple[str, ...] = ("sycoca", "coca")) -> None:
    tokens = step.captions("scenes", B, preset)
    with step.started(list(names), {"": step.ROOT}, preset, tokens, recompute=recompute) as contestants:
        found = step.measure(contestants, tokens, preset, rounds=10, captions="scenes", file=FILE)
    print("\n".join(step.lines(found)))


# name -> measurement; in the order in which they run.
STAGES: dict[str, Callable[[], object]] = {
    **{f"itc 65536 x {D}": partial(_itc, 65536, D, rounds=10) for D in WIDTHS},
    "itc accuracy 14.3": lambda: contrastive.measure_accuracy(14.3, _device(), file=FILE),
    "itc accuracy 100": lambda: contrastive.measure_accuracy(100.0, _device(), file=FILE),
    "itc repeats": _repeats,
    "masking": lambda: masking.measure(_device(), file=FILE),
    "xvlm": lambda: xvlm.measure(_device(), file=FILE),
    "itc graph 4096": lambda: contrastive.measure_graph(4096, 768, _device(), rounds=50, file=FILE),
    "siglip 65536": lambda: contrastive.measure_siglip(65536, 768, torch.bfloat16, _device(), rounds=10, file=FILE),
    **{f"itc sweep {B}": partial(_itc, B, 768, rounds=20 if B <= 32768 else 5) for B in SWEEP},
    "itc 1048576": partial(_itc, 1048576, 768, peers=(), rounds=2),
    "step base_16 2048": partial(_step, "base_16", 2048),
    "step base_16 2048 recomputed": partial(_step, "base_16", 2048, recompute=True),
    "step base_16 256 beside open_clip": partial(_step, "base_16", 256, names=("coca", "open_clip")),
    **{
        f"step base_16 {B} recomputed, memory": partial(_step, "base_16", B, recompute=True, names=("sycoca",))
        for B in (4096, 8192)
    },
    "step base_16 16384 in two passes": lambda: two_pass.largest("base_16", 16384, 3, FILE),
    "itc fp32 16384": partial(_itc, 16384, 512, dtype=torch.float32, rounds=5),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", help="run this stage in this process")
    parser.add_argument("--only", help="run the stages whose name holds this text")
    parser.add_argument("--again", action="store_true", help="run stages that have finished at this commit, too")
    parser.add_argument("--list", action="store_true", help="print the stages")
    options = parser.parse_args()
    if options.list:
        print("\n".join(STAGES))
        return 0
    if not torch.cuda.is_available():
        print("bench.gpu: no CUDA device is visible", file=sys.stderr)
        return 2
    if options.stage:
        STAGES[options.stage]()
        return 0
    return _campaign([name for name in STAGES if not options.only or options.only in name], options.again)


def _campaign(names: list[str], again: bool) -> int:
    done = set() if again else _done()
    if "tests" not in done and not _run("tests", [sys.executable, "-m", "pytest", "tests/kernels", "-m", "gpu", "-q"]):
        print("bench.gpu: the GPU tests fail, so nothing is timed", file=sys.stderr)
        return 1
    failed = []
    for name in names:
        if name not in done and not _run(name, [sys.executable, "-m", "bench.gpu", "--stage", name]):
            failed.append(name)
    if failed:
        print(f"bench.gpu: failed stages: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(name: str, command: list[str]) -> bool:
    print(f"== {name}", flush=True)
    try:
        status = subprocess.run(command, cwd=rows.RESULTS.parents[1], timeout=STAGE_SECONDS).returncode
    except subprocess.TimeoutExpired:
        status = f"no end within {STAGE_SECONDS} s"
    rows.write(f"{FILE}_stages", stage=name, status=status)
    return status == 0


def _done() -> set[str]:
    commit = rows.environment()["commit"]
    return {row["stage"] for row in rows.read() if row.get("stage") and row["status"] == 0 and row["commit"] == commit}


if __name__ == "__main__":
    sys.exit(main())
