"""What decoding remembers: sessions that answer which token comes next.

    Cached      step t: 1 token through every layer; keys and values of the t - 1 before it and of the patches are kept
    Recomputed  step t: all t tokens anew, and the patches' keys and values with them

N captions belong to B images, N / B neighbouring rows to each. Cross-attention holds the keys and values of the B
images alone: the captions of an image stand side by side as its queries, so that more beams and a new order of them
copy nothing there. Self-attention keeps (N, H, T, d) per layer.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from sycoca.decode_step import CrossStep, Growth, SelfStep, fits
from sycoca.layers import KeysValues


class Session(Protocol):
    """The state of N captions that grow together."""

    def advance(self, tokens: Tensor) -> Tensor:
        """Appends tokens (N, n) int64 to the captions; n above 1 only at first. Logits (N, V) fp32 of the next."""

    def select(self, rows: Tensor) -> None:
        """Goes on with copies of the captions `rows` (M,) int64, of which every image has equally many."""


class GrowingKeysValues:
    """Keys and values of a stack of self-attention layers, in memory that is taken once.

    Args:
        layers: L, of equal heads.
        room: most tokens.
    """

    def __init__(self, layers: int, room: int) -> None:
        self._layers, self._room, self._first, self._length = layers, room, 0, 0
        self._stored: Tensor | None = None  # (L + L, N, H, room, d)

    def begin(self, count: int) -> None:
        """Makes place for so many tokens behind the ones before."""
        if count > 1 and self._length:
            raise ValueError("cache: several tokens at once only at the beginning of the captions")
        self._first, self._length = self._length, self._length + count

    def past(self, layer: int) -> "LayerPast":
        """What a block of this layer is given."""
        return LayerPast(self, layer)

    def extend(self, layer: int, new: KeysValues) -> KeysValues:
        """Keys and values of all tokens of a layer, with `new` (N, H, n, d) in the place that was made."""
        N, H, _, d = new.keys.shape
        if self._stored is None:
            self._stored = new.keys.new_empty(2 * self._layers, N, H, self._room, d)
        parts = self._stored[layer :: self._layers]
        for part, of_new in zip(parts, new):
            part[:, :, self._first : self._length] = of_new
        return KeysValues(*parts[:, :, :, : self._length].unbind(0))

    def growths(self) -> list[Growth]:
        """Of each layer the places of the one new token, and keys and values of all."""
        L, whole = self._layers, self._stored.narrow(3, 0, self._length).unbind(0)
        new = self._stored.narrow(3, self._first, 1).unbind(0)
        return list(map(Growth, new[:L], new[L:], whole[:L], whole[L:]))

    def select(self, rows: Tensor) -> None:
        """Keeps copies of the captions `rows` (M,) int64."""
        written = self._stored[:, :, :, : self._length].index_select(1, rows)
        if len(rows) != self._stored.shape[1]:
            parts, _, H, room, d = self._stored.shape
            self._stored = self._stored.new_empty(parts, len(rows), H, room, d)
        self._stored[:, :, :, : self._length] = written


class LayerPast:
    """The part of one layer in a `GrowingKeysValues`."""

    def __init__(self, stack: GrowingKeysValues, layer: int) -> None:
        self._stack, self._layer = stack, layer

    def extend(self, new: KeysValues) -> KeysValues:
        """As `sycoca.layers.Past`."""
        return self._stack.extend(self._layer, new)


class Cached:
    """A session that computes every key and value once.

    Args:
        model: SyCoCa with the objective `ic`.
        image_features: of B images.
        room: most tokens of a caption that are advanced over.
    """

    def __init__(self, model: Any, image_features: Any, room: int) -> None:
        self._text, self._decoder = model.text, model.caption_decoder
        patches = image_features.memory
        self._images = len(patches)
        self._tokens = torch.empty(self._images, 0, dtype=torch.int64, device=patches.device)
        self._causal, self._cross = zip(*self._decoder.layers())
        self._memories = [KeysValues(*(part.contiguous() for part in c.look_up(patches))) for c in self._cross]
        self._words, self._told = (GrowingKeysValues(len(b), room) for b in (self._text.blocks, self._causal))
        self._steps = self._single_steps() if all(map(fits, (*self._text.blocks, *self._decoder.blocks))) else None

    def _single_steps(self) -> tuple[list[SelfStep], list[SelfStep], list[CrossStep]]:
        words, told = ([SelfStep(block) for block in blocks] for blocks in (self._text.blocks, self._causal))
        return words, told, list(map(CrossStep, self._cross, self._memories))

    def advance(self, tokens: Tensor) -> Tensor:
        first = self._tokens.shape[1]
        self._tokens = torch.cat((self._tokens, tokens), dim=1)
        for stack in (self._words, self._told):
            stack.begin(tokens.shape[1])
        x, visible = self._text.sequence(tokens, first=first), self._visible(first)
        if self._steps is None or first == 0:
            return self._logits(self._through_blocks(x, visible)).float()
        # Spares what autograd notes of every call.
        with torch.inference_mode():
            x = self._through_steps(x.squeeze(1), None if visible is None else visible[:, None])
            return self._logits(x).float()

    def _visible(self, first: int) -> Tensor | None:
        return self._text.visible(self._tokens, first)

    def _logits(self, x: Tensor) -> Tensor:
        return self._decoder.head(x)

    def _through_blocks(self, x: Tensor, visible: Tensor | None) -> Tensor:
        """States (N, D) of the last of tokens (N, n, D), each of which sees `visible` (N, n, M)."""
        masks = () if visible is None else (None, visible)
        for layer, block in enumerate(self._text.blocks):
            x = block(x, self._words.past(layer), *masks)
        N, n, D = x.shape
        for layer, (causal, cross, memory) in enumerate(zip(self._causal, self._cross, self._memories)):
            x = causal(x, self._told.past(layer)).view(self._images, -1, D)
            x = cross(x, memory).view(N, n, D)
        return x[:, -1]

    def _through_steps(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """The same for one token (N, D) that sees `keep` (N, 1, 1, M); in place."""
        words, told, looks = self._steps
        for step, growth in zip(words, self._words.growths()):
            step(x, growth, keep)
        for step, growth, look in zip(told, self._told.growths(), looks):
            step(x, growth)
            look(x)
        return x

    def select(self, rows: Tensor) -> None:
        for stack in (self._words, self._told):
            stack.select(rows)
        self._tokens = self._tokens[rows]


class Recomputed:
    """A session without memory, and the meaning of `Cached`. Arguments as there."""

    def __init__(self, model: Any, image_features: Any, room: int) -> None:
        self._model, self._patches = model, image_features.memory
        self._prefix = torch.empty(len(self._patches), 0, dtype=torch.int64, device=self._patches.device)

    def advance(self, tokens: Tensor) -> Tensor:
        self._prefix = torch.cat((self._prefix, tokens), dim=1)
        per_image = len(self._prefix) // len(self._patches)
        words, decoder = self._model.text.words(self._prefix), self._model.caption_decoder
        states = decoder.states(words, self._patches.repeat_interleave(per_image, dim=0))
        return decoder.head(states[:, -1:]).squeeze(1).float()

    def select(self, rows: Tensor) -> None:
        self._prefix = self._prefix[rows]
