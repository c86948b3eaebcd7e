"""Fusion encoder: texts that attend to images or boxes of them, and the heads that read it.

    x <- x + self(LN(x));  x <- x + cross(LN(x), rows seen);  x <- x + MLP(LN(x))

Image tokens are given their place on the grid once more: from what the ViT leaves of it, boxes are learned later. Keys
and values of the image tokens are one table per layer, projected once however many texts, boxes and pairs
look them up; what a text sees of it is an index. The last layer goes on with the positions that are read, no others.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sycoca import cpu_attention
from sycoca.backbone_config import BERT_EPS
from sycoca.config import ModelConfig
from sycoca.layers import (
    MLP,
    CrossAttention,
    KeysValues,
    LayerNorm,
    Past,
    SelfAttention,
    attend,
    init_blocks,
    position_table,
    run_block,
)
from sycoca.packing import Packing


class ImageTokens(NamedTuple):
    """Normalised image tokens, each once.

    Attributes:
        rows: (R, D).
        cells: (R,) int64, the patch of the grid that each is, row-major; the number of patches for those that are none.
    """

    rows: Tensor
    cells: Tensor


class Seen(NamedTuple):
    """Which rows of a table each of N images or boxes consists of.

    Attributes:
        index: (N, S) int64; the first is what stands for the whole.
        valid: (N, S) bool, those that count; the first always does.
    """

    index: Tensor
    valid: Tensor

    def of(self, chosen: Tensor) -> "Seen":
        """Those at `chosen` (M,) int64."""
        return Seen(self.index[chosen], self.valid[chosen])


Tables = tuple[Tensor, ...]


class IndexedAttention(CrossAttention):
    """Multi-head attention of sequences (B, N, D) to rows of a table (R, 2 D) of keys and values.

    `kept` is None, or a list that collects the attention (B, H, N, S) of every call, for a gradient to be taken of.
    """

    kept: list[Tensor] | None = None

    def forward(self, x: Tensor, table: Tensor, seen: Seen, packing: Packing | None = None) -> Tensor:
        q = self.q(x)
        if packing is not None:
            q = packing.unpack(q)
        if self.kept is None and cpu_attention.fits(q):
            attended = cpu_attention.indexed_attention(q, table, seen.index, seen.valid, self.heads)
        else:
            B, N, D = q.shape
            q = q.view(B, N, self.heads, -1).transpose(1, 2)
            rows = table[seen.index].view(B, -1, 2, self.heads, D // self.heads)
            k, v = rows.permute(2, 0, 3, 1, 4).unbind(0)
            attended = attend(q, k, v, valid=seen.valid) if self.kept is None else self._explicit(q, k, v, seen.valid)
        return self.out(attended if packing is None else packing.pack(attended))

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        logits = (q @ k.transpose(2, 3)) * q.shape[3] ** -0.5
        P = logits.masked_fill(~valid[:, None, None], -torch.inf).softmax(-1)
        self.kept.append(P)
        return (P @ v).transpose(1, 2).flatten(2)

    def among(self, x: Tensor, memory: KeysValues) -> Tensor:
        """Output (N, n, D) for tokens of N captions of the B images of a memory, N / B neighbouring ones to each."""
        return super().forward(x.reshape(len(memory.keys), -1, x.shape[2]), memory).view(x.shape)


def states_at(x: Tensor, packing: Packing | None, asking: Tensor) -> Tensor:
    """States (B, K, D) of the positions `asking` (B, K) int64 of texts (B, T, D), or packed."""
    x = x if packing is None else packing.unpack(x)
    return x.gather(1, asking[:, :, None].expand(-1, -1, x.shape[2]))


class FusionBlock(nn.Module):
    """Self-attention over the text, cross-attention to an image, MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, memory_width: int) -> None:
        super().__init__()
        self.ln_attn = LayerNorm(width)
        self.attn = SelfAttention(width, heads, causal=False)
        self.ln_cross = LayerNorm(width)
        self.cross = IndexedAttention(width, heads, memory_width)
        self.ln_memory = LayerNorm(memory_width)
        self.ln_mlp = LayerNorm(width)
        self.mlp = MLP(width, mlp_ratio)

    def forward(
        self,
        x: Tensor,
        valid: Tensor,
        table: Tensor,
        index: Tensor,
        visible: Tensor,
        packing: Packing | None = None,
        asking: Tensor | None = None,
    ) -> Tensor:
        """Texts (B, T, D), or packed, or with `asking` (B, K) int64 the states (B, K, D) of these positions alone."""
        x = x + self.attn(self.ln_attn(x), None, packing, valid)
        if asking is not None:
            x, packing = states_at(x, packing, asking), None
        x = x + self.cross(self.ln_cross(x), table, Seen(index, visible), packing)
        return x + self.mlp(self.ln_mlp(x))

    def causally(
        self, x: Tensor, look: Callable[[Tensor], Tensor], past: Past | None = None, packing: Packing | None = None
    ) -> Tensor:
        """Texts, whole ones or what is added to their `past`, whose position i sees 0..i; `look` is cross-attention."""
        x = x + self.attn.causally(self.ln_attn(x), past, packing)
        x = x + look(self.ln_cross(x))
        return x + self.mlp(self.ln_mlp(x))

    def look_up(self, rows: Tensor) -> Tensor:
        """Keys and values (R, 2 D) of image tokens (R, D')."""
        return self.cross.kv(self.ln_memory(rows))


