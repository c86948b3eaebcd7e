"""Collectives of the contrastive operators, on a process group whose ranks may hold unequal batches.

Functional (`_c10d_functional`), so that they can be traced.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import dispatch

_NAME = "gather_texts"


class Layout(NamedTuple):
    """Where this rank's pairs lie among those of the group."""

    counts: tuple[int, ...]
    rank: int

    @property
    def world_size(self) -> int:
        return len(self.counts)

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def offset(self) -> int:
        return sum(self.counts[: self.rank])

    @property
    def pairs(self) -> int:
        """Logits that a rank forms, on average: the same figure on all ranks, whatever the share of each."""
        return self.total * -(-self.total // self.world_size)

    @property
    def rows(self) -> slice:
        return slice(self.offset, self.offset + self.counts[self.rank])


class GatheredTexts(NamedTuple):
    """Texts of a whole group, on their way. Made by `gather_texts`, taken by `fused_itc_loss`."""

    text: Tensor  # (b, D), this rank's, differentiable
    ids: Tensor | None
    group: object
    layout: Layout
    pending_text: Tensor  # (W * largest b, D)
    pending_ids: Tensor | None

    def wait(self) -> tuple[Tensor, Tensor | None]:
        """Texts (B, D) and ids (B,) of the group, without gradient."""
        text = _compact(wait(self.pending_text), self.layout)
        ids = None if self.pending_ids is None else _compact(wait(self.pending_ids), self.layout)
        return text, ids


def gather_texts(
    text: Tensor, ids: Tensor | None = None, *, group: object, counts: Sequence[int] | None = None
) -> GatheredTexts:
    """Start the all-gather of the texts, to hide it behind other work such as the image tower.

    Args:
        text: (b, D), floating, the texts of this rank; b may differ between ranks.
        ids: (b,) int64, or None; as in `fused_itc_loss`.
        group: process group; this process must be a member.
        counts: b of every rank where the caller knows them; otherwise they are exchanged, which makes the host wait
            for the group. Under CUDA-graph capture all ranks are taken to hold the same b.

    Returns:
        A handle to pass to `fused_itc_loss` as `text`. The gradient of the loss reaches `text` through it.

    Raises:
        ValueError: a shape, the group or the counts do not fit.
        TypeError: a dtype does not fit.
    """
    check_texts(_NAME, text, ids)
    layout = exchange_layout(_NAME, text.shape[0], text.device, group, counts)
    with torch.no_grad():
        pending = _start_gather(under_autocast(text.detach()), layout, group)
        pending_ids = None if ids is None else _start_gather(ids, layout, group)
    return GatheredTexts(text, ids, group, layout, pending, pending_ids)


def check_texts(operator: str, text: Tensor, ids: Tensor | None) -> None:
    """Raise unless texts and ids have the shapes and dtypes of the contract."""
    require = dispatch.require
    require(isinstance(text, Tensor), operator, "text must be a tensor", type(text).__name__, TypeError)
    require(text.ndim == 2 and text.shape[1] >= 1, operator, "text must be (b, D) with D >= 1", tuple(text.shape))
    require(text.is_floating_point(), operator, "text must be floating", text.dtype, TypeError)
    if ids is not None:
        require(isinstance(ids, Tensor), operator, "ids must be a tensor", type(ids).__name__, TypeError)
        require(ids.dtype == torch.int64, operator, "ids must be torch.int64", ids.dtype, TypeError)
        require(ids.shape == text.shape[:1], operator, f"ids must be ({text.shape[0]},)", tuple(ids.shape))
        dispatch.require_same_device(operator, (text, ids))


def under_autocast(x: Tensor) -> Tensor:
    """The tensor in the dtype that its products run in."""
    return x.to(product_dtype(x))


def product_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else the tensor's own."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def exchange_layout(
    operator: str, b: int, device: torch.device, group: object, counts: Sequence[int] | None = None
) -> Layout:
    """The batch sizes of all ranks of the group; of this process alone where the group is None."""
    require = dispatch.require
    if group is None:
        return Layout((b,), 0)
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    require(rank >= 0, operator, "this process must be a member of the group", f"global rank {dist.get_rank()}")
    if counts is not None:
        fits = len(counts) == world_size and counts[rank] == b
        require(fits, operator, f"counts must give b of {world_size} ranks, {b} at {rank}", list(counts))
        if dispatch.checks_enabled():
            found = _gather(torch.tensor([b], dtype=torch.int64, device=device), world_size, group).tolist()
            require(found == list(counts), operator, f"counts must be those of the ranks, {found}", list(counts))
        return Layout(tuple(counts), rank)
    if world_size == 1:
        return Layout((b,), rank)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return Layout((b,) * world_size, rank)
    mine = torch.tensor([b], dtype=torch.int64, device=device)
    return Layout(tuple(_gather(mine, world_size, group).tolist()), rank)


