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

from sycoca.layers import KeysValues


class Session(Protocol):
    """The state of N captions that grow together."""

    def advance(self, tokens: Tensor) -> Tensor:
        """Appends tokens (N, n) int64 to the captions; n above 1 only at first. Logits (N, V) fp32 of the next."""

    def select(self, rows: Tensor) -> None:
        """Goes on with copies of the captions `rows` (M,) int64, of which every image has equally many."""


class GrowingKeysValues:
    """Keys and values of one self-attention layer in memory that is taken once.

    Args:
        room: most tokens.
    """

    def __init__(self, room: int) -> None:
        self._room, self._length = room, 0
        self._stored: Tensor | None = None  # (2, N, H, room, d)

    def extend(self, new: KeysValues) -> KeysValues:
        """Keys and values of all tokens, those of `new` (N, H, n, d) behind the ones before."""
        N, H, n, d = new.keys.shape
        if self._stored is None:
            self._stored = new.keys.new_empty(2, N, H, self._room, d)
        elif n > 1:
            raise ValueError("cache: several tokens at once only at the beginning of the captions")
        end = self._length + n
        self._stored[0, :, :, self._length : end] = new.keys
        self._stored[1, :, :, self._length : end] = new.values
        self._length = end
        return KeysValues(*self._stored[:, :, :, :end].unbind(0))

    def select(self, rows: Tensor) -> None:
        """Keeps copies of the captions `rows` (M,) int64."""
        written = self._stored[:, :, :, : self._length].index_select(1, rows)
        if len(rows) != self._stored.shape[1]:
            _, _, H, room, d = self._stored.shape
            self._stored = self._stored.new_empty(2, len(rows), H, room, d)
        self._stored[:, :, :, : self._length] = written


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
        self._words = [GrowingKeysValues(room) for _ in self._text.blocks]
        self._layers = [
            (causal, GrowingKeysValues(room), cross, cross.look_up(patches)) for causal, cross in self._decoder.layers()
        ]

    def advance(self, tokens: Tensor) -> Tensor:
        first = self._tokens.shape[1]
        self._tokens = torch.cat((self._tokens, tokens), dim=1)
        x, visible = self._text.sequence(tokens, first=first), self._text.visible(self._tokens, first)
        masks = () if visible is None else (None, visible)
        for block, past in zip(self._text.blocks, self._words):
            x = block(x, past, *masks)
        N, n, D = x.shape
        for causal, past, cross, patches in self._layers:
            x = causal(x, past).view(self._images, -1, D)
            x = cross(x, patches).view(N, n, D)
        return self._decoder.head(x[:, -1:]).squeeze(1).float()

    def select(self, rows: Tensor) -> None:
        for past in (*self._words, *(past for _, past, _, _ in self._layers)):
            past.select(rows)
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
