"""Fused operators for contrastive and masked image-text training, on torch tensors."""

from kernels.box_loss import box_loss
from kernels.dispatch import Choice, explain, implementations, operators
from kernels.groups import GatheredTexts, gather_texts
from kernels.hard_negatives import sample_hard_negatives
from kernels.itc import fused_itc_loss
from kernels.itc_module import FusedClipLoss
from kernels.patch_loss import masked_patch_loss
from kernels.patches import gather_patches, scatter_patches
from kernels.region_pool import region_pool
from kernels.select import PatchSelection, attentive_select
from kernels.siglip import FusedSigLipLoss, fused_siglip_loss

__all__ = [
    "Choice",
    "FusedClipLoss",
    "FusedSigLipLoss",
    "GatheredTexts",
    "PatchSelection",
    "attentive_select",
    "box_loss",
    "explain",
    "fused_itc_loss",
    "fused_siglip_loss",
    "gather_patches",
    "gather_texts",
    "implementations",
    "masked_patch_loss",
    "operators",
    "region_pool",
    "sample_hard_negatives",
    "scatter_patches",
]
