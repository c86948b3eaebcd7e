"""The gradient step of a batch: at once, or in parts that are encoded twice where it does not fit.

    one part     forward, backward, step
    k parts      k forward passes of the encoders without a graph, the contrastive loss of all pairs and its gradient,
                 then k forward and backward passes; `sycoca.two_pass`

Under ZeRO each part is one of DeepSpeed's micro steps: gradients are averaged over them, and the last one steps.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.torch_autocast import autocast_if_enabled
from torch import Tensor

from sycoca.contrast import Spread
from sycoca.images import normalise
from sycoca.masking import StepPlan
from sycoca.model import Batch
from sycoca.two_pass import first_pass
from sycoca.xvlm import XBatch
from train.target import TargetEncoder


class Taken(NamedTuple):
    """A finished step.

    Attributes:
        losses: fp32, in the order of `Losses`; the mean over the ranks is that of the whole batch.
        own: of each part, numbers that are finite where its own losses and features are.
    """

    losses: Tensor
    own: list[Tensor]


def take_step(
    engine: Any,
    parts: Sequence[Batch | XBatch],
    plan: StepPlan,
    spread: Spread,
    device: torch.device,
    target: TargetEncoder | None = None,
) -> Taken:
    """Trains on this rank's share of a global batch. All ranks call it, with equally many parts.

    Args:
        engine: DeepSpeed's, whose gradient accumulation is the number of parts.
        parts: of at least one pair each, on the host or the device.
        plan: from `step_plan`.
        spread: of the whole batch over the ranks.
        device: of the model.
        target: of a model that predicts features; None for another one.
    """
    load = partial(to_device, device=device)
    whole = load
    if target is not None and plan.reconstruct:
        target.refresh()
        whole = partial(_aimed, device=device, target=target)
    if len(parts) == 1:
        losses = engine(whole(parts[0]), plan, spread.group, spread.shares, schedule=spread.schedule)
        values = _descend(engine, losses)
        return Taken(values, [values])
    with autocast_if_enabled(engine):
        known = first_pass(engine.module, parts, spread, load)
    values = [
        _descend(engine, part.losses(engine, whole(batch), plan)) for part, batch in zip(known, parts, strict=True)
    ]
    return Taken(torch.stack(values).mean(0), [_own(value) for value in values])


def _descend(engine: Any, losses: Any) -> Tensor:
    engine.backward(losses.total)
    engine.step()
    return torch.stack(losses).detach()


def _own(values: Tensor) -> Tensor:
    # Total and contrast are those of all parts; the others name the part whose numbers are broken.
    return values[2:]


def to_device(batch: Batch | XBatch, device: torch.device) -> Batch | XBatch:
    """The batch on a device; pictures (B, H, W, 3) uint8 become images there, a quarter of the bytes on the way."""
    parts = (_moved(x, device) for x in batch)
    moved = batch._make(parts)
    images = getattr(moved, "images", None)
    return moved if images is None or images.dtype != torch.uint8 else moved._replace(images=normalise(images))


def _aimed(batch: Batch | XBatch, device: torch.device, target: TargetEncoder) -> Batch | XBatch:
    return target.aim(to_device(batch, device))


def _moved(x: Any, device: torch.device) -> Any:
    if isinstance(x, Tensor):
        return x.to(device, non_blocking=True)
    return None if x is None else to_device(x, device)
