"""RefCOCO, RefCOCO+ and RefCOCOg as region lines by split, an element for each object that is referred to.

refs(unc).p       [{"ref_id", "ann_id", "image_id", "split", "sentences": [{"sent"}]}], pickled, or the same as JSON
instances.json    COCO's, with "images" and "annotations"
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.data.convert_coco import coco_lists, listed_images
from train.data.convert_common import Found, Line, fits, image_size, read_json, require_file
from train.data.paths import told
from train.data.sample import DataError, Skipped


class _PlainUnpickler(pickle.Unpickler):
    """Reads pickled lists, objects, texts and numbers; a pickle that asks for code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _references(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".json":
        content = read_json(path)
    else:
        with told(path), open(require_file(path), "rb") as file:
            try:
                content = _PlainUnpickler(file, encoding="utf-8", errors="replace").load()
            except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError) as error:
                raise DataError(f"'{path}': not a pickle of plain references: {error}") from None
    if not isinstance(content, list) or not content:
        raise DataError(f"'{path}': no list of references")
    return content


def _sentences(reference: dict[str, Any]) -> list[str]:
    items = reference.get("sentences")
    texts = [s.get("sent", s.get("raw")) for s in items if isinstance(s, dict)] if isinstance(items, list) else []
    return list(dict.fromkeys(t.strip() for t in texts if isinstance(t, str) and t.strip()))


def convert(references: Path, instances: Path, images: Path | None, skipped: Skipped) -> Iterator[Line]:
    """Region lines of referring expressions; an element's texts are all that people said of its object.

    Args:
        references: the file of expressions.
        instances: COCO's file of objects.
        images: folder of COCO's train2014, to leave out images that are not there; None looks at none.
        skipped: the account.
    """
    listed, annotations = coco_lists(instances, "images", "annotations")
    known, found = listed_images(listed, skipped), Found(images, skipped)
    boxes = {item.get("id"): item.get("bbox") for item in annotations}
    grouped: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for place, reference in enumerate(_references(references)):
        where = f"{references.name}[{place}]"
        if not isinstance(reference, dict) or not isinstance(reference.get("split"), str):
            skipped.row("reference without a split", where)
            continue
        image, box = known.get(reference.get("image_id")), boxes.get(reference.get("ann_id"))
        if image is None or box is None:
            skipped.row("reference to an image or object that is not listed", where)
            continue
        elem = {"caption": _sentences(reference), "bb": box, "ref_id": reference.get("ref_id")}
        if fits(elem, *image_size(image), skipped, where):
            grouped.setdefault((reference["split"], image["id"]), []).append(elem)
    for (split, key), elems in grouped.items():
        if (name := found(known[key]["file_name"])) is not None:
            size = {"width": known[key]["width"], "height": known[key]["height"]}
            yield Line(split, {"image_rpath": name, **size, "elems": elems})
