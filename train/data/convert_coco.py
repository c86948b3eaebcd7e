"""COCO instances as region lines: a class name is what its box is called.

{"images": [{"id", "file_name", "width", "height"}],
 "annotations": [{"image_id", "category_id", "bbox": [x, y, w, h], "iscrowd"}], "categories": [{"id", "name"}]}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.data.convert_common import Found, Line, file_named, fits, image_size, key_of, read_json
from train.data.sample import DataError, Skipped, caption_fault


def coco_lists(path: Path, *names: str) -> list[list[dict[str, Any]]]:
    """The lists of a COCO file, what is no object in them as an empty one; raises DataError where a list is missing."""
    content = read_json(path)
    lists = [content.get(name) if isinstance(content, dict) else None for name in names]
    for name, found in zip(names, lists):
        if not isinstance(found, list):
            held = f"it has {', '.join(list(content)[:6])}" if isinstance(content, dict) else "it is no object"
            raise DataError(f"'{path}': no list '{name}'; {held}")
    return [[item if isinstance(item, dict) else {} for item in found] for found in lists]


def listed_images(images: list[dict[str, Any]], skipped: Skipped) -> dict[Any, dict[str, Any]]:
    """Images by id that have a name and a size; the others are counted."""
    found: dict[Any, dict[str, Any]] = {}
    for place, image in enumerate(images):
        where, key = f"images[{place}]", key_of(image.get("id"))
        if key is None or not file_named(image.get("file_name")):
            skipped.row("image without id or name", where)
        elif image_size(image) is None:
            skipped.row("image without a size", where)
        elif key in found:
            skipped.row("duplicate image id", where)
        else:
            found[key] = image
    return found


def captions_by_image(path: Path | None, skipped: Skipped) -> dict[Any, list[str]]:
    """Captions of a COCO caption file by image id; those that cannot be used are counted."""
    found: dict[Any, list[str]] = {}
    for place, item in enumerate(coco_lists(path, "annotations")[0] if path else ()):
        text, key = item.get("caption"), key_of(item.get("image_id"))
        fault = caption_fault(text) if isinstance(text, str) else "empty caption"
        if fault or key is None:
            skipped.row(fault or "caption without an image", f"{path.name}:annotations[{place}]")
        else:
            found.setdefault(key, []).append(text.strip())
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
    names = {key_of(c.get("id")): c["name"] for c in categories if isinstance(c.get("name"), str)}
    names.pop(None, None)
    if not names:
        raise DataError(f"'{instances}': no category with a name; are these captions rather than instances?")
    known, said, found = listed_images(listed, skipped), captions_by_image(captions, skipped), Found(images, skipped)
    elems: dict[Any, list[dict[str, Any]]] = {key: [] for key in known}
    for place, item in enumerate(annotations):
        where, key, category = f"annotations[{place}]", key_of(item.get("image_id")), key_of(item.get("category_id"))
        if key not in known:
            skipped.row("object of an image that is not listed", where)
        elif category not in names:
            skipped.row("object of an unknown category", where)
        elif item.get("iscrowd"):
            skipped.row("box around a crowd", where)
        else:
            elem = {"caption": names[category], "bb": item.get("bbox")}
            if fits(elem, *image_size(known[key]), skipped, where):
                elems[key].append(elem)
    for key, image in known.items():
        if not elems[key]:
            skipped.sample(image["file_name"], "image without a usable object")
            continue
        if (name := found(image_size(image), image["file_name"])) is None:
            continue
        entry = {"image_rpath": name, "width": image["width"], "height": image["height"]}
        if key in said:
            entry["caption"] = said[key]
        yield Line("", entry | {"elems": elems[key]})
