"""Captioning decoder and image decoder: text that sees patches, patches that see text."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kernels import gather_patches, scatter_patches
from sycoca.config import ModelConfig
from sycoca.layers import (
    MLP,
    Block,
    CrossAttention,
    CrossBlock,
    LayerNorm,
    init_blocks,
    position_table,
    run_block,
)
from sycoca.losses import token_loss
from sycoca.packing import Packing


class VocabularyHead(nn.Module):
    """Final norm and linear map to the vocabulary."""

    def __init__(self, width: int, vocab_size: int, label_smoothing: float) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.norm = LayerNorm(width)
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Summed loss of the labels (B, T), those below 0 left out, or without labels the logits (B, T, V)."""
        x = self.norm(x)
        if labels is None:
            return nn.functional.linear(x, self.weight)
        return token_loss(x.flatten(0, 1), self.weight, labels.flatten(), self.label_smoothing)


def asked(labels: Tensor) -> Tensor:
    """Positions (B, T) bool up to the last label of a text: what is behind it nothing depends on."""
    return (labels >= 0).flip(1).cumsum(1).flip(1) > 0


class CaptionDecoder(nn.Module):
    """Layers of a causal block over the words and a block that attends to the patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        decoder, width = config.caption_decoder, config.text.width
        self.recompute = config.recompute
        self.packs = True
        self.blocks = nn.ModuleList()
        for _ in range(decoder.depth):
            self.blocks.append(Block(width, decoder.heads, decoder.mlp_ratio, causal=True))
            self.blocks.append(CrossBlock(width, decoder.heads, decoder.mlp_ratio, config.memory_width))
        self.head = VocabularyHead(width, config.text.vocab_size, config.loss.caption_label_smoothing)
        init_blocks(self.blocks, width, 2 * decoder.depth)

    def forward(self, words: Tensor, patches: Tensor, labels: Tensor | None = None) -> Tensor:
        """As `VocabularyHead`, from words (B, T, D) and the patches (B, K, D') that captioning sees."""
        packing = Packing.of(asked(labels)) if labels is not None and self.packs else None
        if packing is None:
            return self.head(self.states(words, patches), labels)
        x = self.states(packing.pack(words), patches, packing)
        return self.head(x, labels.flatten()[packing.rows])

    def layers(self) -> Iterable[tuple[Block, CrossBlock]]:
        """The two blocks of each layer."""
        return zip(self.blocks[::2], self.blocks[1::2])

    def states(self, words: Tensor, patches: Tensor, packing: Packing | None = None) -> Tensor:
        """What the head reads, (B, T, D), or the packed rows of it for packed words."""
        x = words
        for causal, cross in self.layers():
            x = run_block(causal, x, None, packing, recompute=self.recompute)
            x = run_block(cross, x, patches, None, packing, recompute=self.recompute)
        return x


class ImageDecoderLayer(nn.Module):
    """Self-attention over the image, cross-attention to the caption if it guides, MLP.

    With `rows` (B, K) int64 only these patches ask and come out, (B, K, D); the others are still attended to.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, text_width: int | None) -> None:
        super().__init__()
        guided = text_width is not None
        self.ln_self = LayerNorm(width)
        self.attn = CrossAttention(width, heads, width)
        self.ln_cross = LayerNorm(width) if guided else None
        self.ln_text = LayerNorm(text_width) if guided else None
        self.cross = CrossAttention(width, heads, text_width) if guided else None
        self.ln_mlp = LayerNorm(width)
        self.mlp = MLP(width, mlp_ratio)

    def forward(self, x: Tensor, words: Tensor, valid: Tensor, rows: Tensor | None = None) -> Tensor:
        image = asking = self.ln_self(x)
        if rows is not None:
            x, asking = gather_patches(x, rows), gather_patches(image, rows)
        x = x + self.attn(asking, image)
        if self.cross is not None:
            x = x + self.cross(self.ln_cross(x), self.ln_text(words), valid)
        return x + self.mlp(self.ln_mlp(x))


class ImageDecoder(nn.Module):
    """Pixels or features of the masked patches from the encoded visible ones and the caption."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        decoder, vision = config.image_decoder, config.vision
        self.recompute = config.recompute
        self.num_patches = vision.num_patches
        self.embed = nn.Linear(vision.width, decoder.width)
        self.pos = nn.Parameter(position_table(vision.grid, decoder.width))
        dropped = config.masking.masked_input == "drop"
        self.mask_token = nn.Parameter(torch.empty(decoder.width)) if dropped else None
        text_width = config.text.width if decoder.guide == "caption" else None
        self.layers = nn.ModuleList(
            ImageDecoderLayer(decoder.width, decoder.heads, decoder.mlp_ratio, text_width) for _ in range(decoder.depth)
        )
        self.norm = LayerNorm(decoder.width)
        features = config.predicts_features
        self.pixels = None if features else nn.Linear(decoder.width, vision.patch_values)
        self.features = nn.Linear(decoder.width, vision.width) if features else None
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        for linear, std in ((self.embed, vision.width**-0.5), (self.features if features else self.pixels, 0.02)):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)
        init_blocks(self.layers, decoder.width, decoder.depth)

    def forward(self, encoded: Tensor, visible: Tensor, masked: Tensor, words: Tensor, valid: Tensor) -> Tensor:
        """Pixels (B, K, p * p * 3) or features (B, K, D) of the patches `masked` (B, K).

        Args:
            encoded: (B, N, D) image of the second pass, N the visible patches if the rest was dropped, else all.
            visible, masked: (B, P - K) and (B, K) int64.
            words: (B, T, D') states of the caption.
            valid: (B, T) bool.
        """
        x = self.embed(encoded).to(self.pos.dtype)
        if self.mask_token is None:
            x = x + self.pos
        else:
            x = scatter_patches(x, visible, self.mask_token, num_patches=self.num_patches, pos=self.pos)
        # An empty caption still needs a key to attend to; its reconstruction counts for nothing.
        first = torch.arange(valid.shape[1], device=valid.device) == 0
        valid = valid | first
        for layer in self.layers[:-1]:
            x = run_block(layer, x, words, valid, recompute=self.recompute)
        x = run_block(self.layers[-1], x, words, valid, masked, recompute=self.recompute)
        head = self.features if self.pixels is None else self.pixels
        return head(self.norm(x))
