"""Finds what phrases describe in an image: prints a line for each, phrase, tab, box as x0 y0 x1 y1 in pixels, tab, how
surely the image shows it, and draws the boxes. The model has to have learned boxes."""

import argparse
import json
from pathlib import Path

from sycoca.commands import inputs
from sycoca.commands.common import add_model_options, load, say
from sycoca.commands.inputs import UserError

SUMMARY = "draw a box around what a phrase describes"
EXAMPLES = """examples:
  python -m sycoca locate photo.jpg "a brown dog"
  python -m sycoca locate photo.jpg "a brown dog" "a man in a red shirt" --model runs/xvlm_tiny --out found.png"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="a file")
    parser.add_argument("phrases", nargs="+", metavar="PHRASE", help="what to look for; each gets a box")
    parser.add_argument(
        "--out", type=Path, default=Path("located.png"), metavar="FILE", help="picture of the boxes (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a phrase: phrase, box, match")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    inputs.suffix_of(args.out, (".png", ".jpg", ".jpeg"), "--out")
    paths = inputs.expand([args.image], "IMAGE")
    if len(paths) > 1 or inputs.are_texts(paths, "IMAGE"):
        raise UserError(f"IMAGE: {args.image}: {'several files' if len(paths) > 1 else 'a text file'}; give one image")
    if blank := [phrase for phrase in args.phrases if not phrase.strip()]:
        raise UserError(f"PHRASE: {blank[0]!r} is empty")
    loaded = load(args)

    from sycoca.images import ImageError, decode
    from sycoca.locate import draw_boxes, locate

    try:
        image = decode(paths[0])
    except ImageError as error:
        raise UserError(f"IMAGE: {paths[0]}: {error.cause}") from None
    try:
        found = locate(loaded.model, loaded.tokenizer, image, args.phrases)
    except ValueError as error:
        raise UserError(f"--model: {error}") from None
    for phrase, box, match in found:
        corners = [round(side * size, 1) for side, size in zip(box, image.size * 2)]
        if args.json:
            row = {"phrase": phrase, "box": corners, "match": match if match is None else round(match, 4)}
            print(json.dumps(row, ensure_ascii=False))
        else:
            numbers = " ".join(f"{corner:.0f}" for corner in corners)
            print(f"{phrase}\t{numbers}" + ("" if match is None else f"\t{match:.3f}"))
    draw_boxes(image, found).save(args.out)
    say(f"{args.out}: {len(found)} box{'es' if len(found) > 1 else ''}")
    return 0
