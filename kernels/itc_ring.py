"""Ring schedule of the contrastive loss: the texts of one rank at a time.

Each rank forms its rows against the texts that pass by, and keeps the statistics of all columns. In backward the
gradient of a rank's texts travels with them, and one step more, home. The next texts are on their way while the present
ones are worked on.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels import groups

_ops = torch.ops.sycoca_kernels


def sums(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    shift: Tensor,
    ids: Tensor | None,
    all_ids: Tensor | None,
    weight: Tensor | None,
    smoothing: float,
    layout: groups.Layout,
    group_name: str,
    *settings,
) -> tuple[Tensor, Tensor]:
    """As the operator of that name, against all texts of the group."""
    row, column = image.new_zeros(2, image.shape[0], dtype=torch.float32), _columns(image, layout)
    for columns, offset, chunk in _passing(text, layout, group_name):
        chunk_ids = None if all_ids is None else all_ids[columns]
        part, column[:, columns] = _ops.itc_sums(
            image, chunk, logit_scale, shift, ids, chunk_ids, weight, smoothing, offset, *settings
        )
        row = row + part
    return row, column


def online(
    image: Tensor, text: Tensor, logit_scale: Tensor, safe: Tensor, layout: groups.Layout, group_name: str, *settings
) -> tuple[Tensor, Tensor]:
    """As the operator of that name, against all texts of the group."""
    row, column = None, _columns(image, layout)
    for columns, offset, chunk in _passing(text, layout, group_name):
        part, column[:, columns] = _ops.itc_online(image, chunk, logit_scale, safe, offset, *settings)
        row = part if row is None else merge(row, part)
    return row, column


def grads(
    factor: Tensor,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    row: Tensor,
    column: Tensor,
    coefficient: Tensor,
    safe: Tensor,
    ids: Tensor | None,
    all_ids: Tensor | None,
    weight: Tensor | None,
    smoothing: float,
    layout: groups.Layout,
    group_name: str,
    *needs_and_settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the operator of that name, against all texts of the group; the text gradient is this rank's."""
    total, travelling = None, None
    need_text = needs_and_settings[1]
    for columns, offset, chunk in _passing(text, layout, group_name):
        chunk_ids = None if all_ids is None else all_ids[columns]
        part = _ops.itc_grads(
            factor,
            image,
            chunk,
            logit_scale,
            row,
            column[:, columns],
            coefficient,
            safe,
            ids,
            chunk_ids,
            weight,
            smoothing,
            offset,
            *needs_and_settings,
        )
        total = part if total is None else (total[0] + part[0], None, total[2] + part[2])
        if need_text:
            dtext = groups.pad_rows(part[1], max(layout.counts))
            dtext = dtext if travelling is None else dtext + groups.wait(travelling)
            travelling = groups.rotate(dtext, layout, group_name)
    dtext = groups.wait(travelling)[: layout.counts[layout.rank]] if need_text else part[1]
    return total[0], dtext, total[2]


def merge(a: Tensor, b: Tensor) -> Tensor:
    """Maximum and sum relative to it (2, N) of two disjoint sets of terms."""
    m = torch.maximum(a[0], b[0])
    r = torch.where(m == -torch.inf, 0.0, m)
    return torch.stack((m, a[1] * torch.exp2(a[0] - r) + b[1] * torch.exp2(b[0] - r)))


def _columns(like: Tensor, layout: groups.Layout) -> Tensor:
    return like.new_empty(2, layout.total, dtype=torch.float32)


def _passing(text: Tensor, layout: groups.Layout, group_name: str) -> Iterator[tuple[slice, int, Tensor]]:
    """Columns, offset of the diagonal and texts of each rank in turn, this rank's first."""
    held = groups.pad_rows(text, max(layout.counts))
    for step in range(layout.world_size):
        owner = (layout.rank + step) % layout.world_size
        coming = groups.rotate(held, layout, group_name) if step + 1 < layout.world_size else None
        n = layout.counts[owner]
        start = sum(layout.counts[:owner])
        # An offset of n puts the diagonal outside the block.
        yield slice(start, start + n), 0 if step == 0 else n, held[:n]
        held = groups.wait(coming) if coming is not None else held
