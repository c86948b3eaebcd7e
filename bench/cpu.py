"""The contrastive rows of a CPU: `python -m bench.cpu [--full]`.

One thread, and the processor's time, so that other work on the machine does not lengthen what is measured.
"""

import argparse

import torch

from bench import contrastive

FILE = "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="B = 16,384 and 65,536 as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        # Without its own bf16 instructions a CPU takes minutes for the peers' 16-bit products.
        peers = dtype == torch.float32
        for B in (1024, 2048, 4096):
            contrastive.measure_itc(B, 512, dtype, device, rounds=3, peers=peers, file=FILE)
        if options.full:
            contrastive.measure_itc(16384, 512, dtype, device, rounds=1, peers=False, file=FILE)
    contrastive.measure_siglip(2048, 512, torch.float32, device, rounds=3, file=FILE)
    if options.full:
        contrastive.measure_itc(65536, 64, torch.bfloat16, device, rounds=1, peers=False, file=FILE)


if __name__ == "__main__":
    main()
