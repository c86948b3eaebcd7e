"""What a data source gives: samples, their regions and questions, and an account of what was left out."""

from __future__ import annotations

from typing import Any, NamedTuple


class DataError(ValueError):
    """A data source that cannot be used, said in one line."""


class BadSample(Exception):
    """One sample that cannot be used.

    Args:
        cause: what is wrong, in words that many samples share.
        key: the sample's key.
    """

    def __init__(self, cause: str, key: str) -> None:
        super().__init__(f"{key}: {cause}")
        self.cause = cause
        self.key = key

    def __reduce__(self):
        return type(self), (self.cause, self.key)


class Region(NamedTuple):
    """A part of an image and the words for it.

    `box` is (x0, y0, x1, y1) as shares of width and height. `caption` is the index of the caption in which the phrase
    occurs, -1 where none does. `attributes` hold what a source knows besides.
    """

    phrase: str
    box: tuple[float, float, float, float]
    caption: int
    attributes: dict[str, Any] | None = None


class Question(NamedTuple):
    """A question about an image; `kind` is one of exists, count, color, shape, relation."""

    question: str
    answer: str
    kind: str


class Sample(NamedTuple):
    """An image, all its captions, and what is known of its parts.

    `image` is a PIL image or a uint8 array (height, width, 3).
    """

    image: Any
    captions: tuple[str, ...]
    key: str
    regions: tuple[Region, ...] | None = None
    questions: tuple[Question, ...] | None = None

    def described(self, caption: int = 0) -> tuple[Region, ...]:
        """The regions that a caption speaks of.

        Args:
            caption: index into `captions`.

        Returns:
            The regions whose phrase occurs in that caption, or that every caption mentions.
        """
        regions = self.regions or ()
        return tuple(r for r in regions if r.caption == caption or (r.attributes or {}).get("described"))


class Skipped:
    """An account, by cause, of what was left out: whole samples once each, rows and captions one by one."""

    def __init__(self) -> None:
        self.samples: dict[str, str] = {}
        self.rows: dict[str, int] = {}
        self._examples: dict[str, str] = {}

    def sample(self, key: str, cause: str) -> bool:
        """Notes a sample; returns whether it is a new one."""
        if key in self.samples:
            return False
        self.samples[key] = cause
        self._examples.setdefault(cause, key)
        return True

    def row(self, cause: str, where: str) -> None:
        """Notes a row or caption of a table."""
        self.rows[cause] = self.rows.get(cause, 0) + 1
        self._examples.setdefault(cause, where)

    def counts(self) -> dict[str, int]:
        """Cause to count, samples and rows together."""
        counts = dict(self.rows)
        for cause in self.samples.values():
            counts[cause] = counts.get(cause, 0) + 1
        return counts

    def line(self) -> str:
        """One line for a person, empty if nothing was left out."""
        counts = self.counts()
        if not counts:
            return ""
        parts = [f"{counts[cause]} x {cause} (first: {self._examples[cause]})" for cause in sorted(counts)]
        return "left out: " + ", ".join(parts)

    def __bool__(self) -> bool:
        return bool(self.samples or self.rows)


class Source:
    """A map-style data set.

    `fresh` says that every epoch has samples of its own: epoch e holds the indices e * len(self) + i.
    `skipped` accounts for what was left out while the source was opened.
    """

    name: str
    split: str
    fresh: bool = False
    skipped: Skipped

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        """The whole sample; raises BadSample where it cannot be used, IndexError behind the end."""
        raise NotImplementedError

    def pair(self, index: int, pick: int) -> tuple[Any, str, str]:
        """Image, one caption and key: what a training step needs.

        Args:
            index: of the sample.
            pick: any integer at least 0; equal ones choose the same caption.

        Returns:
            The image as in `Sample`, a caption, the key.

        Raises:
            BadSample: the sample cannot be used.
        """
        sample = self[index]
        return sample.image, sample.captions[pick % len(sample.captions)], sample.key

    def texts(self, limit: int | None = None):
        """The captions alone, of the first `limit` samples, without touching an image: food for a tokenizer."""
        raise NotImplementedError


def readable(dataset: Source, indices=None, skipped: Skipped | None = None):
    """The usable samples among the given ones, in order; the others are counted.

    Args:
        dataset: the source.
        indices: iterable of int; all of the data set where it is None.
        skipped: the account to write into; the data set's own where it is None.

    Yields:
        (index, Sample).
    """
    account = dataset.skipped if skipped is None else skipped
    for index in range(len(dataset)) if indices is None else indices:
        try:
            sample = dataset[index]
        except BadSample as bad:
            account.sample(bad.key, bad.cause)
        else:
            yield index, sample
