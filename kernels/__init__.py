"""Fused operators for contrastive and masked image-text training, on torch tensors."""

from kernels.dispatch import implementations
from kernels.patch_loss import masked_patch_loss
from kernels.patches import gather_patches, scatter_patches
from kernels.select import PatchSelection, attentive_select

__all__ = [
    "PatchSelection",
    "attentive_select",
    "gather_patches",
    "implementations",
    "masked_patch_loss",
    "scatter_patches",
]
