"""Captions by a bidirectional text encoder and the fusion encoder above it, both run causally.

    x = E token + pos;  x <- text blocks(x);  x <- fusion blocks(x, image);  logits = E word_head(LN(x)) + b

Position t sees the positions 0..t and the whole image. The weights are those that align texts with images, the head
that of masked words, the end [SEP], as in X-VLM (arXiv 2111.08276): what is learned is to do without the words to come.
Keys and values of an image are projected once for all its captions.
"""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sycoca.cache import Cached, GrowingKeysValues, Recomputed
from sycoca.decode_step import FusionStep, SelfStep, fits
from sycoca.decoders import asked
from sycoca.fusion import Seen
from sycoca.layers import KeysValues, run_block
from sycoca.packing import Packing

if TYPE_CHECKING:
    from sycoca.model import ImageFeatures
    from sycoca.xvlm import XVLM


def caption_logits(model: "XVLM", image: "ImageFeatures", tokens: Tensor) -> Tensor:
    """As `SyCoCa.caption_logits`."""
    return _words(model, model.word_head(_states(model, image, tokens, None)))


def caption_loss(model: "XVLM", image: "ImageFeatures", tokens: Tensor, labels: Tensor) -> Tensor:
    """As `SyCoCa.caption_loss`."""
    packing = Packing.of(asked(labels)) if model.text.packs else None
    x = _states(model, image, tokens[:, :-1], packing)
    labels = labels.flatten() if packing is None else labels.flatten()[packing.rows]
    smoothing = model.config.loss.caption_label_smoothing
    return model.text.sequence.tokens(states=model.word_head(x.flatten(0, 1)), labels=labels, label_smoothing=smoothing)


def _words(model: "XVLM", states: Tensor) -> Tensor:
    return model.text.sequence.tokens(states=states)


def _states(model: "XVLM", image: "ImageFeatures", tokens: Tensor, packing: Packing | None) -> Tensor:
    """What the word head reads of tokens (N, T), N / B neighbouring rows to each image: (N, T, D), or packed."""
    views, text, fusion = model.view_images(image), model.text, model.fusion
    seen, (B, N) = views.seen, (len(views.seen.index), len(tokens))
    if N != B:
        seen = seen.of(torch.arange(B, device=tokens.device).repeat_interleave(N // B))
    x = text.sequence(tokens)
    if packing is not None:
        x = packing.pack(x)
    for block in text.blocks:
        x = run_block(block.causally, x, None, packing, recompute=text.recompute)
    for block, table in zip(fusion.blocks, views.tables):
        look = partial(block.cross, table=table, seen=seen, packing=packing)
        x = run_block(block.causally, x, look, None, packing, recompute=fusion.recompute)
    return fusion.ln_final(x)


class FusedCached(Cached):
    """A session that computes every key and value once.

    Args:
        model: X-VLM that was taught to write.
        image_features: of B images.
        room: most tokens of a caption that are advanced over.
    """

    def __init__(self, model: "XVLM", image_features: "ImageFeatures", room: int) -> None:
        views, blocks = model.view_images(image_features), (model.text.blocks, model.fusion.blocks)
        self._model, self._text = model, model.text
        self._images = len(views.seen.index)
        self._tokens = torch.empty(self._images, 0, dtype=torch.int64, device=views.seen.index.device)
        heads = model.config.fusion.heads
        self._memories = [_memory(table, views.seen, heads) for table in views.tables]
        self._words, self._told = (GrowingKeysValues(len(part), room) for part in blocks)
        own = model.config.text.bert is None and all(fits(block) for part in blocks for block in part)
        self._steps = self._single_steps() if own else None

    def _single_steps(self) -> tuple[list[SelfStep], list[FusionStep]]:
        return list(map(SelfStep, self._text.blocks)), list(map(FusionStep, self._model.fusion.blocks, self._memories))

    def _visible(self, first: int) -> None:
        return None

    def _logits(self, x: Tensor) -> Tensor:
        return _words(self._model, self._model.word_head(self._model.fusion.ln_final(x)))

    def _through_blocks(self, x: Tensor, visible: None) -> Tensor:
        for layer, block in enumerate(self._text.blocks):
            x = block.causally(x, self._words.past(layer))
        for layer, (block, memory) in enumerate(zip(self._model.fusion.blocks, self._memories)):
            x = block.causally(x, partial(block.cross.among, memory=memory), self._told.past(layer))
        return x[:, -1]

    def _through_steps(self, x: Tensor, keep: None) -> Tensor:
        words, told = self._steps
        for step, growth in zip(words, self._words.growths()):
            step(x, growth)
        for step, growth in zip(told, self._told.growths()):
            step(x, growth)
        return x


class FusedRecomputed(Recomputed):
    """A session without memory, and the meaning of `FusedCached`. Arguments as there."""

    def __init__(self, model: "XVLM", image_features: "ImageFeatures", room: int) -> None:
        super().__init__(model, image_features, room)
        self._image = image_features

    def advance(self, tokens: Tensor) -> Tensor:
        self._prefix = torch.cat((self._prefix, tokens), dim=1)
        x = _states(self._model, self._image, self._prefix, None)[:, -1]
        return _words(self._model, self._model.word_head(x)).float()


def _memory(table: Tensor, seen: Seen, heads: int) -> KeysValues:
    """Keys and values (B, H, S, d) of B whole images, from a table (R, 2 D)."""
    rows = table[seen.index].unflatten(2, (2, heads, -1))
    return KeysValues(*rows.permute(2, 0, 3, 1, 4).contiguous().unbind(0))
