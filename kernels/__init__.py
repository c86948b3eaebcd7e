"""Fused operators for contrastive and masked image-text training, on torch tensors."""

from kernels.dispatch import implementations

__all__ = ["implementations"]
