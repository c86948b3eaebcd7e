"""Launch shapes of the contrastive Triton kernels."""

from collections.abc import Iterator

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


def blocks(image: torch.Tensor, text: torch.Tensor, scratch_bytes: int) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Blocks (rows, columns, G) of all pairs, in the features' dtype; the storage of G is reused."""
    (M, D), N = image.shape, text.shape[0]
    if M == 0 or N == 0:
        return
    c, w = block_shape(M, N, D, image.element_size(), scratch_bytes, processors(image))
    # Rows of G start at multiples of 16 bytes: whole-sector stores, and TMA can describe it.
    scratch = torch.empty(c * _aligned(w, image), dtype=image.dtype, device=image.device)
    for first_row in range(0, M, c):
        rows = slice(first_row, min(first_row + c, M))
        for first_column in range(0, N, w):
            columns = slice(first_column, min(first_column + w, N))
            height, width = rows.stop - rows.start, columns.stop - columns.start
            pitch = _aligned(width, image)
            yield rows, columns, scratch[: height * pitch].view(height, pitch)[:, :width]


def _aligned(width: int, like: torch.Tensor) -> int:
    values = 16 // like.element_size()
    return -(-width // values) * values


def constants(tile: tuning.ContrastTile) -> dict[str, int]:
    """What a kernel is compiled for."""
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": tile.block_d,
        "TMA": tile.tma,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def persistent(tile: tuning.ContrastTile, height: int, width: int, x: torch.Tensor) -> int:
    """Programs of a persistent grid over the tiles of height x width logits."""
    return min(processors(x) * tile.per_processor, -(-height // tile.block_m) * -(-width // tile.block_n))


def operands(image: torch.Tensor, text: torch.Tensor, tile: tuning.ContrastTile) -> tuple:
    """What a kernel takes for both matrices: descriptors of their tiles, or the tensors."""
    if not tile.tma:
        return image, text
    from triton.tools.tensor_descriptor import TensorDescriptor

    return tuple(
        TensorDescriptor.from_tensor(x, [rows, tile.block_d])
        for x, rows in ((image, tile.block_m), (text, tile.block_n))
    )


def describable(x: torch.Tensor) -> bool:
    """Whether a TMA descriptor can be made of the tensor."""
    pitch = x.stride(0) * x.element_size()
    return x.shape[0] > 0 and x.stride(1) == 1 and pitch > 0 and pitch % 16 == 0 and x.data_ptr() % 16 == 0
