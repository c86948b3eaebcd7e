"""RefCOCO, RefCOCO+ and RefCOCOg as region lines by split, an element for each object that is referred to.

refs(unc).p       [{"ref_id", "ann_id", "image_id", "split", "sentences": [{"sent"}]}], pickled, or the same as JSON
instances.json    COCO's, with "images" and "annotations"
lists of texts    [{"image", "text", "ref_id"}], what X-VLM is fine-tuned and judged on; they replace the sentences
dets.json         {IMAGE_ID: [[x, y, w, h, ...]]} or [{"image_id", "box": [x, y, w, h]}], a detector's boxes
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.data.convert_coco import coco_lists, listed_images
from train.data.convert_common import Found, Line, fits, image_size, key_of, read_json, require_file
from train.data.paths import told
from train.data.region_elems import read_box
from train.data.sample import DataError, Skipped

# A split becomes the name of a file.
_SPLIT = re.compile(r"\w[\w-]{0,39}", re.ASCII)
_SPLIT_OF_LIST = re.compile(r"(train|val|test[AB]?)(?:ing)?$")


class Reference(NamedTuple):
    """An object of an image that people refer to."""

    split: str
    image: int | str
    box: Any
    texts: list[str]


class Lists(NamedTuple):
    """What lists of texts say: the texts of each reference, and what they call its image."""

    texts: dict[int | str, list[str]]
    names: dict[int | str, str]


class _PlainUnpickler(pickle.Unpickler):
    """Reads pickled lists, objects, texts and numbers; a pickle that asks for code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _listed(path: Path) -> list[Any]:
    content = read_json(path) if path.suffix == ".json" else _unpickled(path)
    if not isinstance(content, list) or not content:
        raise DataError(f"'{path}': no list of references")
    return content


def _unpickled(path: Path) -> Any:
    with told(path), open(require_file(path), "rb") as file:
        try:
            return _PlainUnpickler(file, encoding="utf-8", errors="replace").load()
        except OSError:
            raise
        except Exception as error:
            # Damaged pickles make the reader raise what they like.
            raise DataError(f"'{path}': not a pickle of plain references: {error}") from None


def _sentences(reference: dict[str, Any]) -> list[str]:
    items = reference.get("sentences")
    texts = [s.get("sent", s.get("raw")) for s in items if isinstance(s, dict)] if isinstance(items, list) else []
    return _distinct(texts)


def _distinct(texts: list[Any]) -> list[str]:
    return list(dict.fromkeys(t.strip() for t in texts if isinstance(t, str) and t.strip()))


def _references(
    path: Path, known: dict[Any, dict[str, Any]], boxes: dict[Any, Any], skipped: Skipped
) -> dict[int | str, Reference]:
    """The usable references by their id, or by their place where they have none."""
    found: dict[int | str, Reference] = {}
    for place, item in enumerate(_listed(path)):
        where = f"{path.name}[{place}]"
        split = item.get("split") if isinstance(item, dict) else None
        if not isinstance(split, str) or not _SPLIT.fullmatch(split):
            skipped.row("reference without a split", where)
            continue
        key, image = key_of(item.get("ref_id")), key_of(item.get("image_id"))
        box = boxes.get(key_of(item.get("ann_id")))
        if image not in known or box is None:
            skipped.row("reference to an image or object that is not listed", where)
        elif key in found:
            skipped.row("duplicate reference id", where)
        else:
            found[where if key is None else key] = Reference(split, image, box, _sentences(item))
    return found


def read_lists(
    paths: Sequence[Path], references: dict[int | str, Reference], known: dict[Any, dict[str, Any]], skipped: Skipped
) -> Lists:
    """The texts of lists; those whose image or split is not that of their reference are counted and left out.

    Args:
        paths: the lists; a name that ends in train, val or test says of which split its texts are.
        references: by their id.
        known: images by their id.
        skipped: the account.

    Raises:
        DataError: no such list, or no text in all of them that can be used.
    """
    lists = Lists({}, {})
    for path in paths:
        said = _SPLIT_OF_LIST.search(path.stem)
        content = read_json(path)
        if not isinstance(content, list):
            raise DataError(f"'{path}': no list of texts")
        for place, item in enumerate(content):
            where = f"{path.name}[{place}]"
            text = item.get("text") if isinstance(item, dict) else None
            if not isinstance(text, str) or not text.strip():
                skipped.row("entry of a list without a text", where)
                continue
            key, image = key_of(item.get("ref_id")), item.get("image")
            reference = references.get(key)
            if reference is None:
                skipped.row("text of a reference that is not listed", where)
            elif not isinstance(image, str) or Path(image).name != Path(known[reference.image]["file_name"]).name:
                skipped.row("text of another image than its reference's", where)
            elif said and not reference.split.startswith(said[1]):
                # What is judged on must not be trained on.
                skipped.row("text of another split than its list's", where)
            else:
                lists.texts.setdefault(key, []).append(text)
                lists.names[reference.image] = image
    if not lists.texts:
        raise DataError(f"'{paths[0]}': no text that can be used; {skipped.line() or 'it holds none'}")
    return lists


