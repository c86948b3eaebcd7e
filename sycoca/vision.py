"""Image encoder: a ViT whose [CLS] is the image and whose patches are seen by the decoders.

    x = LN_pre([cls; embed(image)_i + pos_i]);  x = blocks(x);  cls, patches = LN_post(x)

A second pass encodes the same image with masked patches, from the patch embeddings of the first.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import gather_patches, scatter_patches
from sycoca.config import ModelConfig, VisionConfig
from sycoca.layers import Block, LayerNorm, init_blocks, position_table, run_block
from sycoca.stem import stem_convs


class EncodedImage(NamedTuple):
    """Output of the first pass.

    Attributes:
        cls: (B, D) normalised [CLS].
        patches: (B, P, D) normalised patches.
        embedded: (B, P, D) patch embeddings before position and blocks, or None where no second pass starts there.
        values: (B, P, D) normalised values of the last block, without gradient, or None.
    """

    cls: Tensor
    patches: Tensor
    embedded: Tensor | None
    values: Tensor | None


class PatchEmbedding(nn.Module):
    """Linear map of each patch's pixels, in the order row, column, channel."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(patch_size**2 * 3, width, bias=False)

    def initialise(self) -> None:
        nn.init.normal_(self.proj.weight, std=self.proj.in_features**-0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(patchify(images, self.patch_size).to(self.proj.weight.dtype))


class ConvEmbedding(nn.Module):
    """Convolutions that halve the image until a pixel is a patch (`sycoca.stem`), and a linear map."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(conv.before, conv.after, 3, conv.stride, padding=1) for conv in stem_convs(patch_size, width)
        )
        self.proj = nn.Linear(width, width)

    def initialise(self) -> None:
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)
        nn.init.kaiming_normal_(self.proj.weight, nonlinearity="relu")
        nn.init.zeros_(self.proj.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(self.proj.weight.dtype)
        for conv in self.convs:
            x = F.gelu(conv(x))
        return self.proj(x.flatten(2).transpose(1, 2))


class PatchSequence(nn.Module):
    """[CLS] and positions around the patches; (B, P, D) to (B, 1 + N, D)."""

    def __init__(self, vision: VisionConfig, masked_input: str | None) -> None:
        super().__init__()
        self.num_patches, width = vision.num_patches, vision.width
        self.cls = nn.Parameter(torch.empty(width))
        self.pos = nn.Parameter(position_table(vision.grid, width))
        self.cls_pos = nn.Parameter(torch.empty(width)) if vision.cls_position else None
        self.mask_token = nn.Parameter(torch.empty(width)) if masked_input == "token" else None
        for p in (self.cls, self.cls_pos, self.mask_token):
            if p is not None:
                nn.init.normal_(p, std=width**-0.5)

    def forward(self, embedded: Tensor, visible: Tensor | None = None) -> Tensor:
        x = embedded.to(self.pos.dtype)
        cls = self.cls if self.cls_pos is None else self.cls + self.cls_pos
        if visible is not None and self.mask_token is None:
            return gather_patches(x, visible, pos=self.pos, prefix=cls)
        if visible is None:
            x = x + self.pos
        else:
            seen = gather_patches(x, visible)
            x = scatter_patches(seen, visible, self.mask_token, num_patches=self.num_patches, pos=self.pos)
        return torch.cat([cls.expand(x.shape[0], 1, -1), x], dim=1)


class VisionTransformer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vision = config.vision
        self.recompute = config.recompute
        self.wants_values = config.scores and config.masking.score_space == "value"
        stem = ConvEmbedding if vision.stem == "conv" else PatchEmbedding
        self.embed = stem(vision.patch_size, vision.width)
        masked_input = config.masking.masked_input if config.num_masked else None
        self.sequence = PatchSequence(vision, masked_input)
        self.ln_pre = LayerNorm(vision.width)
        self.blocks = nn.ModuleList(Block(vision.width, vision.heads, vision.mlp_ratio) for _ in range(vision.depth))
        self.ln_post = LayerNorm(vision.width)
        self.embed.initialise()
        init_blocks(self.blocks, vision.width, vision.depth)

    def forward(self, images: Tensor) -> EncodedImage:
        embedded = self.embed(images)
        x = self.ln_pre(self.sequence(embedded))
        for block in self.blocks[:-1]:
            x = run_block(block, x, recompute=self.recompute)
        values = self._values(x) if self.wants_values else None
        x = self.ln_post(run_block(self.blocks[-1], x, recompute=self.recompute))
        return EncodedImage(x[:, 0], x[:, 1:], embedded, values)

    def encode_visible(self, embedded: Tensor, visible: Tensor) -> Tensor:
        """Normalised patches (B, N, D) of the image with only `visible` (B, K) shown; N is K if the rest is dropped."""
        x = self.ln_pre(self.sequence(embedded, visible))
        for block in self.blocks:
            x = run_block(block, x, recompute=self.recompute)
        return self.ln_post(x[:, 1:])

    @torch.no_grad()
    def _values(self, x: Tensor) -> Tensor:
        last = self.blocks[-1]
        return self.ln_post(last.attn.values(last.ln_attn(x)))[:, 1:]


def build_image_encoder(config: ModelConfig) -> nn.Module:
    """The image encoder that a configuration names."""
    if config.vision.swin is None:
        return VisionTransformer(config)
    from sycoca.swin import SwinTransformer

    return SwinTransformer(config)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Pixels of each patch (B, P, p * p * 3), patches row-major, of images (B, 3, H, W)."""
    B, C, H, W = images.shape
    p = patch_size
    grid = images.reshape(B, C, H // p, p, W // p, p)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Images (B, 3, H, W) of patches (B, P, p * p * 3), the inverse of `patchify`."""
    B, p = patches.shape[0], patch_size
    rows, cols = grid
    return patches.view(B, rows, cols, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(B, -1, rows * p, cols * p)
