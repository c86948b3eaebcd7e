"""What a data source gives: samples, their regions and questions, and an account of what was left out."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

LONGEST_CAPTION = 10_000


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


def caption_fault(caption: str) -> str | None:
    """What is wrong with a caption, in words that many share; bytes that are not UTF-8 arrive as surrogates."""
    if not caption or caption.isspace():
        return "empty caption"
    if len(caption) > LONGEST_CAPTION:
        return f"caption over {LONGEST_CAPTION} characters"
    if "\0" in caption:
        return "caption holds NUL"
    if not caption.isascii() and any("\ud800" <= c <= "\udfff" for c in caption):
        return "caption is not UTF-8"
    return None


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

    `image` is a PIL image or a uint8 array (height, width, 3). `detections` are boxes (x0, y0, x1, y1) as shares of the
    sides that a detector found, without words.
    """

    image: Any
    captions: tuple[str, ...]
    key: str
    regions: tuple[Region, ...] | None = None
    questions: tuple[Question, ...] | None = None
    detections: tuple[tuple[float, float, float, float], ...] | None = None

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
    """An account, by cause, of what was left out.

    `samples` are whole ones, by name; `rows` those of the lists that are read when a source is opened, by cause;
    `parts` what reading found unusable beside or within samples, by place. Samples and parts count once each, however
    often and by however many processes they are read.
    """

    def __init__(self) -> None:
        self.samples: dict[str, str] = {}
        self.rows: dict[str, int] = {}
        self.parts: dict[str, tuple[str, str]] = {}
        self._examples: dict[str, str] = {}

    def sample(self, key: str, cause: str, index: int | None = None) -> bool:
        """Notes a sample; returns whether it is a new one. Its index tells it from others of the same key."""
        name = key if index is None else f"{key} (sample {index})"
        if name in self.samples:
            return False
        self.samples[name] = cause
        self._examples.setdefault(cause, key)
        return True

    def row(self, cause: str, where: str) -> None:
        """Notes a row or caption of a table."""
        self.rows[cause] = self.rows.get(cause, 0) + 1
        self._examples.setdefault(cause, where)

    def part(self, place: str, cause: str, where: str) -> None:
        """Notes what reading found at a place, which names it among all parts; `where` is for a person."""
        self.parts.setdefault(place, (cause, where))
        self._examples.setdefault(cause, where)

    def counts(self) -> dict[str, int]:
        """Cause to count, samples, rows and parts together."""
        counts = dict(self.rows)
        for cause in (*self.samples.values(), *(cause for cause, _ in self.parts.values())):
            counts[cause] = counts.get(cause, 0) + 1
        return counts

    def add(self, other: Skipped) -> None:
        """Takes over another account."""
        self.add_rows(other.rows, other._examples)
        for name, cause in other.samples.items():
            self.sample(name, cause)
        self.add_parts(other.parts)

    def add_rows(self, rows: dict[str, int], examples: dict[str, str]) -> None:
        """Takes over counts of rows by cause, and an example of each."""
        for cause, count in rows.items():
            self.rows[cause] = self.rows.get(cause, 0) + count
        for cause, example in examples.items():
            self._examples.setdefault(cause, example)

    def add_parts(self, parts: Mapping[str, tuple[str, str]]) -> None:
        """Takes over parts that another process found."""
        for place, (cause, where) in parts.items():
            self.part(place, cause, where)

    def parts_from(self, start: int) -> dict[str, tuple[str, str]]:
        """The parts noted after the first `start`."""
        return dict(itertools.islice(self.parts.items(), start, None)) if len(self.parts) > start else {}

    def examples(self) -> dict[str, str]:
        """The first sample or row of each cause."""
        return dict(self._examples)

    def line(self) -> str:
        """One line for a person, empty if nothing was left out."""
        counts = self.counts()
        if not counts:
            return ""
        parts = [f"{counts[cause]} x {cause} (first: {self._examples[cause]})" for cause in sorted(counts)]
        return "left out: " + ", ".join(parts)

    def __bool__(self) -> bool:
        return bool(self.samples or self.rows or self.parts)


class Source:
    """A map-style data set.

    `fresh` says that every epoch has samples of its own: epoch e holds the indices e * len(self) + i.
    `repeats` says that an epoch may show a sample more than once.
    `exact` says that captions name exact colours.
    `far` says that samples come over a network, so that it helps to name them ahead, by about `reach` samples.
    `skipped` accounts for what was left out while the source was opened.
    """

    name: str
    split: str
    fresh: bool = False
    repeats: bool = False
    exact: bool = False
    far: bool = False
    reach: int = 0
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

    def captions(self, index: int) -> tuple[str, ...]:
        """All captions of a sample, without touching its image where that is possible."""
        return self[index].captions

    def captioned(self, index: int) -> tuple[Any, tuple[str, ...], str]:
        """Image, all captions and key, without what else a sample may hold."""
        sample = self[index]
        return sample.image, sample.captions, sample.key

    def region_count(self, index: int) -> int:
        """How many regions a sample lists, where that is known without touching the image; raises BadSample."""
        return len(self[index].regions or ())

    def texts(self, limit: int | None = None):
        """The captions alone, of the first `limit` samples, without touching an image: food for a tokenizer."""
        raise NotImplementedError

    def encoded(self, index: int) -> tuple[bytes, str]:
        """The image as a file: its bytes and its ending; the stored bytes where there are any, else PNG.

        Raises:
            BadSample: the file is missing.
        """
        from PIL import Image

        image = self[index].image
        file = io.BytesIO()
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, "PNG")
        return file.getvalue(), "png"

    def order(self, epoch: int, positions: np.ndarray, seed: int) -> np.ndarray:
        """The samples at the given positions of an epoch: a permutation keyed by seed and epoch.

        Args:
            epoch: its number.
            positions: (n,) int64 in [0, len(self)).
            seed: of the run.

        Returns:
            (n,) int64.
        """
        from train.data.order import ORDER, mix, shuffled

        return shuffled(positions, len(self), mix(seed, epoch, ORDER))

    def stand_in(self, number: int, word: int, attempt: int) -> int:
        """A sample to take instead of the bad one `number`, chosen by a 64-bit word."""
        return word % len(self)

    def identities(self, numbers: np.ndarray) -> np.ndarray:
        """Equal integers for what is the same sample, of (n,) int64 that `order` gave."""
        return numbers

    def ready(self) -> None:
        """Reads what the samples share, before workers are forked."""

    def spans(self, samples: int) -> None:
        """Told how far apart in the order lie samples that are read or prefetched at one time."""

    def prefetch(self, numbers: np.ndarray) -> None:
        """Told which samples will be asked for soon; a source that fetches from afar begins with it."""


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
            account.sample(bad.key, bad.cause, index)
        else:
            yield index, sample
