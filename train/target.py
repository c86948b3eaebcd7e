"""The image encoder with averaged weights, whole on every rank: what TG-MIM predicts with `ema_features`.

    z = LN(encoder(average of the weights, whole image)),  LN without scale and shift

The average is the one that `train.ema` keeps beside the optimizer's moments, under ZeRO each rank its share; before a
step the shares are put together. So checkpoints, other numbers of ranks and the export of the average know of nothing
else. Memory: the encoder in fp32 on every rank. Between ranks: one all-reduce of it in a step.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sycoca.config import ModelConfig
from sycoca.losses import feature_targets
from sycoca.model import Batch
from sycoca.vision import VisionTransformer
from sycoca.xvlm import XBatch
from train.ema import KEY
from train.shares import optimizer_state, shares

_PREFIX = "vision."


class TargetEncoder:
    """Gives batches the features that are to be predicted.

    Args:
        engine: DeepSpeed's, after what it resumes from is loaded; `keep_average` watches its optimizer.
        config: of the model.
        device: of the model.
    """

    def __init__(self, engine: Any, config: ModelConfig, device: torch.device) -> None:
        # No draws: the model's own weights and batches must not depend on it.
        with torch.device("meta"):
            self.vision = VisionTransformer(config).requires_grad_(False).eval()
        sizes = {name: p.shape for name, p in self.vision.named_parameters()}
        self._flat = torch.zeros(sum(size.numel() for size in sizes.values()), device=device)
        parts = self._flat.split([size.numel() for size in sizes.values()])
        weights = {name: part.view(size) for (name, size), part in zip(sizes.items(), parts, strict=True)}
        self.vision.load_state_dict(weights, assign=True)
        mine = [share for share in shares(engine) if share.name.startswith(_PREFIX)]
        self._parts = [(share, share.place(weights[share.name.removeprefix(_PREFIX)])) for share in mine]
        self._state = optimizer_state(engine)
        self._split = engine.zero_optimization() and dist.get_world_size() > 1
        self._device, self._precision = device.type, _precision(engine)

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the average as the optimizer's last step left it. All ranks call it."""
        if self._split:
            self._flat.zero_()
        for share, place in self._parts:
            # Before the first step the average is the weights.
            place.copy_(share.part(self._state.get(share.held, {}).get(KEY, share.held)), non_blocking=True)
        if self._split:
            # No two ranks hold the same value: sums are exact.
            dist.all_reduce(self._flat)

    def aim(self, batch: Batch | XBatch) -> Batch | XBatch:
        """The batch, on the model's device, with `targets`."""
        if isinstance(batch, XBatch):
            return batch._replace(pairs=self.aim(batch.pairs))
        return batch._replace(targets=self.targets(batch.images))

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """Normalised features (B, P, D) fp32 of whole images (B, 3, H, W)."""
        with self._autocast():
            return feature_targets(self.vision(images).patches)

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self._device, self._precision, enabled=self._precision is not None)


def _precision(engine: Any) -> torch.dtype | None:
    """What the model's products are computed in, None for fp32."""
    if engine.torch_autocast_enabled():
        return engine.torch_autocast_dtype()
    if engine.bfloat16_enabled():
        return torch.bfloat16
    return torch.float16 if engine.fp16_enabled() else None
