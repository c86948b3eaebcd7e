"""Fused operators for contrastive and masked image-text training, on torch tensors."""

from kernels.dispatch import Choice, explain, implementations, operators
from kernels.groups import GatheredTexts, gather_texts
from kernels.itc import fused_itc_loss
from kernels.itc_module import FusedClipLoss
from kernels.patch_loss import masked_patch_loss
from kernels.patches import gather_patches, scatter_patches
from kernels.select import PatchSelection, attentive_select
from kernels.siglip import FusedSigLipLoss, fused_siglip_loss

__all__ = [
    "Choice",
    "FusedClipLoss",
    "FusedSigLipLoss",
    "GatheredTexts",
    "PatchSelection",
    "attentive_select",
    "explain",
    "fused_itc_loss",
    "fused_siglip_loss",
    "gather_patches",
    "gather_texts",
    "implementations",
    "masked_patch_loss",
    "operators",
    "scatter_patches",
]
