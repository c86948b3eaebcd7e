"""The rows of padded sequences that count, packed: position-wise layers then do no work on padding.

    pack:  (B, N, D) -> (1, R, D), the kept rows in order;  unpack: the inverse, zeros elsewhere

How many rows are kept must be known on the host, so a device that runs ahead of it packs nothing: there the loader
trims the padding that a whole batch shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Share of the rows above which moving them costs more than the work that is saved.
_DENSE = 0.92


class Packing:
    """A choice of rows of sequences (B, N).

    Args:
        keep: (B, N) bool; at least one row is kept.
    """

    def __init__(self, keep: Tensor) -> None:
        self.shape = keep.shape
        self.rows = keep.flatten().nonzero().squeeze(1)
        # Rows that are left out read the row of zeros behind the packed ones.
        self.places = torch.full((keep.numel(),), len(self.rows))
        self.places[self.rows] = torch.arange(len(self.rows))

    @staticmethod
    def of(keep: Tensor) -> Packing | None:
        """The packing of (B, N) bool where it pays and costs no synchronisation, else None."""
        if keep.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        kept = int(keep.sum())
        return Packing(keep) if 0 < kept < _DENSE * keep.numel() else None

    def pack(self, x: Tensor) -> Tensor:
        """(1, R, D) of x (B, N, D)."""
        return _Move.apply(x.flatten(0, 1), self.rows, self.places)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """(B, N, D) of x (1, R, D), zeros where nothing is kept."""
        return _Move.apply(x.squeeze(0), self.places, self.rows).view(*self.shape, -1)


class _Move(torch.autograd.Function):
    """Rows of x at `index`, those behind the end zero; `inverse` leads back, so backward adds nothing up."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return _rows(x, index)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        return _Move.apply(dy, inverse, index), None, None


def _rows(x: Tensor, index: Tensor) -> Tensor:
    if len(index) <= len(x):
        return x.index_select(0, index)
    return torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, index)
