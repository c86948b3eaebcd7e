"""Captions in JSON: COCO's files of images and annotations, and Karpathy's of images with sentences.

COCO      {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}; a file has no splits, a folder
          has `annotations/captions_train2017.json`, `captions_val2017.json` beside `train2017/`, `val2017/`
Karpathy  {"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]}; `restval` is training

An image's key is its name below the folder of the images.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.data.image_list import VAL_SHARE, ImageList, Listed
from train.data.paths import nearest_path, told
from train.data.sample import DataError

_FILE = re.compile(r"captions_(train|val|test)(\d*)\.json")
_KARPATHY_SPLITS = {"restval": "train"}
_LOOKED_AT = 1 << 16


def annotation_files(folder: Path) -> dict[str, dict[str, Path]]:
    """Year -> split -> caption file of a folder laid out as COCO's, or of its folder `annotations`."""
    found: dict[str, dict[str, Path]] = {}
    for place in (folder / "annotations", folder):
        for path in sorted(place.glob("captions_*.json")) if place.is_dir() else ():
            if match := _FILE.fullmatch(path.name):
                found.setdefault(match[2], {}).setdefault(match[1], path)
    return found


def annotation_file(folder: Path, split: str, year: str | None = None) -> Path:
    """The caption file of a split, of the newest year that has one for training unless a year is given."""
    files = annotation_files(folder)
    years = sorted(files, key=lambda y: ("train" in files[y], y))
    if year is not None and year not in files:
        raise DataError(f"data source '{folder}': no captions of year {year}; there are {', '.join(years)}")
    chosen = files[year if year is not None else years[-1]]
    if split not in chosen:
        raise DataError(
            f"data source '{folder}': no captions of split {split!r}; there are {', '.join(sorted(chosen))}"
        )
    return chosen[split]


def looks_like_karpathy(path: Path) -> bool:
    """Whether the beginning of a JSON file speaks of sentences rather than of annotations."""
    with told(path), open(path, "rb") as file:
        head = file.read(_LOOKED_AT)
    if not head.strip():
        raise DataError(f"data source '{path}': empty file")
    return b'"sentences"' in head or b'"sentids"' in head


def _read(path: Path, *needed: str) -> dict[str, list]:
    with told(path), open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            data = json.load(file)
        except (ValueError, RecursionError) as error:
            raise DataError(f"data source '{path}': not a JSON file: {error}") from None
    for name in needed:
        if not isinstance(data, dict) or not isinstance(data.get(name), list):
            held = f"its keys are {', '.join(list(data)[:8])}" if isinstance(data, dict) else "it is no object"
            raise DataError(f"data source '{path}': no list {name!r}; {held}")
    return data


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


class CocoCaptions(ImageList):
    """COCO captions JSON.

    Args:
        path: the file of annotations.
        split: train, val or test.
        images: folder of the images; None for the usual places about the file.
        val_share: share of the images that validation gets, unless `whole`.
        whole: all images belong to the split asked for.

    Raises:
        DataError: not such a file, or nothing usable in it.
    """

    def __init__(
        self, path: Path, split: str, *, images: str | None = None, val_share: float = VAL_SHARE, whole: bool = False
    ) -> None:
        folders = [Path(images)] if images else self._usual_folders(Path(path))
        super().__init__(path, split, folders, val_share=val_share, whole=whole)

    @staticmethod
    def _usual_folders(path: Path) -> list[Path]:
        above = path.parent.parent if path.parent.name == "annotations" else path.parent
        match = _FILE.fullmatch(path.name)
        names = [match[1] + match[2]] if match else []
        bases = (above, above / "images")
        return [base / name for name in names for base in bases] + [*bases, path.parent]

    def listed(self) -> Iterator[Listed]:
        data = _read(self.path, "images", "annotations")
        names: dict[Any, str] = {}
        seen: set[str] = set()
        for place, image in enumerate(data["images"]):
            where = f"images[{place}]"
            if not isinstance(image, dict) or not isinstance(image.get("id"), (int, str)):
                self.skipped.row("image without an id", where)
            elif not _text(image.get("file_name")).strip():
                self.skipped.row("empty image name", where)
            elif image["id"] in names or image["file_name"] in seen:
                self.skipped.row("duplicate key", f"{where} {image['file_name']}")
            else:
                names[image["id"]] = image["file_name"]
                seen.add(image["file_name"])
        # In the order of `images`, whatever the order of the annotations.
        captions: dict[Any, list[tuple[str, str]]] = {key: [] for key in names}
        for place, annotation in enumerate(data["annotations"]):
            where = f"annotations[{place}]"
            key = annotation.get("image_id") if isinstance(annotation, dict) else None
            if not isinstance(key, (int, str)) or key not in captions:
                self.skipped.row("caption of an image that is not listed", where)
            else:
                captions[key].append((where, _text(annotation.get("caption"))))
        for key, name in names.items():
            if not captions[key]:
                yield Listed(name, name, None, None)
            for where, caption in captions[key]:
                yield Listed(where, name, None, caption)


class KarpathyCaptions(ImageList):
    """Karpathy's JSON of COCO, Flickr30k or Flickr8k.

    Args:
        path: the file.
        split: train, val or test.
        images: folder of the images; None for the file's own or `images/` in it, or those above it.
        val_share: not used; the file names its splits.
        whole: not used.

    Raises:
        DataError: not such a file, or nothing usable in it.
    """

    def __init__(
        self, path: Path, split: str, *, images: str | None = None, val_share: float = VAL_SHARE, whole: bool = False
    ) -> None:
        near = Path(path).parent
        folders = [near, near / "images", near.parent, near.parent / "images"]
        super().__init__(path, split, [Path(images)] if images else folders, val_share=val_share, whole=whole)

    def listed(self) -> Iterator[Listed]:
        seen: set[str] = set()
        for place, image in enumerate(_read(self.path, "images")["images"]):
            where = f"images[{place}]"
            if not isinstance(image, dict) or not _text(image.get("filename")).strip():
                self.skipped.row("empty image name", where)
                continue
            folder = _text(image.get("filepath"))
            name = f"{folder}/{image['filename']}" if folder else image["filename"]
            if name in seen:
                self.skipped.row("duplicate key", f"{where} {name}")
                continue
            seen.add(name)
            said = _text(image.get("split"))
            split = _KARPATHY_SPLITS.get(said, said)
            sentences = image.get("sentences")
            if not isinstance(sentences, list) or not sentences:
                yield Listed(where, name, split, None)
                continue
            for number, sentence in enumerate(sentences):
                raw = _text(sentence.get("raw")) if isinstance(sentence, dict) else ""
                yield Listed(f"{where} {number}", name, split, raw)


def check_images(path: Path, images: str | None) -> None:
    """Refuses a folder of images that is not there."""
    with told(images or path):
        if images is not None and not Path(images).is_dir():
            raise DataError(f"data source: no folder '{images}'{nearest_path(Path(images))}")
