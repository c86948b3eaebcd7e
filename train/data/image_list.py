"""Images listed with their captions: what tables, JSON files and class folders have in common.

Captions listed under the same image are its captions. Without splits a fixed hash of the image's name holds out a small
share for validation, two images where there are three, and never all. What cannot be used is counted by cause; images
are opened only when their sample is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from train.data.paths import SPLITS, quoted_nearest, told
from train.data.regions import RegionFile
from train.data.sample import BadSample, DataError, Region, Sample, Skipped, Source, caption_fault

VAL_SHARE = 0.02
_LOOKED_AT = 16


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except (OSError, ValueError):
        # A name may be none that the system knows.
        return False


class Listed(NamedTuple):
    """One caption as a list gives it: where it stands, its image, its split (None where there are none), its text.

    A caption of None names an image that has none.
    """

    where: str
    image: str
    split: str | None
    caption: str | None


def hash_share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") / 2**64


def held_out(images: list[str], share: float) -> set[str]:
    """The images that validation gets where a list has no splits."""
    held = {image for image in images if hash_share(image) < share}
    # Retrieval among the held-out images needs two.
    least = min(2, len(images) - 1)
    if len(held) < least:
        held = set(sorted(images, key=hash_share)[:least])
    if len(images) > 1 and len(held) == len(images):
        held.remove(max(images, key=hash_share))
    return held


def _nearest_split(unknown: list[str]) -> str:
    """The end of an error line about values of the column `split` that name none."""
    hints = {value: quoted_nearest(value.lower(), SPLITS) for value in unknown}
    value = next((value for value in unknown if hints[value]), unknown[0])
    return f"; unknown split {value!r}{hints[value] or '; there are train, val and test'}"


class ImageList(Source):
    """A map-style data set of listed images.

    Args:
        path: of the list, for messages.
        split: train, val or test.
        folders: where images are looked for; one that holds more of the first images is looked into first.
        val_share: share of the images that validation gets where the list has no splits.
        whole: without splits, all images belong to the split asked for.

    Raises:
        DataError: nothing usable in this split.
    """

    def __init__(
        self, path: Path, split: str, folders: list[Path], *, val_share: float = VAL_SHARE, whole: bool = False
    ) -> None:
        self.name = str(path)
        self.split = split
        self.path = Path(path)
        self.skipped = Skipped()
        self._folders = folders
        self._images: list[str] = []
        self._captions: list[tuple[str, ...]] = []
        # Positions in the list of the captions kept, where some were left out: regions count as the list does.
        self._kept: dict[str, tuple[int, ...]] = {}
        with told(self.path):
            self._take(self.listed(), val_share, whole)
        first = self._images[:_LOOKED_AT]
        self._folders.sort(key=lambda folder: -sum(os.path.isfile(folder / name) for name in first))
        self._regions = RegionFile(self.path.parent, self)

    def listed(self) -> Iterable[Listed]:
        """All captions of the list; what cannot be one is counted in `skipped`."""
        raise NotImplementedError

    def _take(self, listed: Iterable[Listed], val_share: float, whole: bool) -> None:
        captions: dict[str, list[str | None]] = {}
        splits: dict[str, str] = {}
        unknown: dict[str, None] = {}
        has_splits = False
        for where, name, said, caption in listed:
            image = name.strip()
            if not image or "\0" in image:
                self.skipped.row("empty image name" if not image else "image name holds NUL", where)
                continue
            if said is not None:
                has_splits = True
                split = SPLITS.get(said.strip().lower())
                if split is None:
                    self.skipped.row("unknown split", where)
                    unknown.setdefault(said.strip())
                    continue
                if splits.setdefault(image, split) != split:
                    self.skipped.row("image is of another split already", where)
                    continue
                if split != self.split:
                    continue
            texts = captions.setdefault(image, [])
            if caption is None:
                continue
            fault = caption_fault(caption)
            if fault:
                self.skipped.row(fault, where)
            texts.append(None if fault else caption.strip())
        if not has_splits and not whole:
            captions = self._part(captions, val_share)
        for image, texts in captions.items():
            kept = tuple(i for i, text in enumerate(texts) if text is not None)
            if not kept:
                self.skipped.sample(image, "image without a usable caption")
                continue
            self._images.append(image)
            self._captions.append(tuple(texts[i] for i in kept))
            if len(kept) != len(texts):
                self._kept[image] = kept
        if not self._images:
            found = f"; it has: {', '.join(sorted(set(splits.values())))}" if splits else ""
            if unknown:
                found += _nearest_split(list(unknown))
            why = f"; {self.skipped.line()}" if self.skipped else ""
            raise DataError(f"data source '{self.path}': no usable row for split {self.split!r}{found}{why}")

    def _part(self, captions: dict[str, list[str | None]], val_share: float) -> dict[str, list[str | None]]:
        if self.split == "test":
            raise DataError(
                f"data source '{self.path}': it names no splits, so no split 'test'; there are train and val"
            )
        held = held_out([image for image, texts in captions.items() if any(t is not None for t in texts)], val_share)
        return {image: texts for image, texts in captions.items() if (image in held) == (self.split == "val")}

    def __len__(self) -> int:
        return len(self._images)

    def _decode(self, name: str):
        # Imports torch; a list is opened without it.
        from sycoca.images import ImageError, decode

        for folder in self._folders:
            try:
                return decode(folder / name)
            except ImageError as error:
                if error.cause != "missing image":
                    empty = error.cause == "unreadable image" and _is_empty(folder / name)
                    raise BadSample("empty file" if empty else error.cause, name) from None
        raise BadSample("missing image", name)

    def encoded(self, index: int) -> tuple[bytes, str]:
        name = self._images[index]
        for folder in self._folders:
            try:
                return (folder / name).read_bytes(), Path(name).suffix.lstrip(".").lower() or "jpg"
            except FileNotFoundError:
                continue
            except OSError:
                raise BadSample("unreadable image", name) from None
        raise BadSample("missing image", name)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self._images):
            raise IndexError(f"sample {index} of {len(self._images)}")
        name = self._images[index]
        return Sample(self._decode(name), self._captions[index], name, self._regions_of(index))

    def pair(self, index: int, pick: int):
        name, captions = self._images[index], self._captions[index]
        return self._decode(name), captions[pick % len(captions)], name

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions[index]

    def captioned(self, index: int):
        name = self._images[index]
        return self._decode(name), self._captions[index], name

    def texts(self, limit: int | None = None):
        for captions in self._captions[:limit]:
            yield from captions

    def region_count(self, index: int) -> int:
        return len(self._regions.of(self._images[index], self._images) or ())

    def ready(self) -> None:
        self._regions.of("", self._images)

    def _regions_of(self, index: int) -> tuple[Region, ...] | None:
        name = self._images[index]
        found = self._regions.of(name, self._images)
        if found is None:
            return None
        kept = self._kept.get(name, range(len(self._captions[index])))
        return tuple(
            region._replace(caption=kept.index(region.caption) if region.caption in kept else -1) for region in found
        )
