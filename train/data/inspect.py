"""What is in a data source: python -m train.data.inspect SPEC

Counts, lengths of captions, sizes of images, a contact sheet, and the images a second that one core of this machine
decodes and crops. With `--all` every image is opened, and good + left out = indexed is checked.
"""

import argparse
import sys
import textwrap
import time
from pathlib import Path

import numpy as np

from train.data import DataError, check_source
from train.data.prepare import open_splits
from train.data.progress import progress
from train.data.sample import BadSample, Sample, Skipped, Source

_LOOKED_AT = 500
_PICTURES = (".png", ".jpg", ".jpeg")
_CELL, _COLUMNS, _ROWS = 160, 6, 4


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.data.inspect",
        description="Shows what is in a data source.",
        epilog="example: python -m train.data.inspect /data/coco --sheet coco.png",
    )
    parser.add_argument("spec", help="data source")
    parser.add_argument("--splits", default=None, help="comma-separated; without it those that the source has")
    parser.add_argument("--sheet", type=Path, default=Path("contact_sheet.png"), help="picture to write (%(default)s)")
    parser.add_argument("--image-size", type=int, default=224, help="side that timing crops to (%(default)s)")
    parser.add_argument("--all", action="store_true", help=f"open every image, not {_LOOKED_AT} spread over the split")
    return parser.parse_args(argv)


def spread(values) -> str:
    """Smallest, median, 95th percentile and largest of some numbers."""
    if not len(values):
        return "none"
    low, middle, high, top = (int(v) for v in np.percentile(values, (0, 50, 95, 100), method="nearest"))
    return f"{low} / {middle} / {high} / {top}"


def look(source: Source, everything: bool) -> tuple[dict[str, list], list[Sample], Skipped]:
    """Opens samples spread over a source.

    Returns:
        Numbers by what they count, the first few samples of the spread, and the account of those left out.
    """
    count = len(source) if everything else min(_LOOKED_AT, len(source))
    indices = np.unique(np.linspace(0, len(source) - 1, count).astype(np.int64)).tolist()
    account = Skipped()
    numbers: dict[str, list] = {"captions": [], "words": [], "letters": [], "width": [], "height": [], "good": []}
    shown: list[Sample] = []
    every = max(1, len(indices) // (_COLUMNS * _ROWS))
    with progress("images", len(indices), 0) as bar:
        for place, index in enumerate(indices):
            bar(1)
            try:
                sample = source[index]
            except BadSample as bad:
                account.sample(f"{index} {bad.key}", bad.cause)
                continue
            size = getattr(sample.image, "size", 0)
            width, height = size if isinstance(size, tuple) else sample.image.shape[1::-1]
            numbers["width"].append(width)
            numbers["height"].append(height)
            numbers["captions"].append(len(sample.captions))
            numbers["words"] += [len(text.split()) for text in sample.captions]
            numbers["letters"] += [len(text) for text in sample.captions]
            numbers["good"].append(index)
            if place % every == 0 and len(shown) < _COLUMNS * _ROWS:
                shown.append(sample)
    return numbers, shown, account


def rate(source: Source, indices: list[int], image_size: int) -> float:
    """Images a second of one process: reading, decoding, random crop, normalisation."""
    import torch

    from sycoca.images import normalise, random_image

    torch.set_num_threads(1)
    draws = np.random.default_rng(0)
    began = time.perf_counter()
    for index in indices:
        normalise(torch.from_numpy(random_image(source[index].image, image_size, draws)))
    return len(indices) / (time.perf_counter() - began)


def _said(sample: Sample) -> str:
    """The first caption; where there is none, the phrases of the regions."""
    return next(iter(sample.captions), "; ".join(region.phrase for region in sample.regions or ()))


def contact_sheet(samples: list[Sample], path: Path) -> None:
    """A picture of samples with the first caption of each."""
    from PIL import Image, ImageDraw, ImageFont

    from sycoca.images import as_pil

    rows = -(-len(samples) // _COLUMNS)
    words_high, gap = 40, 8
    step = _CELL + gap
    sheet = Image.new("RGB", (_COLUMNS * step + gap, rows * (step + words_high) + gap), (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for place, sample in enumerate(samples):
        left, top = gap + place % _COLUMNS * step, gap + place // _COLUMNS * (step + words_high)
        image = as_pil(sample.image)
        image.thumbnail((_CELL, _CELL))
        sheet.paste(image, (left + (_CELL - image.width) // 2, top + (_CELL - image.height) // 2))
        lines = textwrap.wrap(" ".join(_said(sample).split()), 28, max_lines=3, placeholder=" ...")
        draw.multiline_text((left, top + _CELL + 2), "\n".join(lines), fill=(0, 0, 0), font=font, spacing=1)
    sheet.save(path)


def inspect(arguments: argparse.Namespace) -> int:
    """Prints what a source holds; returns how many samples the count does not explain."""
    sources = open_splits(arguments.spec, arguments.splits)
    missing, shown = 0, []
    for split, source in sources.items():
        numbers, samples, account = look(source, arguments.all)
        shown = shown or samples
        good, seen = len(numbers["good"]), len(numbers["good"]) + len(account.samples)
        print(f"{split}: {len(source)} samples; opened {seen}: {good} good, {len(account.samples)} left out")
        if arguments.all:
            missing += len(source) - seen
        account.add(source.skipped)
        if good:
            print(f"  captions an image   {spread(numbers['captions'])}   (min / median / 95 % / max)")
            print(f"  words a caption     {spread(numbers['words'])}")
            print(f"  letters a caption   {spread(numbers['letters'])}")
            print(f"  width in pixels     {spread(numbers['width'])}")
            print(f"  height in pixels    {spread(numbers['height'])}")
            timed = rate(source, numbers["good"][:_LOOKED_AT], arguments.image_size)
            print(f"  images/s on a core  {timed:.0f}   (read, decode, crop to {arguments.image_size})")
        if line := account.line():
            print(f"  {line}")
    if shown:
        contact_sheet(shown, arguments.sheet)
        print(f"contact sheet: {arguments.sheet}")
    return missing


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(sys.argv[1:] if argv is None else argv)
    try:
        check_source(arguments.spec)
        if arguments.sheet.suffix.lower() not in _PICTURES:
            raise DataError(f"--sheet {arguments.sheet}: a picture's name ends in {', '.join(_PICTURES)}")
        if arguments.image_size < 1:
            raise DataError(f"--image-size {arguments.image_size}: needs at least 1")
        missing = inspect(arguments)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if missing:
        print(f"error: {missing} samples are neither good nor left out", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
