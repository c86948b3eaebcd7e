"""Phrase boxes: one as a file gives it, and the file of them beside a list of images."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from train.data.sample import Region, Source

_NAMES = ("regions.jsonl.gz", "regions.jsonl")
_BOX_SLACK = 1e-3


def box_fault(box: Sequence[float]) -> str | None:
    """What is wrong with a box (x0, y0, x1, y1) in 0..1 of its image, in words that many share."""
    x0, y0, x1, y1 = box
    # A writer's rounding may put a side just outside; NaN is nowhere.
    if not all(-_BOX_SLACK <= side <= 1 + _BOX_SLACK for side in box):
        return "box of a region is outside its image"
    if x0 > x1 or y0 > y1:
        return "box of a region has swapped corners"
    if min(1.0, x1) <= max(0.0, x0) or min(1.0, y1) <= max(0.0, y0):
        return "box of a region has no area"
    return None


def united(regions: Iterable[Region]) -> list[Region]:
    """Regions in which a phrase that its caption says of several boxes ("two dogs") has one box about all of them.

    A phrase has one answer then, as Flickr30k's phrases are judged in the literature. Regions that are of no caption
    stay apart.
    """
    found: dict[object, Region] = {}
    for place, region in enumerate(regions):
        key = (region.phrase.strip().lower(), region.caption) if region.caption >= 0 else place
        if key in found:
            (x0, y0, x1, y1), (left, top, right, bottom) = found[key].box, region.box
            box = min(x0, left), min(y0, top), max(x1, right), max(y1, bottom)
            region = found[key]._replace(box=box)
        found[key] = region
    return list(found.values())


def asked_of(regions: Iterable[Region] | None) -> Iterator[tuple[str, Region]]:
    """Every phrase of usable regions with its region, each phrase of a caption once."""
    usable = [region for region in regions or () if not box_fault(region.box) and region.phrase.strip()]
    for region in united(usable):
        for phrase in (region.attributes or {}).get("phrases") or (region.phrase,):
            yield phrase, region


def read_region(item) -> Region:
    """A region as its file gives it; ValueError says in words that many share why it cannot be used."""
    if not isinstance(item, dict):
        raise ValueError("region is not an object")
    phrase, box, caption = item.get("phrase"), item.get("bbox"), item.get("caption", -1)
    if not isinstance(phrase, str) or not phrase.strip():
        raise ValueError("region without a phrase")
    if "\ufffd" in phrase:
        raise ValueError("phrase of a region is not UTF-8")
    box = read_shares(box)
    if type(caption) is not int:
        raise ValueError("caption of a region is not a whole number")
    attributes = item.get("attributes")
    return Region(phrase, box, caption, attributes if isinstance(attributes, dict) else None)


def read_shares(box) -> tuple[float, float, float, float]:
    """A box (x0, y0, x1, y1) in 0..1 of its image, clipped to it; ValueError as `read_region` raises it."""
    if not isinstance(box, list) or len(box) != 4 or any(type(side) not in (int, float) for side in box):
        raise ValueError("box of a region is not four numbers")
    if fault := box_fault(box):
        raise ValueError(fault)
    x0, y0, x1, y1 = (min(1.0, max(0.0, float(side))) for side in box)
    return x0, y0, x1, y1


class RegionFile:
    """The boxes that lie beside a list, read at the first question; damage costs the boxes it hits, and is counted."""

    def __init__(self, folder: Path, owner: Source) -> None:
        self._folder, self._owner = folder, owner
        self._found: dict[str, list[Region]] | None = None

    def of(self, name: str, wanted: Sequence[str]) -> list[Region] | None:
        """The boxes of an image; `wanted` names all images that may be asked for."""
        if self._found is None:
            self._found = self._read(set(wanted))
        return self._found.get(name)

    def _read(self, wanted: set[str]) -> dict[str, list[Region]]:
        path = next((self._folder / n for n in _NAMES if os.path.isfile(self._folder / n)), None)
        if path is None:
            return {}
        regions: dict[str, list[Region]] = {}
        reader = gzip.open if path.suffix == ".gz" else open
        number = 0
        try:
            with reader(path, "rt", encoding="utf-8", errors="replace") as file:
                for number, line in enumerate(file, 1):
                    where = f"{path.name}:{number}"
                    try:
                        entry = json.loads(line)
                        name, found = entry["image"], list(entry["regions"])
                        if name not in wanted:
                            continue
                    except (ValueError, KeyError, TypeError, RecursionError):
                        self._owner.skipped.row("line of regions is damaged", where)
                        continue
                    regions[name] = []
                    for item in found:
                        try:
                            regions[name].append(read_region(item))
                        except ValueError as error:
                            self._owner.skipped.row(str(error), where)
        except (EOFError, OSError, zlib.error):
            self._owner.skipped.row("file of regions is damaged", f"{path.name}:{number + 1}")
        return regions
