"""Ranks images, or the lines of text files, by their likeness to texts or images, and prints the best: rank, cosine
similarity, path or text. What is searched may be a .npy that `embed` has written."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sycoca.commands import inputs
from sycoca.commands.common import Stopwatch, add_model_options, finish, load, progress, readable_path, say, whole
from sycoca.commands.inputs import UserError

SUMMARY = "rank images or texts by likeness"
EXAMPLES = """examples:
  python -m sycoca retrieve photos/ --text "a dog on a beach" --text "two red squares" --sheet found.html
  python -m sycoca retrieve captions.txt --image photo.jpg --top 5
  python -m sycoca retrieve photos.npy --text "a dog on a beach" --json"""

_THUMB = 320


class Gallery(NamedTuple):
    """What is searched: names of N things, their features (N, E) fp32 unit rows, and whether they are texts."""

    names: list[str]
    features: Any
    textual: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "gallery",
        nargs="+",
        metavar="GALLERY",
        help="what is searched: images (files, folders, globs), .txt files with one text per line, or a .npy of embed",
    )
    parser.add_argument(
        "--text", action="append", default=[], metavar="TEXT", help="a query; may be given several times"
    )
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a query; likewise")
    parser.add_argument("--top", type=whole(1), default=10, metavar="K", help="how many of each query (%(default)s)")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="contact sheet to write: found.html or found.png")
    parser.add_argument("--json", action="store_true", help="one JSON object a line and finding")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    if not args.text and not args.image:
        raise UserError("--text or --image: give at least one query")
    if any(not query.strip() for query in args.text):
        raise UserError("--text: empty")
    if args.sheet and inputs.suffix_of(args.sheet, (".html", ".png"), "--sheet") == ".png":
        inputs.require_matplotlib("--sheet", args.sheet)
    stored = [path for path in args.gallery if path.endswith(".npy")]
    if stored and len(args.gallery) > 1:
        raise UserError(f"GALLERY: {stored[0]} must stand alone")
    paths = stored or inputs.expand(args.gallery, "GALLERY")
    textual = not stored and inputs.are_texts(paths, "GALLERY")
    queries = inputs.expand(args.image, "--image") if args.image else []
    loaded = load(args)

    import torch

    skipped = inputs.Skipped(say)
    with torch.inference_mode():
        asked = [(text, None) for text in args.text] + list(_pictures(queries, loaded, inputs.Skipped(say)))
        if not asked:
            raise UserError("--image: none of the queries could be read")
        if stored:
            gallery = _stored(Path(stored[0]), loaded.config.embed_dim)
        else:
            gallery = _embedded(paths, textual, loaded, skipped, args.batch_size)
        if gallery.names:
            features = torch.cat([_encode(loaded, *query) for query in asked])
            best = _best(features, gallery.features, args.top)
            _tell(asked, gallery, best, args)
    return finish(skipped, len(gallery.names), "text" if textual else "image")


def _pictures(paths: list[str], loaded: Any, skipped: inputs.Skipped) -> Iterator[tuple[str, Any]]:
    return inputs.decoded(paths, inputs.square(loaded.config.vision.image_size), skipped)


def _encode(loaded: Any, name: str, picture: Any) -> Any:
    """Feature (1, E) of a text, or of a picture where there is one."""
    return inputs.encode(loaded, [name] if picture is None else [picture], textual=picture is None).float().cpu()


def _embedded(paths: list[str], textual: bool, loaded: Any, skipped: inputs.Skipped, batch_size: int) -> Gallery:
    import torch

    unit, watch = "text" if textual else "image", Stopwatch()
    source = inputs.texts(paths, skipped) if textual else _pictures(paths, loaded, skipped)
    names, features = [], []
    for batch in inputs.batches(progress(source, None if textual else len(paths), unit), batch_size):
        names += [item if textual else key for key, item in batch]
        features.append(inputs.encode(loaded, [item for _, item in batch], textual=textual).float().cpu())
    say(f"searched {watch.rate(len(names), unit)}")
    return Gallery(names, torch.cat(features) if features else None, textual)


def _stored(path: Path, width: int) -> Gallery:
    import torch

    from sycoca.commands.rows import read_rows

    features, records = read_rows(path)
    if features.shape[1] != width:
        raise UserError(f"GALLERY: {path} holds features of width {features.shape[1]}, the model makes {width}")
    textual = bool(records) and "text" in records[0]
    names = [record["text" if textual else "key"] for record in records]
    return Gallery(names, torch.from_numpy(features.astype("float32")), textual)


def _best(queries: Any, gallery: Any, top: int) -> list[list[tuple[int, float]]]:
    """Row and similarity of the best of the gallery for each query; among equals the first."""
    order = (queries @ gallery.T).sort(dim=1, descending=True, stable=True)
    indices, values = order.indices[:, :top].tolist(), order.values[:, :top].tolist()
    return [list(zip(i, v)) for i, v in zip(indices, values)]


def _tell(asked: list, gallery: Gallery, best: list[list[tuple[int, float]]], args: argparse.Namespace) -> None:
    kind = "text" if gallery.textual else "path"
    for (query, _), found in zip(asked, best):
        if not args.json:
            print(f"{readable_path(query)}")
        for rank, (row, score) in enumerate(found, 1):
            name = gallery.names[row]
            if args.json:
                print(json.dumps({"query": query, "rank": rank, "score": round(score, 6), kind: name}))
            else:
                print(f"{rank:4d}  {score:6.3f}  {readable_path(name)}")
    sys.stdout.flush()
    if args.sheet:
        _sheet(asked, gallery, best, args.sheet)


def _sheet(asked: list, gallery: Gallery, best: list[list[tuple[int, float]]], path: Path) -> None:
    from sycoca.visualize_figure import save_figure
    from sycoca.visualize_sheet import Item, sheet_figure, sheet_page

    # What was decoded for the model is often too small to be looked at.
    paths = {gallery.names[row] for found in best for row, _ in found} if not gallery.textual else set()
    paths |= {query for query, picture in asked if picture is not None}
    pictures = dict(inputs.decoded(sorted(paths), inputs.square(_THUMB), inputs.Skipped(say)))
    rankings = []
    for (query, picture), found in zip(asked, best):
        items = [Item(name := gallery.names[row], pictures.get(name), score) for row, score in found]
        if not gallery.textual:
            # Images of a stored gallery may have moved away since.
            items = [item for item in items if item.picture is not None]
        rankings.append((Item(query, pictures.get(query) if picture is not None else None), items))
    searched = f"{len(gallery.names)} {'texts' if gallery.textual else 'images'}"
    if path.suffix.lower() == ".html":
        path.write_text(sheet_page(rankings, searched=searched), encoding="utf-8")
    else:
        save_figure(sheet_figure(rankings, searched=searched), path)
    say(f"contact sheet: {path}")
