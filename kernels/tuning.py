"""Choices by device and size.

Every entry names the benchmark row that justifies it, or says `unmeasured`.
"""

from typing import NamedTuple

import torch

UNMEASURED = "unmeasured"
MASKING_ROWS = "bench/results/masking.jsonl"
XVLM_ROWS = "bench/results/xvlm.jsonl"
CPU_ROWS = "bench/results/cpu.jsonl"


class Threshold(NamedTuple):
    """From `size` on (the product that the operator's cost grows with) the fused implementation is taken."""

    impl: str
    size: int
    row: str


# operator -> device type -> choice; below the size the plain composition runs.
FUSED_FROM: dict[str, dict[str, Threshold]] = {
    "fused_itc_loss": {
        "cpu": Threshold("cpu", 0, CPU_ROWS),
        "cuda": Threshold("triton", 2048 * 2048, UNMEASURED),
    },
    "fused_siglip_loss": {
        "cpu": Threshold("cpu", 1 << 19, CPU_ROWS),
        "cuda": Threshold("triton", 2048 * 2048, UNMEASURED),
    },
    "attentive_select": {
        "cpu": Threshold("cpu", 1 << 20, MASKING_ROWS),
        "cuda": Threshold("triton", 0, UNMEASURED),
    },
    "gather_patches": {
        "cpu": Threshold("cpu", 1 << 18, MASKING_ROWS),
        "cuda": Threshold("triton", 0, UNMEASURED),
    },
    "scatter_patches": {
        "cpu": Threshold("cpu", 1 << 18, MASKING_ROWS),
        "cuda": Threshold("triton", 0, UNMEASURED),
    },
    "masked_patch_loss": {
        "cpu": Threshold("cpu", 1 << 18, MASKING_ROWS),
        "cuda": Threshold("triton", 0, UNMEASURED),
    },
    # cells of all rectangles times width; pairs; boxes
    "region_pool": {
        "cpu": Threshold("cpu", 1 << 18, XVLM_ROWS),
        "cuda": Threshold("triton", 0, UNMEASURED),
    },
    "sample_hard_negatives": {
        "cpu": Threshold("cpu", 1 << 18, XVLM_ROWS),
        "cuda": Threshold("triton", 0, UNMEASURED),
    },
    "box_loss": {
        "cpu": Threshold("cpu", 1 << 13, UNMEASURED),
        "cuda": Threshold("triton", 0, UNMEASURED),
    },
}

# Pairs of a contrastive batch, B^2, up to which its `cpu` form holds all logits at once; bench/results/cpu.jsonl.
WHOLE_MATRIX_PAIRS = 1 << 20


def preferred(operator: str, device: torch.device, runnable: tuple[str, ...], *, size: int = 0) -> str:
    """Name of the implementation that `auto` takes for a problem of `size`, out of those that can run."""
    threshold = FUSED_FROM.get(operator, {}).get(device.type)
    if threshold is not None and threshold.impl in runnable and size >= threshold.size:
        return threshold.impl
    return "reference"


def reason(operator: str, device: torch.device, runnable: tuple[str, ...]) -> str:
    """Why `preferred` takes what it takes, in a few words."""
    threshold = FUSED_FROM.get(operator, {}).get(device.type)
    if threshold is None:
        return f"nothing fused is declared for {device.type}"
    if threshold.impl not in runnable:
        return f"{threshold.impl} cannot run here"
    sizes = f"from size {threshold.size} on, reference below" if threshold.size else "at every size"
    return f"{sizes}; {threshold.row}"


# Registers of a thread, said aloud where the compiler by itself stops short of what a tile holds, and spills: two
# programs of four warps share a multiprocessor.
REGISTERS = 255


class SelectTile(NamedTuple):
    """Tile of `attentive_select`: patches x tokens x width of a product, and places x others of a count of ranks."""

    block_p: int
    block_t: int
    block_d: int
    places: int
    block_rank: int
    warps: int
    stages: int
    row: str


class RowsTile(NamedTuple):
    """Tile of an operator that moves rows: rows x values, and entries of an index list that are compared at once."""

    block_rows: int
    block_d: int
    block_index: int
    warps: int
    row: str


