"""WebDataset tar shards, read at any place: samples are counted once, so that an epoch is a function of integers.

A sample is an image and its captions: the list `captions` of its .json, else the lines of its .txt, else the `caption`
of its .json. An index (`train.data.shard_index`) spares the counting, names splits, and is needed for shards that come
over a network. Those are read a window of shards at a time:

    shards of epoch e      permutation keyed by (seed, e), cut into windows
    within window g        permutation of all its samples keyed by (seed, e, g)

good + left out = indexed: a sample that the index counts and the tar no longer gives is left out as lost.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from train.data.box_augment import Box
from train.data.fetch import FetchError
from train.data.image_list import VAL_SHARE, hash_share
from train.data.order import ORDER, held_out_rows, mix, mix_array, shuffled
from train.data.paths import told
from train.data.regions import read_region, read_shares
from train.data.sample import BadSample, DataError, Region, Sample, Skipped, Source, caption_fault
from train.data.shard_cache import ShardCache
from train.data.shard_index import REMOTE, Shard, read_index
from train.data.spec import INDEX
from train.data.tars import IMAGE, JSON, LARGEST_IMAGE, LARGEST_TEXT, TEXT, Listing, scan

WINDOW = 4
_OPEN_FILES = 64
_LISTINGS = 1024


def find_shards(names: tuple[str, ...], path: Path | None, index: str | None) -> list[Shard]:
    """The shards of a specification, with what an index knows of them.

    Args:
        names: paths or locations of the shards; empty for all that the index lists.
        path: the index itself, or the folder of the shards.
        index: where the index is, if the user says so.

    Raises:
        DataError: no index where one is needed, or shards that it does not list.
    """
    if not names:
        return read_index(index or str(path))
    if index is None:
        beside = names[0].rpartition("/")[0] + "/" + INDEX
        if names[0].startswith("pipe:"):
            beside = None
        elif not names[0].startswith(REMOTE):
            beside = str(Path(names[0]).parent / INDEX)
            beside = beside if os.path.isfile(beside) else None
        index = beside
    known: dict[str, Shard] = {}
    try:
        if index is not None:
            known = {shard.place: shard for shard in read_index(index)}
    except DataError as error:
        raise DataError(f"{error}; {_MAKE_INDEX}") from None
    by_name = {shard.name: shard for shard in known.values()}
    shards = []
    for name in names:
        shard = known.get(name) or by_name.get(name.rpartition("/")[2])
        if shard is None and name.startswith(REMOTE):
            raise DataError(f"data source {name!r}: not in an index of shards; {_MAKE_INDEX}")
        shards.append(Shard(name, None, None, None, None) if shard is None else shard._replace(place=name))
    return shards


_MAKE_INDEX = "python -m train.data.prepare --index SPEC OUT writes one, option index=FILE names it"


class Shards(Source):
    """Samples of tar shards.

    Args:
        name: as the user wrote it.
        shards: where they are and what is known of them.
        split: train, val or test.
        val_share: share of the samples that validation gets where the index names no splits.
        cache: folder that keeps fetched shards; None for a temporary one.
        window: shards that are read at a time where they have to be fetched.
        whole: without splits, all samples belong to the split asked for.

    Raises:
        DataError: nothing in this split.
    """

    def __init__(
        self,
        name: str,
        shards: list[Shard],
        split: str,
        *,
        val_share: float = VAL_SHARE,
        cache: str | None = None,
        window: int = WINDOW,
        whole: bool = False,
    ) -> None:
        self.name, self.split, self.skipped = name, split, Skipped()
        self._window = window
        self._listings: OrderedDict[int, Listing] = OrderedDict()
        self._files: OrderedDict[int, tuple[int, Any]] = OrderedDict()
        has_splits = any(shard.split is not None for shard in shards)
        self._shards = [shard for shard in shards if not has_splits or shard.split == split]
        if not self._shards:
            found = ", ".join(sorted({str(shard.split) for shard in shards}))
            raise DataError(f"data source '{name}': no shard of split {split!r}; it has: {found}")
        self.far = any(shard.remote for shard in self._shards)
        self._cache = ShardCache(cache, 3 * window) if self.far else None
        counts = [self._count(number) for number in range(len(self._shards))]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._rows = None if has_splits or whole else self._part(val_share)
        if not len(self):
            why = f"; {self.skipped.line()}" if self.skipped else ""
            raise DataError(f"data source '{name}': no sample of split {split!r}{why}")
        # First row of every shard in this split, and how many it has.
        rows = self._starts if self._rows is None else np.searchsorted(self._rows, self._starts)
        self._first, self._counts = rows[:-1], np.diff(rows)
        self.reach = -(-len(self) * window // len(self._shards)) if self.far else 0

    def _count(self, number: int) -> int:
        shard = self._shards[number]
        if shard.samples is not None:
            return shard.samples
        with told(shard.place):
            listing = self._scanned(shard, Path(shard.place))
        self._listings[number] = listing
        return len(listing.keys)

    def _part(self, val_share: float) -> np.ndarray:
        """Rows of this split, by a hash of each sample's shard and number."""
        if self.split == "test":
            raise DataError(f"data source '{self.name}': no index names a split 'test'; there are train and val")
        words = np.empty(int(self._starts[-1]), dtype=np.uint64)
        for number, shard in enumerate(self._shards):
            start, end = self._starts[number], self._starts[number + 1]
            words[start:end] = mix_array(int(hash_share(shard.name) * 2**63), np.arange(end - start))
        return np.flatnonzero(held_out_rows(words, val_share) == (self.split == "val"))

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._rows is None else len(self._rows)

    def order(self, epoch: int, positions: np.ndarray, seed: int) -> np.ndarray:
        if not self.far:
            return super().order(epoch, positions, seed)
        number = len(self._shards)
        shards = shuffled(np.arange(number), number, mix(seed, epoch, ORDER, 1))
        starts = np.concatenate([[0], np.cumsum(self._counts[shards])])
        windows = starts[: -1 : self._window]
        at = np.searchsorted(windows, positions, side="right") - 1
        result = np.empty(len(positions), dtype=np.int64)
        for window in np.unique(at).tolist():
            here = at == window
            begin = windows[window]
            size = int(starts[min(number, (window + 1) * self._window)] - begin)
            inside = begin + shuffled(positions[here] - begin, size, mix(seed, epoch, ORDER, 2, window))
            slot = np.searchsorted(starts, inside, side="right") - 1
            result[here] = self._first[shards[slot]] + inside - starts[slot]
        return result

    def stand_in(self, number: int, word: int, attempt: int) -> int:
        if not self.far or attempt % 4 == 3:
            return word % len(self)
        # One from the same shard, which is here already.
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        return int(self._first[shard]) + word % int(self._counts[shard])

    def spans(self, samples: int) -> None:
        if self.far:
            # The windows at both ends are read whole.
            self._cache.room(-(-min(samples, len(self)) * len(self._shards) // len(self)) + 2 * self._window)

    def prefetch(self, numbers: np.ndarray) -> None:
        if self.far:
            for shard in np.unique(np.searchsorted(self._first, numbers, side="right") - 1).tolist():
                if self._shards[shard].remote:
                    self._cache.ahead(self._shards[shard])

    def _place(self, index: int) -> tuple[int, int]:
        """Shard and number within it."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        row = index if self._rows is None else int(self._rows[index])
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return shard, row - int(self._starts[shard])

    def _open(self, number: int, key: str) -> tuple[Listing, int]:
        """Listing and file descriptor of a shard."""
        shard = self._shards[number]
        try:
            try:
                self._make_open(number)
            except FileNotFoundError:
                if not shard.remote:
                    raise
                # Another process made room before this one had it open.
                self._files.pop(number, None)
                self._make_open(number)
            self._files.move_to_end(number)
        except FetchError as error:
            raise BadSample(f"lost: shard did not come ({error})", key) from None
        except FileNotFoundError:
            raise BadSample("lost: missing shard", key) from None
        except OSError:
            raise BadSample("lost: unreadable shard", key) from None
        return self._listings[number], self._files[number][0]

    def _make_open(self, number: int) -> None:
        shard = self._shards[number]
        # Reads name their place, so a descriptor may be shared with forked workers.
        if number not in self._files:
            path = self._cache.path(shard) if shard.remote else Path(shard.place)
            file = open(path, "rb")  # noqa: SIM115
            self._files[number] = file.fileno(), file
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)[1][1].close()
            if shard.remote or number not in self._listings:
                self._listings[number] = self._scanned(shard, path)
                if len(self._listings) > _LISTINGS:
                    self._listings.popitem(last=False)
        if number not in self._listings:
            self._listings[number] = self._scanned(shard, Path(self._files[number][1].name))

    def _scanned(self, shard: Shard, path: Path) -> Listing:
        listing = scan(path)
        for number, (cause, where) in enumerate(listing.faults):
            self.skipped.part(f"{shard.place} fault {number}", cause, where)
        if shard.samples is not None and len(listing.keys) > shard.samples:
            self.skipped.part(f"{shard.place} size", "shard holds more than its index says", shard.name)
        return listing

    def _read(self, index: int) -> tuple[Listing, int, int, str]:
        number, inner = self._place(index)
        shard = self._shards[number]
        key = f"{shard.name}#{inner}"
        listing, descriptor = self._open(number, key)
        if inner >= len(listing.keys):
            raise BadSample("lost: no longer in its shard", key)
        return listing, inner, descriptor, listing.keys[inner]

    def _part_of(self, listing: Listing, inner: int, descriptor: int, role: int, key: str) -> bytes | None:
        offset, size = listing.spans[inner, role].tolist()
        if offset < 0:
            return None
        if size > (LARGEST_IMAGE if role == IMAGE else LARGEST_TEXT):
            raise BadSample("member too large", key)
        data = os.pread(descriptor, size, offset)
        if len(data) != size:
            raise BadSample("lost: shard became shorter", key)
        return data

    def _words(self, index: int, *, boxed: bool = False) -> tuple[tuple[str, ...], str, dict]:
        """Usable captions, key, and the sample's JSON; with `boxed`, regions may stand in for captions."""
        listing, inner, descriptor, key = self._read(index)
        raw = self._part_of(listing, inner, descriptor, JSON, key)
        data: Any = {}
        if raw is not None:
            try:
                data = json.loads(raw.decode("utf-8", "surrogateescape"))
            except (ValueError, RecursionError):
                self._note(index, "json", "JSON of a sample is damaged", key)
        data = data if isinstance(data, dict) else {}
        if isinstance(data.get("captions"), list):
            captions = [text if isinstance(text, str) else "" for text in data["captions"]]
            key = data["key"] if isinstance(data.get("key"), str) else key
        elif (text := self._part_of(listing, inner, descriptor, TEXT, key)) is not None:
            captions = text.decode("utf-8", "surrogateescape").removeprefix("\ufeff").strip().splitlines() or [""]
        else:
            captions = [data["caption"]] if isinstance(data.get("caption"), str) else []
        faults = [caption_fault(caption) for caption in captions]
        kept = tuple(caption.strip() for caption, fault in zip(captions, faults) if not fault)
        if not kept and not (boxed and data.get("regions")):
            raise BadSample(faults[0] if faults else "missing caption", key)
        for place, fault in enumerate(faults):
            if fault:
                self._note(index, f"caption {place}", fault, key)
        return kept, key, {**data, "faults": faults}

    def _note(self, index: int, part: str, cause: str, key: str) -> None:
        shard, inner = self._place(index)
        self.skipped.part(f"{self._shards[shard].place}#{inner} {part}", cause, key)

    def encoded(self, index: int) -> tuple[bytes, str]:
        listing, inner, descriptor, key = self._read(index)
        data = self._part_of(listing, inner, descriptor, IMAGE, key)
        if data is None:
            raise BadSample("missing image", key)
        return data, listing.endings[inner]

    def _image(self, index: int, key: str):
        # Imports torch; shards are opened without it.
        from sycoca.images import ImageError, decode

        data, _ = self.encoded(index)
        if not data:
            raise BadSample("empty file", key)
        try:
            return decode(data)
        except ImageError as error:
            raise BadSample(error.cause, key) from None

    def __getitem__(self, index: int) -> Sample:
        captions, key, data = self._words(index, boxed=True)
        regions, detections = self._regions(index, data, key), self._detections(index, data, key)
        return Sample(self._image(index, key), captions, key, regions, detections=detections)

    def pair(self, index: int, pick: int):
        captions, key, _ = self._words(index)
        return self._image(index, key), captions[pick % len(captions)], key

    def _regions(self, index: int, data: dict, key: str) -> tuple[Region, ...] | None:
        if not isinstance(data.get("regions"), list):
            return None
        kept = [place for place, fault in enumerate(data["faults"]) if not fault]
        regions = []
        for place, item in enumerate(data["regions"]):
            try:
                region = read_region(item)
            except ValueError as error:
                self._note(index, f"region {place}", str(error), key)
                continue
            regions.append(region._replace(caption=kept.index(region.caption) if region.caption in kept else -1))
        return tuple(regions)

    def _detections(self, index: int, data: dict, key: str) -> tuple[Box, ...] | None:
        if not isinstance(data.get("detections"), list):
            return None
        found = []
        for place, box in enumerate(data["detections"]):
            try:
                found.append(read_shares(box))
            except ValueError as error:
                self._note(index, f"detection {place}", f"detection: {error}", key)
        return tuple(found)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._words(index)[0]

    def region_count(self, index: int) -> int:
        found = self._words(index, boxed=True)[2].get("regions")
        return len(found) if isinstance(found, list) else 0

    def texts(self, limit: int | None = None):
        for index in range(min(len(self), limit or len(self))):
            try:
                yield from self._words(index)[0]
            except BadSample:
                continue
