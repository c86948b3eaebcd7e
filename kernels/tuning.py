"""Choices by device and size.

Every entry names the benchmark row that justifies it, or says `unmeasured`.
"""

from typing import NamedTuple

import torch

UNMEASURED = "unmeasured"


class Threshold(NamedTuple):
    """From `size` on (the product that the operator's cost grows with) the fused implementation is taken."""

    impl: str
    size: int
    row: str


# operator -> device type -> choice; below the size the plain composition runs.
FUSED_FROM: dict[str, dict[str, Threshold]] = {
    "fused_itc_loss": {
        "cpu": Threshold("cpu", 0, UNMEASURED),
        "cuda": Threshold("triton", 2048 * 2048, UNMEASURED),
    },
    "fused_siglip_loss": {
        "cpu": Threshold("cpu", 0, UNMEASURED),
        "cuda": Threshold("triton", 2048 * 2048, UNMEASURED),
    },
    "attentive_select": {"cpu": Threshold("cpu", 0, UNMEASURED), "cuda": Threshold("triton", 0, UNMEASURED)},
    "gather_patches": {"cpu": Threshold("cpu", 0, UNMEASURED), "cuda": Threshold("triton", 0, UNMEASURED)},
    "scatter_patches": {"cpu": Threshold("cpu", 0, UNMEASURED), "cuda": Threshold("triton", 0, UNMEASURED)},
    "masked_patch_loss": {"cpu": Threshold("cpu", 0, UNMEASURED), "cuda": Threshold("triton", 0, UNMEASURED)},
}


def preferred(operator: str, device: torch.device, runnable: tuple[str, ...], *, size: int = 0) -> str:
    """Name of the implementation that `auto` takes for a problem of `size`, out of those that can run."""
    threshold = FUSED_FROM.get(operator, {}).get(device.type)
    if threshold is not None and threshold.impl in runnable and size >= threshold.size:
        return threshold.impl
    return "reference"
