"""Captions written token by token.

    y_0 = [SOT],  y_(t+1) = choose(logits(y_0 .. y_t | patches)),  until every caption holds [EOT]

A session answers "which token comes next" and holds whatever that takes; a chooser turns logits into a token.
`Recomputed` runs the decoder over the whole prefix at every step: time grows with the square of the length.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Session(Protocol):
    """The state of N captions that grow together."""

    def advance(self, token: Tensor) -> Tensor:
        """Appends one token (N,) int64 to every caption; returns the logits (N, V) fp32 of the next."""


class Recomputed:
    """A session without memory: the decoder sees the whole prefix anew."""

    def __init__(self, model: Any, image_features: Any) -> None:
        self._model, self._image_features = model, image_features
        self._prefix: Tensor | None = None

    def advance(self, token: Tensor) -> Tensor:
        grown = token[:, None]
        self._prefix = grown if self._prefix is None else torch.cat((self._prefix, grown), dim=1)
        return self._model.caption_logits(self._image_features, self._prefix)[:, -1].float()


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token (N,) of logits (N, V); among equals the first."""
    return logits.argmax(dim=-1)


def decode(
    session: Session,
    first: Tensor,
    *,
    max_length: int,
    eot_id: int,
    pad_id: int,
    choose: Callable[[Tensor], Tensor] = greedy,
) -> Tensor:
    """Grows captions until all have ended or are full.

    Args:
        session: fresh, nothing advanced yet.
        first: (N,) int64, the token before the caption.
        max_length: most tokens of a caption, `first` and the end included, at least 1.
        eot_id: the token that ends a caption.
        pad_id: the token behind the end.
        choose: logits (N, V) fp32 to tokens (N,) int64.

    Returns:
        (N, t) int64, t at most `max_length`; a caption that does not end in time holds no `eot_id`.
    """
    written, token = [first], first
    ended = torch.zeros_like(first, dtype=torch.bool)
    while len(written) < max_length and not bool(ended.all()):
        token = choose(session.advance(token)).masked_fill(ended, pad_id)
        ended = ended | ((token == eot_id) & ~ended)
        written.append(token)
    return torch.stack(written, dim=1)


@torch.no_grad()
def generate(model: Any, tokenizer: Any, images: Tensor, *, max_length: int | None = None) -> list[str]:
    """Captions of a batch of images, greedily.

    Args:
        model: SyCoCa with the objective `ic`.
        tokenizer: the one the model was trained with.
        images: (B, 3, height, width) float, normalised.
        max_length: most tokens of a caption, its start and end included; the model's context length where None.

    Returns:
        B captions without special tokens.

    Raises:
        ValueError: `max_length` is outside 1..context length.
    """
    if len(images) == 0:
        return []
    return generate_from(model, tokenizer, model.encode_image(images), max_length=max_length)


@torch.no_grad()
def generate_from(model: Any, tokenizer: Any, image_features: Any, *, max_length: int | None = None) -> list[str]:
    """Captions of images that `model.encode_image` has seen; otherwise as `generate`."""
    text = model.config.text
    limit = text.context_length if max_length is None else max_length
    if not 1 <= limit <= text.context_length:
        raise ValueError(f"generate: max_length must lie in 1..{text.context_length}, got {max_length}")
    patches = image_features.patches
    first = torch.full((patches.shape[0],), text.sot_id, dtype=torch.int64, device=patches.device)
    session = Recomputed(model, image_features)
    tokens = decode(session, first, max_length=limit, eot_id=text.eot_id, pad_id=text.pad_id)
    return tokenizer.decode(tokens)
