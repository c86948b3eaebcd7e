"""The source that a task reads, opened and checked without importing torch."""

from pathlib import Path
from typing import Any

from train.data import DataError, Source, open_dataset
from train.data.sample import Skipped
from train.tasks.annotations import Pictures, complete, listed, parse_annotations, read_json, require_some
from train.tasks.choices import open_choices, open_pairs
from train.tasks.labels import has_split, open_labels
from train.tasks.questions import open_questions
from train.tasks.statements import open_statements

_NOCAPS = {"nocaps": ("images",)}


class NoCaps(Source):
    """Captions of NoCaps, in the form of COCO's, each image with its domain.

    Args:
        path: the JSON file.
        images: folder of the images; None for that of the file.

    Raises:
        DataError: not such a file, or nothing usable in it.
    """

    def __init__(self, path, images: str | None, split: str) -> None:
        self.name, self.split, self.skipped = str(path), split, Skipped()
        content = read_json(path)
        captions: dict[Any, list[str]] = {}
        fields = {"image_id": (int, str), "caption": str}
        for number, entry in enumerate(
            complete(listed(content, "annotations", path), fields, None, path, self.skipped)
        ):
            if entry["caption"].strip():
                captions.setdefault(entry["image_id"], []).append(entry["caption"].strip())
            else:
                self.skipped.row("empty caption", f"{path.name}:annotations[{number}]")
        self._pictures, self._found = Pictures(images, path), []
        entries = listed(content, "images", path)
        for entry in complete(entries, {"id": (int, str), "file_name": str}, "id", path, self.skipped):
            name = self._pictures.find(entry["file_name"])
            if name is None:
                self.skipped.sample(entry["file_name"], "image listed but absent")
            elif entry["id"] not in captions:
                self.skipped.sample(entry["file_name"], "image without a usable caption")
            else:
                said = tuple(captions[entry["id"]])
                self._found.append((name, said, str(entry.get("domain", "unknown"))))
        known = {key for entry in entries if isinstance(entry, dict) and isinstance(key := entry.get("id"), int | str)}
        for image in captions.keys() - known:
            self.skipped.row("captions of an image that is not listed", str(image))
        require_some(len(self._found), "image", path, self.skipped)

    def __len__(self) -> int:
        return len(self._found)

    def domain(self, index: int) -> str:
        """in-domain, near-domain or out-domain, as the file has it."""
        return self._found[index][2]

    def __getitem__(self, index: int):
        from train.data.sample import Sample

        name, captions, _ = self._found[index]
        return Sample(self._pictures.read(name), captions, name)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._found[index][1]

    def texts(self, limit: int | None = None):
        for _, captions, _ in self._found[:limit]:
            yield from captions


def holds_out(task: str, spec: str) -> bool:
    """Whether a source knows a validation part of its own, so that training and judging on it are apart."""
    if spec.partition("?")[0] == "scenes":
        return True
    if task in ("retrieval", "captioning", "grounding"):
        return not spec.startswith("nocaps:")
    return task in ("classification", "probe") and has_split(Path(spec).expanduser(), "val")


def open_source(
    task: str, spec: str, split: str, *, image_size: int, classes: tuple[str, ...] | None = None, whole: bool = False
) -> Source:
    """Opens what a task reads.

    Args:
        task: its name.
        spec: of the source, in the task's own grammar.
        split: train, val or test; all is val, and the whole of a table without a column `split`.
        image_size: side of generated pictures in pixels.
        classes: of labelled images; None for the source's own.
        whole: a table without a column `split` is used whole.

    Raises:
        DataError: one line that names what is wrong.
    """
    if split not in ("train", "val", "test", "all"):
        raise DataError(f"no split {split!r}; there are train, val, test and all")
    if split == "all":
        split, whole = "val", True
    if task in ("retrieval", "captioning"):
        named = parse_annotations(spec, _NOCAPS)
        if named is not None:
            return NoCaps(named.path, named.options.get("images"), split)
        return open_dataset(spec, split, image_size=image_size, whole=whole)
    if task == "grounding":
        return open_dataset(spec, split, image_size=image_size, whole=whole)
    if task == "nlvr":
        return open_statements(spec, split, image_size=image_size)
    if task == "vqa":
        return open_questions(spec, split, image_size=image_size)
    if task == "choice":
        return open_choices(spec, split, image_size=image_size)
    if task == "pairs":
        return open_pairs(spec, split, image_size=image_size)
    return open_labels(spec, split, image_size=image_size, classes=classes)
