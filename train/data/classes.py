"""A folder of images by class, each image with one caption made from the name of its class.

FOLDER/[train|val|test/]CLASS/.../IMAGE
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from train.data.image_list import VAL_SHARE, ImageList, Listed
from train.data.paths import IMAGE_ENDINGS, SPLITS

TEMPLATE = "a photo of a {}"


def _folders(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


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
        names = _folders(self.path)
        splits = [name for name in names if name.lower() in SPLITS]
        if splits and len(splits) == len(names):
            for split in splits:
                for name in _folders(self.path / split):
                    yield from self._of_class(f"{split}/{name}", name, split)
            return
        for name in names:
            yield from self._of_class(name, name, None)

    def _of_class(self, folder: str, name: str, split: str | None) -> Iterator[Listed]:
        caption = self._template.replace("{}", name.replace("_", " "))
        for place, inner, files in os.walk(self.path / folder):
            inner.sort()
            for file in sorted(files):
                image = os.path.relpath(os.path.join(place, file), self.path)
                if file.lower().endswith(IMAGE_ENDINGS):
                    yield Listed(image, image, split, caption)
                elif not file.startswith("."):
                    self.skipped.row("file is no image", image)
