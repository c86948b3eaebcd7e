"""Texts as BERT encodes them: transformers' layers, as text encoder and, with cross-attention, as fusion encoder.

    text     x = LN(E token + pos + segment);  x <- LN(x + self(x));  x <- LN(x + MLP(x));  cls = x_0
    fusion   x <- LN(x + self(x));  x <- LN(x + cross(x, rows seen));  x <- LN(x + MLP(x))

Attention sees padded texts; all else packed ones. The cross-attention is that of the other fusion encoder, so that keys
and values of the image tokens stay one table per layer; its weights alone are never dropped.
"""

from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer

from sycoca.backbone_config import BERT_EPS
from sycoca.bidirectional import BidirectionalTextEncoder, TokenTable
from sycoca.config import ModelConfig
from sycoca.fusion import IndexedAttention, Seen, states_at
from sycoca.layers import KeysValues, LayerNorm, Past, attend
from sycoca.packing import Packing

_STD = 0.02


def _sizes(config: ModelConfig, heads: int, mlp_ratio: float) -> transformers.BertConfig:
    text, bert = config.text, config.text.bert
    return transformers.BertConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.width,
        num_attention_heads=heads,
        intermediate_size=int(text.width * mlp_ratio),
        hidden_dropout_prob=bert.dropout,
        attention_probs_dropout_prob=bert.dropout,
        max_position_embeddings=bert.positions,
        type_vocab_size=bert.segments,
        pad_token_id=text.pad_id,
        layer_norm_eps=BERT_EPS,
        attn_implementation="sdpa",
    )


def _initialise(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=_STD)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)


class BertSequence(nn.Module):
    """Normalised embeddings of tokens (B, T) that stand at the positions from `first` on."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text = config.text
        self.tokens = TokenTable(text.vocab_size, text.width, config.learns("mlm") or text.writes)
        self.embeddings = BertEmbeddings(_sizes(config, text.heads, text.mlp_ratio))
        self.embeddings.word_embeddings = None
        # Tables of constants: no weight file holds them.
        del self.embeddings.position_ids, self.embeddings.token_type_ids
        _initialise(self.embeddings)

    def forward(self, tokens: Tensor, first: int = 0) -> Tensor:
        place = tokens.new_ones(1, tokens.shape[1]).cumsum(1) + (first - 1)
        return self.embeddings(
            inputs_embeds=self.tokens(tokens), position_ids=place, token_type_ids=place.new_zeros(1, 1)
        )


class BertBlock(BertLayer):
    """Self-attention, then MLP."""

    def __init__(self, sizes: transformers.BertConfig) -> None:
        super().__init__(sizes)
        _initialise(self)

    def forward(
        self, x: Tensor, past: None = None, packing: Packing | None = None, valid: Tensor | None = None
    ) -> Tensor:
        return self.feed_forward_chunk(self.attend(x, valid, packing))

    def attend(self, x: Tensor, valid: Tensor, packing: Packing | None) -> Tensor:
        """States behind self-attention, of texts (B, T, D), or packed ones, whose tokens `valid` (B, T) are seen."""
        return self._attended(x, valid[:, None, None, :], packing)

    def causally(self, x: Tensor, past: Past | None = None, packing: Packing | None = None) -> Tensor:
        """As `forward`, but position i sees the positions 0..i, those of the past among them."""
        return self.feed_forward_chunk(self.attend_causally(x, past, packing))

    def attend_causally(self, x: Tensor, past: Past | None, packing: Packing | None) -> Tensor:
        """States behind self-attention, as `attend`, position i of which sees the positions 0..i."""
        if past is None:
            T = x.shape[1] if packing is None else packing.shape[1]
            return self._attended(x, x.new_ones(1, 1, T, T, dtype=torch.bool).tril(), packing)
        own, heads = self.attention.self, (*x.shape[:2], self.attention.self.num_attention_heads, -1)
        q, k, v = (linear(x).view(heads).transpose(1, 2) for linear in (own.query, own.key, own.value))
        k, v = past.extend(KeysValues(k, v))
        return self.attention.output(attend(q, k, v, causal=x.shape[1] > 1), x)

    def _attended(self, x: Tensor, visible: Tensor, packing: Packing | None) -> Tensor:
        texts = x if packing is None else packing.unpack(x)
        found, _ = self.attention.self(texts, attention_mask=visible)
        return self.attention.output(found if packing is None else packing.pack(found), x)


class BertFusionBlock(BertBlock):
    """Self-attention over the text, cross-attention to an image, MLP; as `sycoca.fusion.FusionBlock`."""

    def __init__(self, sizes: transformers.BertConfig, memory_width: int) -> None:
        super().__init__(sizes)
        self.cross = IndexedAttention(sizes.hidden_size, sizes.num_attention_heads, memory_width)
        self.dropout_cross = nn.Dropout(sizes.hidden_dropout_prob)
        self.ln_cross = LayerNorm(sizes.hidden_size, eps=BERT_EPS)
        _initialise(self.cross)

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
        x = self.attend(x, valid, packing)
        if asking is not None:
            x, packing = states_at(x, packing, asking), None
        x = self.ln_cross(x + self.dropout_cross(self.cross(x, table, Seen(index, visible), packing)))
        return self.feed_forward_chunk(x)

    def causally(
        self, x: Tensor, look: Callable[[Tensor], Tensor], past: Past | None = None, packing: Packing | None = None
    ) -> Tensor:
        x = self.attend_causally(x, past, packing)
        return self.feed_forward_chunk(self.ln_cross(x + self.dropout_cross(look(x))))

    def look_up(self, rows: Tensor) -> Tensor:
        """Keys and values (R, 2 D) of image tokens (R, D')."""
        return self.cross.kv(rows)


class BertTextEncoder(BidirectionalTextEncoder):
    """The first layers of a BERT."""

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        text = config.text
        self.config = text
        self.recompute = config.recompute
        self.packs = True
        self.sequence = BertSequence(config)
        sizes = _sizes(config, text.heads, text.mlp_ratio)
        self.blocks = nn.ModuleList(BertBlock(sizes) for _ in range(text.depth))
        # The last layer's norm is the text's.
        self.ln_final = nn.Identity()


def fusion_blocks(config: ModelConfig) -> nn.ModuleList:
    """The last layers of a BERT, each with a cross-attention."""
    sizes = _sizes(config, config.fusion.heads, config.fusion.mlp_ratio)
    return nn.ModuleList(BertFusionBlock(sizes, config.vision.width) for _ in range(config.fusion.depth))
