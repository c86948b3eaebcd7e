"""Small data sources on disk: the same pictures and captions as a table, as JSON and in shards."""

import io
import json
import tarfile

import numpy as np
from PIL import Image


def pixels(number: int, size=(26, 20)) -> bytes:
    """A PNG of a size in pixels that shows its number."""
    values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def captions(number: int) -> list[str]:
    return [f"caption {word} of {number}" for word in ("one", "two", "three")[: 1 + number % 3]]


def write_images(folder, numbers):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number}.png").write_bytes(pixels(number))


def write_table(folder, train: int, val: int):
    """A folder with captions.tsv and images/."""
    write_images(folder / "images", range(train + val))
    rows = ["image\tcaption\tsplit"]
    rows += [f"{n}.png\t{c}\t{'train' if n < train else 'val'}" for n in range(train + val) for c in captions(n)]
    (folder / "captions.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def coco(numbers) -> dict:
    return {
        "info": {"description": "made for a test"},
        "images": [{"id": 1000 + n, "file_name": f"{n}.png"} for n in numbers],
        # COCO's annotations are in no order of images.
        "annotations": [
            {"id": 10 * n + i, "image_id": 1000 + n, "caption": c}
            for n in reversed(numbers)
            for i, c in enumerate(captions(n))
        ],
    }


def write_coco(folder, train: int, val: int):
    """A folder laid out as COCO's."""
    (folder / "annotations").mkdir(parents=True)
    for split, numbers in (("train", range(train)), ("val", range(train, train + val))):
        write_images(folder / f"{split}2017", numbers)
        (folder / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(coco(numbers)))
    return folder


def karpathy(train: int, val: int) -> dict:
    split = ["restval" if n % 2 else "train" for n in range(train)] + ["val"] * val
    return {
        "images": [
            {"filename": f"{n}.png", "split": split[n], "sentences": [{"raw": c, "tokens": []} for c in captions(n)]}
            for n in range(train + val)
        ],
        "dataset": "made for a test",
    }


def write_tar(path, members):
    """A tar of (name, bytes), in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample_members(number: int):
    """A sample as img2dataset and webdataset write it."""
    return [
        (f"{number:05d}.png", pixels(number)),
        (f"{number:05d}.txt", "\n".join(captions(number)).encode()),
    ]
