"""Writes unit-length features of images, or of the lines of text files, as .npy or .parquet.

Beside a .npy lies NAME.keys.jsonl, which says what each row is of. Interrupted, the same command goes on where it
stopped. Cosine similarity is the product of two rows."""

import argparse
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sycoca.commands import inputs
from sycoca.commands.common import Stopwatch, add_model_options, finish, load, progress, say
from sycoca.commands.inputs import UserError

SUMMARY = "write features of images or texts"
EXAMPLES = """examples:
  python -m sycoca embed photos/ --out photos.npy
  python -m sycoca embed captions.txt --model runs/tiny --out captions.parquet --dtype float16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUTS",
        help="images (files, folders, globs, or - for a list of paths), or .txt files with one text per line",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="features.npy or features.parquet")
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="of the values (%(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a finished file")
    parser.add_argument("--restart", action="store_true", help="throw an interrupted file away")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    suffix = inputs.suffix_of(args.out, (".npy", ".parquet"), "--out")
    if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f'--out {args.out}: Parquet needs pyarrow: pip install "sycoca[parquet]", or write a .npy')
    if args.out.exists() and not args.overwrite:
        raise UserError(f"--out {args.out}: exists already; --overwrite replaces it")
    paths = inputs.expand(args.inputs, "INPUTS")
    textual = inputs.are_texts(paths, "INPUTS")
    loaded = load(args)
    from sycoca.commands.rows import Rows, beside

    if args.restart:
        for suffix in (".part", ".journal"):
            beside(args.out, suffix).unlink(missing_ok=True)
    identity = {"model": fingerprint(loaded.model), "list of inputs": _digest(paths, textual)}
    rows = Rows(args.out, identity, loaded.config.embed_dim, args.dtype)
    try:
        return _fill(rows, args, paths, loaded, textual)
    except KeyboardInterrupt:
        say(f"\ninterrupted after {len(rows.records)} rows; the same command goes on from there")
        raise
    finally:
        rows.close()


def _fill(rows: Any, args: argparse.Namespace, paths: list[str], loaded: Any, textual: bool) -> int:
    import torch

    unit = "text" if textual else "image"
    skipped, watch = _Remembered(rows.skipped), Stopwatch()
    done = len(rows.records) + skipped.total
    if done:
        say(f"going on after {len(rows.records)} {unit}s of {args.out}")
    total, fresh = None if textual else len(paths), 0
    source = _texts(paths, done, skipped) if textual else _images(paths, done, skipped, loaded)
    with torch.inference_mode():
        bar = progress(source, total, unit, done=done)
        for batch in inputs.batches(bar, args.batch_size):
            features = inputs.encode(loaded, [item for _, item in batch], textual=textual)
            records = [{"key": key} | ({"text": item} if textual else {}) for key, item in batch]
            rows.add(features.cpu().numpy(), records, skipped.fresh())
            fresh += len(batch)
    if rows.records:
        files = rows.finish()
        say(f"embedded {watch.rate(fresh, unit)}; {len(rows.records)} rows of {loaded.config.embed_dim} in {files[0]}")
        for file in files[1:]:
            say(f"what the rows are of: {file}")
    return finish(skipped, len(rows.records), unit)


def _images(paths: list[str], done: int, skipped: inputs.Skipped, loaded: Any) -> Iterator[tuple[str, Any]]:
    return inputs.decoded(paths[done:], inputs.square(loaded.config.vision.image_size), skipped)


def _texts(paths: list[str], done: int, skipped: inputs.Skipped) -> Iterator[tuple[str, str]]:
    # Lines before this one have been counted by the run that is taken up.
    return inputs.texts(paths, skipped, start=done)


class _Remembered(inputs.Skipped):
    """What was left out, by this run and by the one that it takes up."""

    def __init__(self, before: list[tuple[str, str]]) -> None:
        super().__init__(say)
        self._counts.update(cause for _, cause in before)
        self._fresh: list[tuple[str, str]] = []

    def add(self, source: str, cause: str) -> None:
        super().add(source, cause)
        self._fresh.append((source, cause))

    def fresh(self) -> list[tuple[str, str]]:
        """What was left out since this was last asked."""
        fresh, self._fresh = self._fresh, []
        return fresh


def fingerprint(model: Any) -> str:
    """A digest that tells models apart: names, shapes and sums of all weights."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(model.state_dict().items()):
        values = weight.detach().double()
        digest.update(f"{name} {tuple(weight.shape)} {values.sum().item()} {values.square().sum().item()}".encode())
    return digest.hexdigest()


def _digest(paths: list[str], textual: bool) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        stamp = f" {os.stat(path).st_size} {os.stat(path).st_mtime_ns}" if textual else ""
        digest.update(path.encode("utf-8", "surrogateescape") + stamp.encode() + b"\0")
    return digest.hexdigest()
