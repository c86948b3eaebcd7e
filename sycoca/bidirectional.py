"""Bidirectional text encoder, [CLS] first, and its token table, which masked words are predicted with as well.

[CLS] w1 ... wn:  x = E token + pos;  x = blocks(x), every token seeing all that are no padding;  cls = LN(x_0)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sycoca.config import ModelConfig
from sycoca.layers import Block, LayerNorm, init_blocks, position_table, run_block
from sycoca.losses import token_loss
from sycoca.packing import Packing
from sycoca.text import EncodedText, valid_tokens

_STD = 0.02


class TokenTable(nn.Embedding):
    """Embeddings of tokens; with `predicts` also the map from states back to the vocabulary, which adds a bias.

    Both uses pass through `forward`, so that sharded training has the table whole in either.
    """

    def __init__(self, vocab_size: int, width: int, predicts: bool) -> None:
        super().__init__(vocab_size, width)
        nn.init.normal_(self.weight, std=_STD)
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if predicts else None

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        states: Tensor | None = None,
        labels: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Embeddings (..., D) of tokens; of states (N, D) the logits (N, V), or the summed loss of labels (N,)."""
        if states is None:
            return super().forward(tokens)
        if labels is None:
            return F.linear(states, self.weight, self.bias)
        # The bias as one more column, which the states answer with 1.
        table = torch.cat([self.weight, self.bias[:, None]], dim=1)
        return token_loss(F.pad(states, (0, 1), value=1.0), table, labels, label_smoothing)


class BidirectionalSequence(nn.Module):
    """Embeddings of tokens (B, T) that stand at the positions from `first` on."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text = config.text
        self.tokens = TokenTable(text.vocab_size, text.width, config.learns("mlm") or text.writes)
        # Waves, so that what is learned of the words of a phrase holds wherever a caption has the phrase.
        self.pos = nn.Parameter(_STD * 2**0.5 * position_table((text.context_length,), text.width))

    def forward(self, tokens: Tensor, first: int = 0) -> Tensor:
        return self.tokens(tokens) + self.pos[first : first + tokens.shape[1]]


class BidirectionalTextEncoder(nn.Module):
    """Reads whole texts; states of unfinished ones mean nothing."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text = config.text
        self.config = text
        self.recompute = config.recompute
        self.packs = True
        self.sequence = BidirectionalSequence(config)
        self.blocks = nn.ModuleList(Block(text.width, text.heads, text.mlp_ratio) for _ in range(text.depth))
        self.ln_final = LayerNorm(text.width)
        init_blocks(self.blocks, text.width, text.depth)

    def forward(self, tokens: Tensor) -> EncodedText:
        valid = seen_tokens(tokens, self.config)
        x = self.sequence(tokens)
        packing = Packing.of(valid) if self.packs else None
        if packing is not None:
            x = packing.pack(x)
        for block in self.blocks:
            x = run_block(block, x, None, packing, valid, recompute=self.recompute)
        x = x if packing is None else packing.unpack(x)
        return EncodedText(self.ln_final(x[:, 0]), x, valid)


def seen_tokens(tokens: Tensor, config) -> Tensor:
    """Tokens (B, T) bool that may be attended to: those of the text, and the first even of an empty row."""
    valid = valid_tokens(tokens, config)
    first = torch.arange(tokens.shape[1], device=tokens.device) == 0
    return valid | first
