"""Launch shapes of the contrastive Triton kernels."""

import torch

from kernels import dispatch, tuning

# More than one program, so that partial sums meet, and fewer than there are tiles.
INTERPRETED_PROGRAMS = 3
INTERPRETED_TILE = tuning.ContrastTile(16, 32, 16, 4, 1, False, 2, 1, "interpreted")
SCRATCH_BYTES = 512 * 2**20


def tile_for(kernel: str, *operands: torch.Tensor) -> tuning.ContrastTile:
    """Tile of `kernel` for operands (N, D) of one dtype."""
    if dispatch.interpreting():
        return INTERPRETED_TILE
    capability = torch.cuda.get_device_capability(operands[0].device)
    by_descriptor = all(describable(x) for x in operands)
    return tuning.contrast_tile(kernel, capability, operands[0].element_size(), by_descriptor)


def processors(x: torch.Tensor) -> int:
    """Multiprocessors of the device."""
    if dispatch.interpreting():
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def block_shape(M: int, N: int, D: int, element_bytes: int, scratch_bytes: int, processors: int) -> tuple[int, int]:
    """Rows and columns of G held at a time, within `scratch_bytes`; rows fill whole waves of 128 x 256 tiles of dI."""
    scratch = scratch_bytes or SCRATCH_BYTES
    rows = min(M, max(128 * processors // -(-D // 256), 128), max(scratch // element_bytes, 1))
    columns = min(N, max(scratch // (element_bytes * rows), 1))
    if columns > 256:
        columns -= columns % 256 if columns < N else 0
    return rows, columns


def operand(x: torch.Tensor, tile: tuning.ContrastTile, block_rows: int):
    """What the kernel takes for a matrix: a descriptor of its tiles, or the tensor."""
    if not tile.tma:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [block_rows, tile.block_d])


def describable(x: torch.Tensor) -> bool:
    """Whether a TMA descriptor can be made of the tensor."""
    pitch = x.stride(0) * x.element_size()
    return x.shape[0] > 0 and x.stride(1) == 1 and pitch > 0 and pitch % 16 == 0 and x.data_ptr() % 16 == 0
