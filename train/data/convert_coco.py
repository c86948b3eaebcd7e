"""COCO instances as region lines: a class name is what its box is called.

{"images": [{"id", "file_name", "width", "height"}],
 "annotations": [{"image_id", "category_id", "bbox": [x, y, w, h], "iscrowd"}], "categories": [{"id", "name"}]}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.data.convert_common import Found, Line, fits, image_size, read_json
from train.data.sample import DataError, Skipped


def coco_lists(path: Path, *names: str) -> list[list[dict[str, Any]]]:
    """The lists of a COCO file; raises DataError where one is missing."""
    content = read_json(path)
    lists = [content.get(name) if isinstance(content, dict) else None for name in names]
    for name, found in zip(names, lists):
        if not isinstance(found, list):
            held = f"it has {', '.join(list(content)[:6])}" if isinstance(content, dict) else "it is no object"
            raise DataError(f"'{path}': no list '{name}'; {held}")
    return [[item for item in found if isinstance(item, dict)] for found in lists]


def listed_images(images: list[dict[str, Any]], skipped: Skipped) -> dict[Any, dict[str, Any]]:
    """Images by id that have a name and a size; the others are counted."""
    found: dict[Any, dict[str, Any]] = {}
    for place, image in enumerate(images):
        where = f"images[{place}]"
        if not isinstance(image.get("id"), (int, str)) or not isinstance(image.get("file_name"), str):
            skipped.row("image without id or name", where)
        elif image_size(image) is None:
            skipped.row("image without a size", where)
        elif image["id"] in found:
            skipped.row("duplicate image id", where)
        else:
            found[image["id"]] = image
    return found


def captions_by_image(path: Path | None) -> dict[Any, list[str]]:
    """Captions of a COCO caption file by image id."""
    found: dict[Any, list[str]] = {}
    for item in coco_lists(path, "annotations")[0] if path else ():
        if isinstance(item.get("caption"), str) and item["caption"].strip():
            found.setdefault(item.get("image_id"), []).append(item["caption"].strip())
    return found


def convert(instances: Path, captions: Path | None, images: Path | None, skipped: Skipped) -> Iterator[Line]:
    """Region lines of COCO's objects.

    Args:
        instances: the file of objects.
        captions: a file of captions of the same images, or None.
        images: folder of the images, to leave out those that are not there; None looks at none.
        skipped: the account.
    """
    listed, annotations, categories = coco_lists(instances, "images", "annotations", "categories")
    names = {c.get("id"): c["name"] for c in categories if isinstance(c.get("name"), str)}
    if not names:
        raise DataError(f"'{instances}': no category with a name; are these captions rather than instances?")
    known, said, found = listed_images(listed, skipped), captions_by_image(captions), Found(images, skipped)
    elems: dict[Any, list[dict[str, Any]]] = {key: [] for key in known}
    for place, item in enumerate(annotations):
        where, image = f"annotations[{place}]", known.get(item.get("image_id"))
        if image is None:
            skipped.row("object of an image that is not listed", where)
        elif item.get("category_id") not in names:
            skipped.row("object of an unknown category", where)
        elif item.get("iscrowd"):
            skipped.row("box around a crowd", where)
        else:
            elem = {"caption": names[item["category_id"]], "bb": item.get("bbox")}
            if fits(elem, *image_size(image), skipped, where):
                elems[image["id"]].append(elem)
    for key, image in known.items():
        if not elems[key]:
            skipped.sample(image["file_name"], "image without a usable object")
            continue
        if (name := found(image["file_name"])) is None:
            continue
        entry = {"image_rpath": name, "width": image["width"], "height": image["height"]}
        if key in said:
            entry["caption"] = said[key]
        yield Line("", entry | {"elems": elems[key]})
