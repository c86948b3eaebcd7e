"""The contrastive rows of a CPU: `python -m bench.cpu [--full] [--only TEXT...] [--threads N]`.

On one thread the processor's time is taken, which other work on the machine does not lengthen; on more, the clock's.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from bench import contrastive

FILE = "cpu"
CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
# Without bf16 instructions a CPU takes minutes for the peers' 16-bit products from a few thousand pairs on.
BF16_PEERS = ("open_clip",)


def _itc(B: int, dtype: torch.dtype, rounds: int = 3, peers=None, D: int = 512) -> None:
    contrastive.measure_itc(B, D, dtype, CPU, rounds=rounds, peers=peers, file=FILE)


def _small(B: int) -> None:
    contrastive.measure_small(B, 256, CPU, rounds=21, file=FILE)


def _accuracy(dtype: torch.dtype) -> None:
    for scale in (14.3, 100.0):
        contrastive.measure_accuracy(scale, CPU, dtype=dtype, peers=dtype == FP32, file=FILE)


SHORT: dict[str, Callable[[], object]] = {
    **{
        f"small {B}": partial(contrastive.measure_small, B, 256, CPU, rounds=21, file=FILE)
        for B in (32, 128, 256, 512, 1024)
    },
    **{f"fp32 {B}": partial(_itc, B, FP32) for B in (1024, 2048, 4096)},
    "bf16 1024": partial(_itc, 1024, BF16, 1, BF16_PEERS),
    **{f"bf16 {B}": partial(_itc, B, BF16, 3, ()) for B in (2048, 4096)},
    "siglip 2048": lambda: contrastive.measure_siglip(2048, 512, FP32, CPU, rounds=3, file=FILE),
}
LONG: dict[str, Callable[[], object]] = {
    "fp32 8192": partial(_itc, 8192, FP32, 1),
    "bf16 8192": partial(_itc, 8192, BF16, 1, ()),
    "fp32 16384": partial(_itc, 16384, FP32, 1, ("open_clip",)),
    "bf16 16384": partial(_itc, 16384, BF16, 1, ()),
    "accuracy fp32": partial(_accuracy, FP32),
    "accuracy bf16": partial(_accuracy, BF16),
    "bf16 open_clip 4096": partial(_itc, 4096, BF16, 1, BF16_PEERS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the larger sizes and the errors as well")
    parser.add_argument("--only", nargs="+", help="what has one of these texts in its name, of all")
    parser.add_argument("--threads", type=int, help="threads of torch; by default as many as it takes itself")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    # The first call loads the compiler's front end, which no loss's memory should hold.
    contrastive.step(contrastive.kernels.fused_itc_loss, contrastive.features(64, 8, FP32, CPU))()
    chosen = SHORT | LONG if options.full or options.only else SHORT
    for name, measure in chosen.items():
        if not options.only or any(text in name for text in options.only):
            print(f"== {name}", flush=True)
            measure()


if __name__ == "__main__":
    main()
