"""Causal text encoder with [CLS] behind the caption.

The [CLS] stands directly behind the last valid token and keeps its own embedding there, so that the causal
mask alone lets it see the whole caption and no padding, and no key mask is ever stored.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sycoca.config import ModelConfig, TextConfig
from sycoca.layers import Block, LayerNorm, init_blocks, run_block
from sycoca.packing import Packing


class EncodedText(NamedTuple):
    """Output of the text encoder.

    Attributes:
        cls: (B, D) normalised [CLS].
        words: (B, T, D) states of the tokens; those that are not valid mean nothing.
        valid: (B, T) bool, tokens up to the first [EOT].
    """

    cls: Tensor
    words: Tensor
    valid: Tensor


def valid_tokens(tokens: Tensor, config: TextConfig) -> Tensor:
    """Which tokens (B, T) belong to the caption: all up to the first [EOT], or up to trailing padding without one."""
    ends = tokens == config.eot_id
    behind_end = ends.cumsum(1) - ends.long() > 0
    content_follows = (tokens != config.pad_id).flip(1).cumsum(1).flip(1) > 0
    return content_follows & ~behind_end


class TokenSequence(nn.Module):
    """Embeddings of the tokens from position `first` on; with `lengths` (B,) also [CLS] behind that many tokens."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.pos = nn.Parameter(torch.empty(config.context_length, config.width))
        self.cls = nn.Parameter(torch.empty(config.width))
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.pos, std=0.01)
        nn.init.normal_(self.cls, std=0.02)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None, first: int = 0) -> Tensor:
        B, T = tokens.shape
        x = self.tokens(tokens) + self.pos[first : first + T]
        if lengths is None:
            return x
        x = torch.cat([x, self.cls.expand(B, 1, -1)], dim=1)
        here = torch.arange(T + 1, device=tokens.device) == lengths[:, None]
        return torch.where(here[:, :, None], self.cls, x)


class TextEncoder(nn.Module):
    block, sequence_kind = Block, TokenSequence

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text = config.text
        self.config = text
        self.recompute = config.recompute
        self.packs = True
        self.sequence = self.sequence_kind(text)
        self.blocks = nn.ModuleList(
            self.block(text.width, text.heads, text.mlp_ratio, causal=True) for _ in range(text.depth)
        )
        self.ln_final = LayerNorm(text.width)
        init_blocks(self.blocks, text.width, text.depth)

    def forward(self, tokens: Tensor) -> EncodedText:
        valid = valid_tokens(tokens, self.config)
        lengths = valid.sum(1)
        x = self.sequence(tokens, lengths)
        keep = torch.arange(x.shape[1], device=x.device) <= lengths[:, None]
        packing = Packing.of(keep) if self.packs else None
        x = self._run(x) if packing is None else packing.unpack(self._run(packing.pack(x), packing))
        cls = x.gather(1, lengths[:, None, None].expand(-1, 1, x.shape[2])).squeeze(1)
        return EncodedText(self.ln_final(cls), x[:, :-1], valid)

    def words(self, tokens: Tensor) -> Tensor:
        """States (B, T, D) of tokens (B, T) that may be unfinished; no [CLS]."""
        return self._run(self.sequence(tokens))

    def visible(self, tokens: Tensor, first: int = 0) -> Tensor | None:
        """Which tokens (B, T) those from `first` on see, (B, T - first, T) bool; None: all before them."""
        return None

    def _run(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        for block in self.blocks:
            x = run_block(block, x, None, packing, recompute=self.recompute)
        return x


def build_text_encoder(config: ModelConfig) -> TextEncoder:
    """The text encoder that a configuration names."""
    if config.text.bert is not None:
        from sycoca.bert import BertTextEncoder

        return BertTextEncoder(config)
    if config.text.kind == "bidirectional":
        from sycoca.bidirectional import BidirectionalTextEncoder

        return BidirectionalTextEncoder(config)
    if config.text.cls_place == "behind_caption":
        return TextEncoder(config)
    from sycoca.text_padded import PaddedTextEncoder

    return PaddedTextEncoder(config)