def select_tile(P: int, T: int, D: int, itemsize: int, hopper: bool) -> SelectTile:
    """Tile of `attentive_select`: no spills, and at least two programs share a multiprocessor."""
    # fp32 products are not the tensor cores': beside the counts of ranks a larger tile spills
    p = 16 if P <= 16 or itemsize == 4 else 64
    d = 32 if D <= 32 or itemsize == 4 else 64
    t = 32 if T <= 32 or itemsize == 4 else 128 if hopper else 64
    places = max(16, _power_of_2(P))
    return SelectTile(p, t, d, places, min(16, 8192 // places), 4, 3, UNMEASURED)


def rows_tile(D: int, summed: bool = False) -> RowsTile:
    """Tile of `gather_patches` and `scatter_patches`; `summed`: rows are also added up, in registers."""
    block_d = min(256, _power_of_2(D))
    return RowsTile(min(64, (2048 if summed else 4096) // block_d), block_d, 64, 4, UNMEASURED)


def patch_loss_tile(values: int) -> RowsTile:
    """Tile of `masked_patch_loss`; a patch is never split."""
    block_d = _power_of_2(values)
    return RowsTile(max(1, min(64, 4096 // block_d)), block_d, 0, max(4, block_d // 1024), UNMEASURED)


def region_tile(D: int, itemsize: int, backward: bool = False) -> RowsTile:
    """Tile of `region_pool`: cells of an image x width, and rectangles that one reading of them serves."""
    block_d = max(16, min(128 if itemsize == 2 else 64, _power_of_2(D)))
    # backward adds up in fp32, forward multiplies
    return RowsTile(max(16, 2048 // block_d) if backward else 64, block_d, 16, 4, UNMEASURED)


class PairsTile(NamedTuple):
    """Tile of `sample_hard_negatives`: samples on either side x width of a product."""

    side: int
    block_d: int
    warps: int
    stages: int
    row: str


def negatives_tile(D: int, itemsize: int) -> PairsTile:
    """Tile of `sample_hard_negatives`: small, as batches are, and few candidates remain to be formed again."""
    return PairsTile(64, max(16, min(32 if itemsize == 4 else 64, _power_of_2(D))), 8, 3, UNMEASURED)


# boxes that a program of `box_loss` holds at a time
BOXES = 256


def _power_of_2(size: int) -> int:
    """The least power of 2 that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()


class ContrastTile(NamedTuple):
    """Tile of a contrastive kernel: rows x columns x width of a product."""

    block_m: int
    block_n: int
    block_d: int
    warps: int
    stages: int
    tma: bool
    group_m: int
    per_processor: int
    row: str


# kernel -> tile on sm_90, for 16-bit operands that TMA can describe.
_HOPPER_TILES = {
    "sums": ContrastTile(128, 256, 64, 8, 3, True, 16, 1, UNMEASURED),
    "target sums": ContrastTile(128, 128, 64, 8, 4, True, 16, 1, UNMEASURED),
    "online": ContrastTile(128, 128, 64, 8, 3, True, 1, 1, UNMEASURED),
    "gradient": ContrastTile(128, 128, 64, 8, 4, True, 8, 1, UNMEASURED),
    "target gradient": ContrastTile(128, 128, 64, 8, 4, True, 8, 1, UNMEASURED),
    "sigmoid": ContrastTile(128, 128, 64, 8, 4, True, 8, 1, UNMEASURED),
}
# By pointers: sm_80, and operands whose rows are not 16-byte aligned.
_POINTER_TILES = dict.fromkeys(_HOPPER_TILES, ContrastTile(128, 128, 32, 8, 3, False, 8, 1, UNMEASURED)) | {
    "target sums": ContrastTile(128, 64, 32, 8, 3, False, 8, 2, UNMEASURED),
    "target gradient": ContrastTile(128, 64, 32, 8, 3, False, 8, 2, UNMEASURED),
    "sigmoid": ContrastTile(128, 64, 32, 8, 3, False, 8, 2, UNMEASURED),
}
_FP32_TILES = dict.fromkeys(_HOPPER_TILES, ContrastTile(64, 64, 32, 8, 2, False, 8, 2, UNMEASURED)) | {
    "target sums": ContrastTile(64, 32, 32, 8, 2, False, 8, 2, UNMEASURED),
    "target gradient": ContrastTile(64, 32, 32, 8, 2, False, 8, 2, UNMEASURED),
    "online": ContrastTile(64, 32, 16, 8, 2, False, 1, 2, UNMEASURED),
}


# Of the kernels with specialised warps; their stages are buffers of both operands. A tile of G takes the room of one.
GLUON_SUMS = ContrastTile(128, 128, 64, 4, 6, True, 16, 1, UNMEASURED)
GLUON_GRADIENT = ContrastTile(128, 128, 64, 4, 4, True, 8, 1, UNMEASURED)


def contrast_tile(kernel: str, capability: tuple[int, int], itemsize: int, describable: bool) -> ContrastTile:
    """Tile of a contrastive kernel on a device; `describable` says that TMA can read the operands."""
    if itemsize == 4:
        return _FP32_TILES[kernel]
    if capability[0] == 9 and describable:
        return _HOPPER_TILES[kernel]
    return _POINTER_TILES[kernel]