def equal_counts(b: int, group: object) -> tuple[int, ...] | None:
    """The batch sizes of a group whose ranks all hold b, so that they need not be exchanged; None without a group."""
    return None if group is None else (b,) * dist.get_world_size(group)


def default_group(world_size: int) -> object:
    """The default process group where there is more than one rank.

    Raises:
        ValueError: it does not exist yet.
    """
    if world_size > 1 and not dist.is_initialized():
        raise ValueError(f"world_size {world_size}: the process group must be initialised before the loss is made")
    return dist.group.WORLD if world_size > 1 else None


def all_reduce(x: Tensor, op: str, group: object) -> Tensor:
    """Reduction of equal tensors over the group, `op` "sum" or "max"."""
    return wait(torch.ops._c10d_functional.all_reduce(x.contiguous(), op, group.group_name))


def all_gather(x: Tensor, layout: Layout, group: object) -> Tensor:
    """Rows of all ranks, in rank order."""
    return _compact(wait(_start_gather(x, layout, group)), layout)


def reduce_scatter(x: Tensor, layout: Layout, group_name: str) -> Tensor:
    """Sum over the ranks of the rows that are this rank's."""
    if layout.world_size == 1:
        return x
    parts = x.split(list(layout.counts))
    most = max(layout.counts)
    if min(layout.counts) != most:
        x = torch.cat([pad_rows(part, most) for part in parts])
    mine = torch.ops._c10d_functional.reduce_scatter_tensor(x.contiguous(), "sum", layout.world_size, group_name)
    return wait(mine)[: layout.counts[layout.rank]]


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """The tensor with zero rows behind it."""
    short = rows - x.shape[0]
    return torch.nn.functional.pad(x, (0, 0) * (x.ndim - 1) + (0, short)) if short else x


def rotate(x: Tensor, layout: Layout, group_name: str) -> Tensor:
    """Start passing equal tensors round the ring, to the rank before; `wait` gives that of the rank behind."""
    W, rank = layout.world_size, layout.rank
    send, receive = [0] * W, [0] * W
    send[(rank - 1) % W] = receive[(rank + 1) % W] = x.shape[0]
    return torch.ops._c10d_functional.all_to_all_single(x.contiguous(), receive, send, group_name)


def wait(x: Tensor) -> Tensor:
    """The result of a collective that was started."""
    return torch.ops._c10d_functional.wait_tensor(x)


class GatherRows(torch.autograd.Function):
    """All-gather whose gradient is the reduce-scatter; for the plain composition."""

    @staticmethod
    def forward(ctx, x: Tensor, layout: Layout, group: object) -> Tensor:
        ctx.layout, ctx.group_name = layout, group.group_name
        return all_gather(x, layout, group)

    @staticmethod
    def backward(ctx, dx: Tensor):
        return reduce_scatter(dx, ctx.layout, ctx.group_name), None, None


def _gather(x: Tensor, world_size: int, group: object) -> Tensor:
    return wait(torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), world_size, group.group_name))


def _start_gather(x: Tensor, layout: Layout, group: object) -> Tensor:
    x = pad_rows(x, max(layout.counts))
    if layout.world_size == 1:
        return x
    return torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), layout.world_size, group.group_name)


def _compact(x: Tensor, layout: Layout) -> Tensor:
    """Drop the padding between the ranks' rows."""
    most = max(layout.counts)
    if min(layout.counts) == most:
        return x
    return torch.cat([part[:n] for part, n in zip(x.split(most), layout.counts)])
