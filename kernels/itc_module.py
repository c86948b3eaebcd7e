"""`fused_itc_loss` as a module that takes the place of open_clip's."""

from torch import Tensor, nn

from kernels import groups
from kernels.itc import fused_itc_loss


class FusedClipLoss(nn.Module):
    """`fused_itc_loss` with the call signature of open_clip's `ClipLoss`.

    Args:
        local_loss: accepted and not used, each rank forms its own rows only.
        gather_with_grad: accepted and not used, the gradient is exact either way.
        cache_labels: accepted and not used, there are no labels.
        rank: accepted and not used, the group knows.
        world_size: where it is above 1, the default process group is used.
        group: process group to use in place of the default one.
        uneven: whether ranks may hold different numbers of pairs, which then are exchanged at every call; on a GPU the
            host waits for that.
        impl, schedule, label_smoothing: as in `fused_itc_loss`.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        *,
        group: object = None,
        uneven: bool = False,
        impl: str = "auto",
        schedule: str = "gather",
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.group = group if group is not None else groups.default_group(world_size)
        self.uneven = uneven
        self.options = {"impl": impl, "schedule": schedule, "label_smoothing": label_smoothing}

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        # A bias common to all logits leaves the softmax as it is.
        counts = None if self.uneven else groups.equal_counts(image_features.shape[0], self.group)
        options = {"group": self.group, "counts": counts, **self.options}
        loss = fused_itc_loss(image_features, text_features, logit_scale, **options)
        return {"contrastive_loss": loss} if output_dict else loss
