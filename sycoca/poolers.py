"""What stands for an image as a whole, and what captioning attends to.

cls       features of [CLS], memory of the patches themselves
mean      the mean of the patches, memory of the patches themselves; where boxes are pooled as well
single    n queries attend to [CLS] and patches; the first is the image, the others the memory (open_clip's CoCa)
parallel  n queries make the memory, one more the image, both from [CLS] and patches
cascade   n queries make the memory, one more makes the image of that (CoCa, arXiv 2205.01917)
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sycoca.config import ModelConfig
from sycoca.layers import CrossAttention, LayerNorm


class Pooled(NamedTuple):
    """`image` (B, D) before its projection, `memory` (B, M, D) for captioning."""

    image: Tensor
    memory: Tensor


class AttentionalPooler(nn.Module):
    """Learned queries that attend to a normalised memory; (B, M, D') to (B, N, D)."""

    def __init__(self, queries: int, width: int, heads: int, memory_width: int, *, norm: bool) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(queries, width))
        self.ln_query = LayerNorm(width)
        self.ln_memory = LayerNorm(memory_width) if norm else nn.Identity()
        self.attn = CrossAttention(width, heads, memory_width)
        nn.init.normal_(self.query)
        for linear in (self.attn.q, self.attn.kv, self.attn.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, memory: Tensor) -> Tensor:
        asking = self.ln_query(self.query).expand(memory.shape[0], -1, -1)
        return self.attn(asking, self.ln_memory(memory))


class ClassToken(nn.Module):
    """No pooling: [CLS] and the patches as they are."""

    def forward(self, cls: Tensor, patches: Tensor) -> Pooled:
        return Pooled(cls, patches)


class Mean(nn.Module):
    """The whole image as a box of it: the mean of its patches."""

    def forward(self, cls: Tensor, patches: Tensor) -> Pooled:
        return Pooled(patches.float().mean(1).to(patches.dtype), patches)


class SinglePooler(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vision, width = config.vision, config.embed_dim
        # The encoder's last norm is the pooler's first.
        self.pool = AttentionalPooler(vision.pooler_queries, width, vision.pooler_heads, vision.width, norm=False)
        self.norm = LayerNorm(width)

    def forward(self, cls: Tensor, patches: Tensor) -> Pooled:
        x = self.norm(self.pool(torch.cat([cls[:, None], patches], dim=1)))
        return Pooled(x[:, 0], x[:, 1:])


class ParallelPoolers(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vision, width = config.vision, config.embed_dim
        self.captioning = AttentionalPooler(vision.pooler_queries, width, vision.pooler_heads, vision.width, norm=True)
        self.contrastive = AttentionalPooler(1, width, vision.pooler_heads, vision.width, norm=True)

    def forward(self, cls: Tensor, patches: Tensor) -> Pooled:
        x = torch.cat([cls[:, None], patches], dim=1)
        return Pooled(self.contrastive(x).squeeze(1), self.captioning(x))


class CascadePoolers(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vision, width = config.vision, config.embed_dim
        self.captioning = AttentionalPooler(vision.pooler_queries, width, vision.pooler_heads, vision.width, norm=True)
        self.contrastive = AttentionalPooler(1, width, vision.pooler_heads, width, norm=True)

    def forward(self, cls: Tensor, patches: Tensor) -> Pooled:
        memory = self.captioning(torch.cat([cls[:, None], patches], dim=1))
        return Pooled(self.contrastive(memory).squeeze(1), memory)


def build_pooler(config: ModelConfig) -> nn.Module:
    """The pooler that a configuration names."""
    if config.vision.region_form == "pooled":
        return Mean()
    match config.vision.pooler:
        case "cls":
            return ClassToken()
        case "single":
            return SinglePooler(config)
        case "parallel":
            return ParallelPoolers(config)
        case "cascade":
            return CascadePoolers(config)
