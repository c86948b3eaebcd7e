"""Visual Genome's regions, objects or attributes as region lines, read as a stream.

image_data.json             [{"image_id", "width", "height", "url"}]
region_descriptions.json    [{"id", "regions": [{"image_id", "phrase", "x", "y", "width", "height"}]}]
objects.json                [{"image_id", "objects": [{"names", "x", "y", "w", "h"}]}]
attributes.json             [{"image_id", "attributes": [{"names", "attributes", "x", "y", "w", "h"}]}]
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.data.convert_common import (
    Found,
    Line,
    file_named,
    fits,
    image_size,
    key_of,
    plain_texts,
    read_json,
    stream_list,
)
from train.data.sample import DataError, Skipped

_LISTS = ("regions", "attributes", "objects")


def _region(item: dict[str, Any]) -> dict[str, Any]:
    return {"caption": plain_texts(item.get("phrase")), "bb": [item.get(k) for k in ("x", "y", "width", "height")]}


def _object(item: dict[str, Any]) -> dict[str, Any]:
    elem = {"caption": plain_texts(item.get("names")), "bb": [item.get(k) for k in ("x", "y", "w", "h")]}
    attributes = plain_texts(item.get("attributes"))
    return elem | {"attributes": attributes} if attributes else elem


def _images(path: Path, skipped: Skipped) -> dict[Any, dict[str, Any]]:
    content = read_json(path)
    if not isinstance(content, list):
        raise DataError(f"'{path}': no list of images")
    found = {}
    for place, image in enumerate(content):
        where, key = f"{path.name}[{place}]", key_of(image.get("image_id")) if isinstance(image, dict) else None
        if key is None or image_size(image) is None:
            skipped.row("image without id or size", where)
        elif not file_named(image.get("url")) or "/" not in image["url"]:
            skipped.row("image without an address", where)
        else:
            # Both folders of the download hold names that are numbers; the address says which.
            found[key] = image | {"name": "/".join(image["url"].split("/")[-2:])}
    if not found:
        raise DataError(f"'{path}': no usable image; {skipped.line() or 'it is empty'}")
    return found


def convert(annotations: Path, image_data: Path, images: Path | None, skipped: Skipped) -> Iterator[Line]:
    """Region lines of Visual Genome.

    Args:
        annotations: a file of regions, objects or attributes.
        image_data: the file of sizes and addresses.
        images: folder above `VG_100K` and `VG_100K_2`, or of all images, to leave out those that are not there.
        skipped: the account.
    """
    known, found = _images(image_data, skipped), Found(images, skipped)
    for place, entry in enumerate(stream_list(annotations)):
        where = f"{annotations.name}[{place}]"
        kind = next((name for name in _LISTS if isinstance(entry, dict) and isinstance(entry.get(name), list)), None)
        if kind is None:
            skipped.row("image without a list of regions, attributes or objects", where)
            continue
        image = known.get(key_of(entry.get("image_id", entry.get("id"))))
        if image is None:
            skipped.row("regions of an image that is not listed", where)
            continue
        items = [item if isinstance(item, dict) else {} for item in entry[kind]]
        elems = [(_region if kind == "regions" else _object)(item) for item in items]
        kept = [elem for elem in elems if fits(elem, *image_size(image), skipped, where)]
        if not kept:
            skipped.sample(image["name"], "image without a usable region")
        elif (name := found(image_size(image), image["name"], image["name"].rpartition("/")[2])) is not None:
            size = {"width": image["width"], "height": image["height"]}
            yield Line("", {"image_rpath": name, **size, "elems": kept})
