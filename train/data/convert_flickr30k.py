"""Flickr30k Entities as region lines by split: a phrase of a caption, and the box about all that it names.

Sentences/ID.txt        one caption a line, "[/EN#283585/people Two young guys] with [/EN#283587/bodyparts shaggy hair]"
Annotations/ID.xml      sizes, and objects with the numbers of the phrases that name them and a box, or none
train.txt, ...          the ids of a split, one a line
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from train.data.convert_common import Found, Line, fits
from train.data.region_elems import LARGEST_SIDE
from train.data.sample import DataError, Skipped, caption_fault

_PHRASE = re.compile(r"\[/EN#(\d+)(?:/[^\s\]]*)? ([^\]]+)\]")
_SPLITS = ("train", "val", "test")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_boxes(path: Path) -> tuple[tuple[int, int], dict[str, list[tuple[int, ...]]]]:
    """Size of the image and the boxes (x0, y0, x1, y1) in pixels of each entity.

    Raises:
        ValueError: the file is damaged.
        OSError: there is none.
    """
    try:
        root = ElementTree.fromstring(path.read_bytes())
        size = int(root.findtext("size/width", "")), int(root.findtext("size/height", ""))
        boxes: dict[str, list[tuple[int, ...]]] = {}
        for item in root.iter("object"):
            box = item.find("bndbox")
            if box is not None:
                corners = tuple(int(box.findtext(name, "")) for name in _CORNERS)
                for name in item.iter("name"):
                    boxes.setdefault((name.text or "").strip(), []).append(corners)
    except (ElementTree.ParseError, LookupError) as error:
        raise ValueError(str(error)) from None
    if not all(0 < side < LARGEST_SIDE for side in size):
        raise ValueError(f"an image of {size[0]} x {size[1]} pixels")
    return size, boxes


def plain_caption(marked: str) -> tuple[str, list[tuple[str, str]]]:
    """A caption without its marks, and its phrases as (number, words)."""
    return _PHRASE.sub(r"\2", marked).strip(), _PHRASE.findall(marked)


def convert(folder: Path, images: Path | None, skipped: Skipped) -> Iterator[Line]:
    """Region lines of Flickr30k's phrases.

    Args:
        folder: holds `Sentences`, `Annotations` and the lists of the splits.
        images: folder of the images, to leave out those that are not there; None looks at none.
        skipped: the account.
    """
    lists = {split: folder / f"{split}.txt" for split in _SPLITS if (folder / f"{split}.txt").is_file()}
    for name in ("Sentences", "Annotations"):
        if not (folder / name).is_dir():
            raise DataError(f"'{folder}': no folder '{name}' in it")
    if not lists:
        raise DataError(f"'{folder}': no train.txt, val.txt or test.txt in it")
    found = Found(images, skipped)
    for split, path in lists.items():
        for name in filter(None, map(str.strip, path.read_text(encoding="utf-8", errors="replace").splitlines())):
            line = _line(folder, split, Path(name).stem, found, skipped)
            if line is not None:
                yield line


def _line(folder: Path, split: str, name: str, found: Found, skipped: Skipped) -> Line | None:
    try:
        (width, height), boxes = read_boxes(folder / "Annotations" / f"{name}.xml")
        marked = (folder / "Sentences" / f"{name}.txt").read_text("utf-8", "surrogateescape").splitlines()
    except FileNotFoundError:
        skipped.sample(name, "image without annotations or sentences")
        return None
    except (ValueError, OSError):
        skipped.sample(name, "damaged annotations or sentences")
        return None
    captions, elems = [], []
    for text in filter(str.strip, marked):
        caption, phrases = plain_caption(text)
        if fault := caption_fault(caption):
            skipped.row(fault, name)
            continue
        for entity, words in phrases:
            # Scenes and what is not to be seen have numbers and no box.
            if entity not in boxes:
                continue
            elem, key = {"caption": words, "caption_index": len(captions)}, f"{name} {entity}"
            # A fault would not be seen any more in the box about all of them.
            sound = [
                (x0, y0, x1, y1)
                for x0, y0, x1, y1 in boxes[entity]
                if fits(elem | {"bb": [x0, y0, x1 - x0, y1 - y0]}, width, height, skipped, key)
            ]
            if sound:
                x0, y0, x1, y1 = (f(side) for f, side in zip((min, min, max, max), zip(*sound)))
                elems.append(elem | {"bb": [x0, y0, x1 - x0, y1 - y0]})
        captions.append(caption)
    if not elems:
        skipped.sample(name, "image without a usable region")
        return None
    image = found((width, height), f"{name}.jpg")
    if image is None:
        return None
    return Line(split, {"image_rpath": image, "width": width, "height": height, "caption": captions, "elems": elems})