class GridPlaces(nn.Module):
    """Adds to every image token the place of its patch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pos = nn.Parameter(position_table(config.vision.grid, config.vision.width))

    def forward(self, tokens: ImageTokens) -> Tensor:
        return tokens.rows + F.pad(self.pos, (0, 0, 0, 1)).index_select(0, tokens.cells)


class FusionEncoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.places = GridPlaces(config)
        fusion, width = config.fusion, config.text.width
        self.recompute = config.recompute
        self.packs = True
        if config.text.bert is not None:
            from sycoca.bert import fusion_blocks

            self.blocks, self.ln_final = fusion_blocks(config), nn.Identity()
            return
        self.blocks = nn.ModuleList(
            FusionBlock(width, fusion.heads, fusion.mlp_ratio, config.vision.width) for _ in range(fusion.depth)
        )
        self.ln_final = LayerNorm(width)
        init_blocks(self.blocks, width, fusion.depth)

    def look_up(self, tokens: ImageTokens) -> Tables:
        """Keys and values of image tokens, a table (R, 2 D) for each block."""
        rows = self.places(tokens)
        return tuple(block.look_up(rows) for block in self.blocks)

    def forward(self, words: Tensor, valid: Tensor, tables: Tables, seen: Seen, asking: Tensor) -> Tensor:
        """Normalised states (B, K, D) of the positions `asking` (B, K) of texts that see their images.

        Args:
            words: (B, T, D) states of the text encoder.
            valid: (B, T) bool, tokens that may be attended to; the first always.
            tables: from `look_up`.
            seen: of B images or boxes.
            asking: (B, K) int64.
        """
        packing = Packing.of(valid) if self.packs else None
        x = words if packing is None else packing.pack(words)
        for block, table in zip(self.blocks, tables):
            last = asking if block is self.blocks[-1] else None
            x = run_block(block, x, valid, table, *seen, packing, last, recompute=self.recompute)
        return self.ln_final(x)


class PairHead(nn.Module):
    """Two linear maps with a norm between: D to 2 D to `outputs`."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, 2 * width)
        self.norm = LayerNorm(2 * width)
        self.out = nn.Linear(2 * width, outputs)
        for linear in (self.hidden, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.norm(self.hidden(x))))


class WordHead(nn.Module):
    """States (N, D) as the token table takes them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, eps = config.text.width, 1e-5 if config.text.bert is None else BERT_EPS
        self.dense = nn.Linear(width, width)
        self.norm = LayerNorm(width, eps=eps)
        nn.init.normal_(self.dense.weight, std=width**-0.5)
        nn.init.zeros_(self.dense.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(x)))
