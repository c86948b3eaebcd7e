"""Causal text encoder with [CLS] behind the padding, as in open_clip's CoCa.

    visible(i, j) = j <= i and seen(j)
    last          seen = [token is no padding, 1]
    last_shifted  seen = [1, token is no padding]: one place too far, as in the weights released so far

[CLS] has a position of its own. Padding is told by its id, so in CLIP's vocabulary the word "!" is not seen either.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sycoca.config import ModelConfig
from sycoca.layers import Block, KeysValues, run_block
from sycoca.text import EncodedText, TextEncoder, TokenSequence, valid_tokens


class PaddedTokenSequence(TokenSequence):
    """Token embeddings with positions, and [CLS] behind them."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.cls_pos = nn.Parameter(torch.empty(config.width))
        nn.init.normal_(self.cls_pos, std=0.01)

    def with_cls(self, tokens: Tensor) -> Tensor:
        """(B, T + 1, D) of tokens (B, T)."""
        cls = self.cls + self.cls_pos
        return torch.cat([super().forward(tokens), cls.expand(len(tokens), 1, -1)], dim=1)


class MaskedBlock(Block):
    """A causal block that can also be told which keys each query sees, (B, N, M) bool."""

    def forward(self, x: Tensor, past=None, packing=None, visible: Tensor | None = None) -> Tensor:
        if visible is None:
            return super().forward(x, past, packing)
        q, k, v = self.attn._split(self.attn.qkv(self.ln_attn(x)))
        if past is not None:
            k, v = past.extend(KeysValues(k, v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None])
        x = x + self.attn.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.ln_mlp(x))


class PaddedTextEncoder(TextEncoder):
    block, sequence_kind = MaskedBlock, PaddedTokenSequence

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.shifted = config.text.cls_place == "last_shifted"

    def forward(self, tokens: Tensor) -> EncodedText:
        x = self._masked(self.sequence.with_cls(tokens), tokens)
        return EncodedText(self.ln_final(x[:, -1]), x[:, :-1], valid_tokens(tokens, self.config))

    def words(self, tokens: Tensor) -> Tensor:
        """States (B, T, D) of tokens (B, T) that may be unfinished; no [CLS]."""
        return self._masked(self.sequence(tokens), tokens)

    def visible(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Which tokens (B, T) those from `first` on see: (B, T - first, T) bool."""
        return self._visible(tokens, tokens.shape[1])[:, first:]

    def _visible(self, tokens: Tensor, N: int) -> Tensor:
        seen = tokens != self.config.pad_id
        always = seen.new_ones(len(seen), 1)
        seen = torch.cat([always, seen] if self.shifted else [seen, always], dim=1)[:, :N]
        visible = torch.ones(N, N, dtype=torch.bool, device=tokens.device).tril() & seen[:, None]
        # A query that sees nothing would become NaN.
        blind = ~visible.any(2, keepdim=True)
        return visible | (blind & torch.eye(N, dtype=torch.bool, device=tokens.device))

    def _masked(self, x: Tensor, tokens: Tensor) -> Tensor:
        visible = self._visible(tokens, x.shape[1])
        for block in self.blocks:
            x = run_block(block, x, None, None, visible, recompute=self.recompute)
        return x
