"""How captions are chosen: the options of generation and what they exclude."""

import math
from dataclasses import dataclass, fields
from typing import Any

from sycoca.checked import nearest


@dataclass(frozen=True)
class Decoding:
    """How captions are chosen: greedily, with `temperature` by drawing, with `num_beams` above 1 by beam search.

    Attributes:
        max_length: most tokens of a caption, prompt, start and end included; the model's context length where None.
        min_length: least tokens of a caption, counted alike.
        num_beams: captions that a beam search keeps alive per image.
        num_return: captions per image: draws, or the best of the beams.
        top_k: draw among so many of the likeliest tokens only.
        top_p: draw among the likeliest tokens that together reach this probability only.
        temperature: above 0; 1 draws from the model's own distribution, less prefers the likely.
        length_penalty: beams rank by summed log-probability over length to this power; higher favours longer.
        repetition_penalty: factor on the log-probability of tokens that the caption already holds; above 1 avoids them.
        no_repeat_ngram: length of the sequences of tokens that no caption holds twice; 0 allows all.
        seed: of the draws; from torch's own generator where None.
        first: place of the first image among those that share the seed; the draws of an image follow both.

    Raises:
        ValueError: a value out of its range, or options that exclude one another.
    """

    max_length: int | None = None
    min_length: int = 0
    num_beams: int = 1
    num_return: int = 1
    top_k: int | None = None
    top_p: float | None = None
    temperature: float | None = None
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    seed: int | None = None
    first: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, whole = getattr(self, field.name), field.name in WHOLE_OPTIONS
            if value is not None and type(value) not in ((int,) if whole else (int, float)):
                raise TypeError(f"generate: {field.name} must be a {'whole ' * whole}number, got {value!r}")
        _require(self.num_beams >= 1, "num_beams must be at least 1", self.num_beams)
        _require(self.num_return >= 1, "num_return must be at least 1", self.num_return)
        _require(self.top_k is None or self.top_k >= 1, "top_k must be at least 1", self.top_k)
        _require(self.top_p is None or 0 < self.top_p <= 1, "top_p must lie in (0, 1]", self.top_p)
        _require(
            _positive(self.temperature), "temperature must be above 0 (None chooses the likeliest)", self.temperature
        )
        _require(_positive(self.repetition_penalty), "repetition_penalty must be above 0", self.repetition_penalty)
        _require(-10 <= self.length_penalty <= 10, "length_penalty must lie in -10..10", self.length_penalty)
        _require(self.no_repeat_ngram >= 0, "no_repeat_ngram must be at least 0", self.no_repeat_ngram)
        if self.temperature is None:
            for name in ("top_k", "top_p", "seed"):
                if getattr(self, name) is not None:
                    raise ValueError(f"generate: {name} needs a temperature (1.0 draws from the model's distribution)")
            if self.num_return > self.num_beams:
                raise ValueError(
                    f"generate: num_return={self.num_return} needs at least as many num_beams, or a temperature"
                )
        elif self.num_beams > 1:
            raise ValueError("generate: num_beams searches, temperature draws; give one of them")

    @classmethod
    def of(cls, options: dict[str, Any]) -> "Decoding":
        """The options by name.

        Raises:
            TypeError: an unknown name.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(f"generate: unknown option '{name}'{nearest(name, known)}")
        return cls(**options)

    def lengths(self, context_length: int) -> tuple[int, int]:
        """Least and most tokens of a caption for a model of this context."""
        most = context_length if self.max_length is None else self.max_length
        _require(1 <= most <= context_length, f"max_length must lie in 1..{context_length}", most)
        _require(0 <= self.min_length <= most, f"min_length must lie in 0..{most}", self.min_length)
        return self.min_length, most


WHOLE_OPTIONS = frozenset(field.name for field in fields(Decoding) if field.type in (int, int | None))


def _require(condition: bool, rule: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"generate: {rule}, got {value}")


def _positive(value: float | None) -> bool:
    return value is None or 0 < value < math.inf
