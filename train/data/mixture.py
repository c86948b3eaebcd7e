"""Sources mixed by weight.

Position P of the whole run lies in period P div M, at place P mod M. In every period source s has k_s of the M places,
k_s / M its weight to the nearest M-th, in an order of the period's own. The c-th place that source s ever gets shows
sample c mod n_s of its pass c div n_s; each pass has its own order. So the shares hold in every stretch of the run, no
source shows a sample again before all its others were shown, and any place costs the same.
"""

from __future__ import annotations

import numpy as np

from train.data.order import PLACES, mix, shuffled
from train.data.sample import DataError, Sample, Skipped, Source

PERIOD = 4096


def _places(weights: list[float]) -> np.ndarray:
    """How many places of a period each source gets: largest remainders."""
    exact = np.array(weights) / sum(weights) * PERIOD
    places = np.floor(exact).astype(np.int64)
    places[np.argsort(places - exact, kind="stable")[: PERIOD - places.sum()]] += 1
    return places


class Mixture(Source):
    """Several sources as one; an epoch has as many samples as all of them together.

    Index i in [0, len) is a sample of one source after the other; in the order of an epoch index p len + i is the same
    sample in pass p, so that a fresh source can give another one.

    Args:
        parts: the sources.
        weights: of each, above 0; they need not add up to 1.
        name: as the user wrote it.

    Raises:
        DataError: a weight too small to get a place.
    """

    repeats = True

    def __init__(self, parts: list[Source], weights: list[float], name: str) -> None:
        self.name, self.split = name, parts[0].split
        self.skipped = Skipped()
        for part in parts:
            self.skipped.add(part.skipped)
            part.skipped = self.skipped
        self._parts = parts
        self.far = any(part.far for part in parts)
        self.exact = any(part.exact for part in parts)
        self._sizes = np.array([len(part) for part in parts])
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        self._owners = np.repeat(np.arange(len(parts)), places := _places(weights))
        if not places.all():
            part = parts[int(np.argmin(places))]
            raise DataError(f"data source {name!r}: the weight of '{part.name}' is below 1/{PERIOD} of all")
        self._places = places
        self.reach = min((p.reach * PERIOD // int(n) for p, n in zip(parts, places) if p.far), default=0)
        self._period: tuple[tuple[int, int], np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, index: int) -> tuple[Source, int]:
        turn, i = divmod(index, len(self))
        s = int(np.searchsorted(self._starts, i, side="right")) - 1
        part, inner = self._parts[s], i - int(self._starts[s])
        return part, inner + turn * len(part) if part.fresh else inner

    def __getitem__(self, index: int) -> Sample:
        if not index >= 0:
            raise IndexError(f"sample {index}")
        part, inner = self._find(index)
        return part[inner]

    def pair(self, index: int, pick: int):
        part, inner = self._find(index)
        return part.pair(inner, pick)

    def captions(self, index: int) -> tuple[str, ...]:
        part, inner = self._find(index)
        return part.captions(inner)

    def captioned(self, index: int):
        part, inner = self._find(index)
        return part.captioned(inner)

    def encoded(self, index: int) -> tuple[bytes, str]:
        part, inner = self._find(index)
        return part.encoded(inner)

    def region_count(self, index: int) -> int:
        part, inner = self._find(index)
        return part.region_count(inner)

    def texts(self, limit: int | None = None):
        # A tokenizer sees the sources in the shares in which training does.
        for part, places in zip(self._parts, self._places):
            yield from part.texts(None if limit is None else max(1, int(limit * places / PERIOD)))

    def _in_period(self, period: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Source at each place of a period, and its rank among that source's places."""
        if self._period is None or self._period[0] != (seed, period):
            owners = self._owners[shuffled(np.arange(PERIOD), PERIOD, mix(seed, period, PLACES))]
            ranks = np.empty(PERIOD, dtype=np.int64)
            for s, places in enumerate(self._places):
                ranks[owners == s] = np.arange(places)
            self._period = (seed, period), owners, ranks
        return self._period[1:]

    def order(self, epoch: int, positions: np.ndarray, seed: int) -> np.ndarray:
        whole = np.asarray(positions, dtype=np.int64) + epoch * len(self)
        periods, places = np.divmod(whole, PERIOD)
        owners, counts = np.empty_like(whole), np.empty_like(whole)
        for period in np.unique(periods):
            here = periods == period
            in_period, ranks = self._in_period(int(period), seed)
            owners[here] = in_period[places[here]]
            counts[here] = ranks[places[here]] + period * self._places[owners[here]]
        turns, places = np.divmod(counts, self._sizes[owners])
        numbers = np.empty_like(whole)
        for s, turn in np.unique(np.stack([owners, turns]), axis=1).T.tolist():
            here = (owners == s) & (turns == turn)
            inner = self._parts[s].order(turn, places[here], mix(seed, s))
            numbers[here] = inner + (turn * len(self) + int(self._starts[s]))
        return numbers

    def stand_in(self, number: int, word: int, attempt: int) -> int:
        turn, i = divmod(number, len(self))
        s = int(np.searchsorted(self._starts, i, side="right")) - 1
        start = int(self._starts[s])
        return turn * len(self) + start + self._parts[s].stand_in(i - start, word, attempt)

    def identities(self, numbers: np.ndarray) -> np.ndarray:
        plain = numbers % len(self)
        fresh = np.array([part.fresh for part in self._parts])[np.searchsorted(self._starts, plain, side="right") - 1]
        return np.where(fresh, numbers, plain)

    def ready(self) -> None:
        for part in self._parts:
            part.ready()

    def spans(self, samples: int) -> None:
        for part, places in zip(self._parts, self._places):
            part.spans(-(-samples * int(places) // PERIOD))

    def prefetch(self, numbers: np.ndarray) -> None:
        plain = np.asarray(numbers) % len(self)
        owners = np.searchsorted(self._starts, plain, side="right") - 1
        for s, part in enumerate(self._parts):
            part.prefetch(plain[owners == s] - self._starts[s])
