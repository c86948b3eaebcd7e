"""Configuration of the losses."""

import math
from dataclasses import dataclass, fields
from typing import Literal

from sycoca.checked import Strict, require


@dataclass(frozen=True)
class LossConfig(Strict):
    """Weights and forms of the losses.

    Attributes:
        local_weight: weight of the token-wise contrastive term; None means 1 while patches are selected
            by the score in the space `local`, else 0. Given explicitly it keeps the term without masks.
        tgmim_kind: what TG-MIM predicts and its error: pixels, as in `kernels.masked_patch_loss`, or `ema_features`,
            what an image encoder of averaged weights makes of the patch, as in `sycoca.losses.feature_loss`.
        label_smoothing: of the contrastive loss, 0..1.
        caption_label_smoothing: of the captioning loss, 0..1.
        l1_weight, giou_weight: of the two terms of `bbox`.
        itm_floor: share that every negative of ITM has beside its softmax when negatives are drawn; a large one makes
            easy negatives frequent, which a short run begins with.
        region_weight: of all terms of a region batch, beside those of the image batch.
        whole_views: share of the texts with boxes that ITM and MLM see in the whole image, of which what is said of a
            box is true as well; the model then has to find what it speaks of.
    """

    itc_weight: float = 1.0
    caption_weight: float = 2.0
    tgmim_weight: float = 1.0
    local_weight: float | None = None
    tgmim_kind: Literal["l1", "mse", "mse_normalised", "ema_features"] = "l1"
    label_smoothing: float = 0.0
    caption_label_smoothing: float = 0.0
    itm_weight: float = 1.0
    mlm_weight: float = 1.0
    l1_weight: float = 1.0
    giou_weight: float = 1.0
    region_weight: float = 1.0
    itm_floor: float = 1e-5
    whole_views: float = 0.0

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.name.endswith("_weight")):
            value = getattr(self, name)
            require(value is None or 0 <= value < math.inf, f"{name}: must be at least 0, got {value}")
        require(self.itm_floor > 0, f"itm_floor: must be above 0, got {self.itm_floor}")
        require(0 <= self.whole_views <= 1, f"whole_views: must lie in 0..1, got {self.whole_views}")
        for name in ("label_smoothing", "caption_label_smoothing"):
            require(0 <= getattr(self, name) < 1, f"{name}: must lie in 0..1, got {getattr(self, name)}")