def read_detections(path: Path, known: dict[Any, dict[str, Any]], skipped: Skipped) -> dict[Any, list[list[float]]]:
    """A detector's usable boxes [x, y, width, height] in pixels, by image; those of other images are passed over."""
    content, boxes = read_json(path), []
    if isinstance(content, dict):
        for name, listed in content.items():
            boxes += [(name, box) for box in listed] if isinstance(listed, list) else [(name, None)]
    elif isinstance(content, list):
        boxes = [(item.get("image_id"), item) if isinstance(item, dict) else (None, None) for item in content]
    else:
        raise DataError(f"'{path}': neither boxes by image nor a list of them")
    # JSON names the fields of an object by text alone.
    by_name, found = {str(key): key for key in known}, {}
    for place, (name, box) in enumerate(boxes):
        image = by_name.get(str(key_of(name)))
        box = box.get("box", box.get("bbox")) if isinstance(box, dict) else box
        box = box[:4] if isinstance(box, list) else box
        if image is None:
            continue
        try:
            read_box(box, *image_size(known[image]))
        except ValueError as error:
            skipped.row(f"detection: {error}", f"{path.name}[{place}]")
            continue
        found.setdefault(image, []).append(box)
    if not found:
        raise DataError(f"'{path}': no usable box of these images; {skipped.line() or 'it holds none'}")
    return found


def convert(
    references: Path,
    instances: Path,
    images: Path | None,
    skipped: Skipped,
    *,
    texts: Sequence[Path] = (),
    detections: Path | None = None,
    as_captions: bool = False,
) -> Iterator[Line]:
    """Region lines of referring expressions; an element's texts are all that people said of its object.

    Args:
        references: the file of expressions.
        instances: COCO's file of objects.
        images: folder of COCO's train2014, to leave out images that are not there; None looks at none.
        skipped: the account.
        texts: lists of the texts to take, instead of all sentences.
        detections: a detector's boxes, to choose among without having learned boxes.
        as_captions: the texts are captions of their image as well, to learn matching without boxes from.
    """
    listed, annotations = coco_lists(instances, "images", "annotations")
    known, found = listed_images(listed, skipped), Found(images, skipped)
    boxes = {key_of(item.get("id")): item.get("bbox") for item in annotations}
    boxes.pop(None, None)
    referred = _references(references, known, boxes, skipped)
    lists = read_lists(texts, referred, known, skipped) if texts else None
    detected = read_detections(detections, known, skipped) if detections else {}
    grouped: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for key, reference in referred.items():
        if lists is not None and key not in lists.texts:
            skipped.row("reference that no list speaks of", str(key))
            continue
        said = reference.texts if lists is None else _distinct(lists.texts[key])
        elem = {"caption": said, "bb": reference.box, "ref_id": key}
        if fits(elem, *image_size(known[reference.image]), skipped, f"reference {key}"):
            grouped.setdefault((reference.split, reference.image), []).append(elem)
    for (split, key), elems in grouped.items():
        image = known[key]
        names = [image["file_name"]] if lists is None else [image["file_name"], lists.names[key]]
        if (name := found(image_size(image), *names)) is None:
            continue
        entry = {"image_rpath": name, "width": image["width"], "height": image["height"]}
        if as_captions:
            entry["caption"] = _distinct([text for elem in elems for text in elem["caption"]])
        entry["elems"] = elems
        if detections:
            if key not in detected:
                skipped.row("image without a detection (kept)", name)
            entry["detections"] = detected.get(key, [])
        yield Line(split, entry)
