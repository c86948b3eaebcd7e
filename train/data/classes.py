"""A folder of images by class, each image with one caption made from the name of its class.

FOLDER/[train|val|test/]CLASS/.../IMAGE
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from train.data.image_list import VAL_SHARE, ImageList, Listed
from train.data.paths import IMAGE_ENDINGS, SPLITS
from train.data.sample import Skipped

TEMPLATE = "a photo of a {}"


def _folders(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


class InClass(NamedTuple):
    """An image by its path below the folder, the name of its class, its split or None."""

    image: str
    name: str
    split: str | None


def split_folders(path: Path) -> dict[str, str]:
    """The split that each folder is named after, where a folder holds nothing but such; else empty."""
    names = _folders(path)
    splits = {name: SPLITS[name.lower()] for name in names if name.lower() in SPLITS}
    return splits if len(splits) == len(names) else {}


def by_class(path: Path, skipped: Skipped, split: str | None = None) -> Iterator[InClass]:
    """The images below a folder, by class.

    Args:
        path: the folder.
        skipped: account of the files that are no images.
        split: the only one listed, where there are splits; None for all.
    """
    splits = split_folders(path)
    roots = [f"{folder}/" for folder, name in splits.items() if split in (None, name)] if splits else [""]
    for root in roots:
        for name in _folders(path / root):
            for place, inner, files in os.walk(path / root / name):
                inner.sort()
                for file in sorted(files):
                    image = os.path.relpath(os.path.join(place, file), path)
                    if file.lower().endswith(IMAGE_ENDINGS):
                        yield InClass(image, name, splits.get(root.rstrip("/")))
                    elif not file.startswith("."):
                        skipped.row("file is no image", image)


def has_classes(path: Path) -> bool:
    """Whether a folder holds folders of images, looking at the first that hold files."""
    for name in _folders(path)[:8]:
        for _, _, files in os.walk(path / name):
            if files:
                return any(file.lower().endswith(IMAGE_ENDINGS) for file in files)
    return False


class ClassFolders(ImageList):
    """Images by class.

    Args:
        path: the folder.
        split: train, val or test.
        template: the caption, with {} where the name of the class goes.
        val_share: share of the images that validation gets where there are no folders of splits.
        whole: without folders of splits, all images belong to the split asked for.

    Raises:
        DataError: no image in this split.
    """

    def __init__(
        self,
        path: Path,
        split: str,
        *,
        template: str = TEMPLATE,
        val_share: float = VAL_SHARE,
        whole: bool = False,
    ) -> None:
        self._template = template
        super().__init__(path, split, [Path(path)], val_share=val_share, whole=whole)

    def listed(self) -> Iterator[Listed]:
        for image, name, split in by_class(self.path, self.skipped):
            yield Listed(image, image, split, self._template.replace("{}", name.replace("_", " ")))
