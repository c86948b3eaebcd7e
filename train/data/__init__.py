"""Data sources, and the batches that training draws from them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from train.data.classes import ClassFolders
from train.data.coco import CocoCaptions, KarpathyCaptions, annotation_file
from train.data.sample import BadSample, DataError, Question, Region, Sample, Skipped, Source, readable
from train.data.spec import SourceSpec, check_source, lines_of, parse_spec
from train.data.tables import Table

if TYPE_CHECKING:
    from train.data.ahead import Loader
    from train.data.loader import LoadedBatch, batches

# These import torch; a wrong specification must be told before that.
_LAZY = {
    "Loader": "train.data.ahead",
    **dict.fromkeys(("LoadedBatch", "batches"), "train.data.loader"),
}

__all__ = [
    "BadSample",
    "DataError",
    "LoadedBatch",
    "Loader",
    "Question",
    "Region",
    "Sample",
    "Skipped",
    "Source",
    "batches",
    "check_source",
    "open_dataset",
    "parse_spec",
    "readable",
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def open_dataset(
    spec: str, split: str = "train", *, seed: int = 0, image_size: int | None = None, whole: bool = False
) -> Source:
    """Opens a data source, without importing torch.

    Args:
        spec: what to open, in the grammar of `train.data.spec`.
        split: train, val or test.
        seed: of generated data, where the specification gives none.
        image_size: side of generated pictures in pixels.
        whole: a source without splits is used whole for the split asked for, nothing held out.

    Returns:
        A map-style data set of `Sample`.

    Raises:
        DataError: one line that names the path and the nearest right one.
    """
    if split not in ("train", "val", "test"):
        raise DataError(f"data source {spec!r}: no split {split!r}; there are train, val and test")
    return _opened(check_source(spec), split, seed, image_size, whole)


def _opened(parsed: SourceSpec, split: str, seed: int, image_size: int | None, whole: bool) -> Source:
    options = dict(parsed.options)
    if parsed.kind == "mixture":
        from train.data.mixture import Mixture

        parts = [_opened(part, split, seed, image_size, whole) for part in parsed.parts]
        return Mixture(parts, list(parsed.weights), parsed.text)
    if parsed.kind == "scenes":
        from train.data.scenes import Scenes

        if split != "train":
            # The option sizes an epoch of training; held-out splits keep their size.
            options.pop("count", None)
        return Scenes(split, image_size=image_size or 64, seed=options.pop("seed", seed), **options)
    if parsed.kind == "shards":
        from train.data.shards import Shards, find_shards

        shards = find_shards(parsed.shards, parsed.path, options.pop("index", None))
        return Shards(parsed.text, shards, split, whole=whole, **options)
    if parsed.kind == "lines":
        from train.data.region_lines import Lines

        paths = [Path(name) for name in parsed.shards] or lines_of(parsed.path)
        return Lines(parsed.text, paths, split, whole=whole, **options)
    if parsed.kind == "coco":
        year = options.pop("year", None)
        if parsed.path.is_dir():
            # A file for each split: each is used whole.
            return CocoCaptions(annotation_file(parsed.path, split, year), split, whole=True, **options)
        return CocoCaptions(parsed.path, split, whole=whole, **options)
    kinds = {"table": Table, "karpathy": KarpathyCaptions, "classes": ClassFolders}
    return kinds[parsed.kind](parsed.path, split, whole=whole, **options)
