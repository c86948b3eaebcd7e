"""Shows what a model attends to in an image under its caption: the score of each patch, the patches that captioning
keeps and TG-MIM hides, the hidden ones rebuilt, and where each word lies. Without a caption the model writes one."""

import argparse
from pathlib import Path
from typing import Any

from sycoca.commands import inputs
from sycoca.commands.common import add_model_options, finish, load, say
from sycoca.commands.inputs import UserError

SUMMARY = "picture what the model attends to"
EXAMPLES = """examples:
  python -m sycoca overlay photo.jpg --caption "a dog runs on the beach" --out overlay.html
  python -m sycoca overlay photos/ --model runs/tiny --out overlay.png"""

# A page of more images is too heavy to be looked at.
_MOST = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders, globs, or - for a list of paths")
    parser.add_argument(
        "--caption",
        action="append",
        metavar="TEXT",
        help="one for all images, or given once for each; without it the model writes one",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="overlay.html or overlay.png")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    suffix = inputs.suffix_of(args.out, (".html", ".png"), "--out")
    if suffix == ".png":
        inputs.require_matplotlib("--out", args.out)
    paths = inputs.expand(args.images, "IMAGES")
    if inputs.are_texts(paths, "IMAGES"):
        raise UserError(f"IMAGES: {paths[0]} is a text file")
    if len(paths) > _MOST:
        raise UserError(f"IMAGES: {len(paths)} of them; one page holds at most {_MOST}")
    captions = args.caption or []
    if len(captions) > 1 and len(captions) != len(paths):
        raise UserError(f"--caption: given {len(captions)} times for {len(paths)} images")
    chosen = dict(zip(paths, captions * len(paths) if len(captions) == 1 else captions))
    loaded = load(args)
    if not captions and not loaded.config.writes:
        from sycoca.generate import unable

        raise UserError(f"--caption: needed, for {unable(loaded.config)}")

    import torch

    from sycoca.images import decode
    from sycoca.visualize import look_at, save_views

    skipped, views = inputs.Skipped(say), []
    readable = [path for path, _ in inputs.decoded(paths, decode, skipped)]
    with torch.inference_mode():
        for batch in inputs.batches(readable, args.batch_size):
            said = [chosen[path] for path in batch] if chosen else _written(loaded, batch)
            views += look_at(loaded.model, loaded.tokenizer, batch, said)
    if views:
        save_views(args.out, views)
        say(f"{args.out}: {len(views)} image{'s' if len(views) > 1 else ''}")
    return finish(skipped, len(views), "image")


def _written(loaded: Any, paths: list[str]) -> list[str]:
    from sycoca.generate import generate
    from sycoca.images import load_images

    device = next(loaded.model.parameters()).device
    return generate(loaded.model, loaded.tokenizer, load_images(paths, loaded.config.vision.image_size).to(device))
