"""Writes captions of images, a line each: path, tab, caption. Images that cannot be read are told of and skipped."""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sycoca.commands import inputs
from sycoca.commands.common import Stopwatch, add_model_options, finish, load, number, progress, say, whole
from sycoca.commands.inputs import UserError
from sycoca.decoding import WHOLE_OPTIONS, Decoding

SUMMARY = "write captions of images"
EXAMPLES = """examples:
  python -m sycoca caption photo.jpg
  python -m sycoca caption photos/ --model runs/tiny --num-beams 5 --length-penalty 0.8
  python -m sycoca caption 'photos/**/*.png' --temperature 0.9 --top-p 0.95 --num-return 3 --seed 1 --json"""

_HELP = {
    "max_length": "most tokens, start and end included",
    "min_length": "least tokens, start and end included",
    "num_beams": "width of the beam search",
    "num_return": "captions of each image",
    "length_penalty": "above 1 favours long beams",
    "temperature": "sample; below 1 is cautious",
    "top_k": "sample among so many of the likeliest tokens",
    "top_p": "... that hold this probability",
    "seed": "of the samples",
    "repetition_penalty": "above 1 avoids repeats",
    "no_repeat_ngram": "no so many tokens in a row twice",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders, globs, or - for a list of paths")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a line: path, caption, score (log-probability)"
    )
    group = parser.add_argument_group("generation; greedy unless beams or a temperature are given")
    group.add_argument("--prompt", metavar="TEXT", help="beginning of every caption")
    for name, meaning in _HELP.items():
        reader, letter = (whole(), "N") if name in WHOLE_OPTIONS else (number, "X")
        group.add_argument(_option(name), type=reader, metavar=letter, help=meaning)
    add_model_options(parser)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


@contextmanager
def _on_the_command_line() -> Iterator[None]:
    """Refusals of an option, in the words of the command line."""
    try:
        yield
    except ValueError as error:
        told = str(error).removeprefix("generate: ")
        raise UserError(re.sub(r"\b(?:" + "|".join(_HELP) + r")\b", lambda name: _option(name[0]), told)) from None


def run(args: argparse.Namespace) -> int:
    paths = inputs.expand(args.images, "IMAGES")
    options = {name: value for name in _HELP if (value := getattr(args, name)) is not None}
    with _on_the_command_line():
        decoding = Decoding.of(options)
        if decoding.max_length is not None:
            decoding.lengths(decoding.max_length)
    if inputs.are_texts(paths, "IMAGES"):
        raise UserError(f"IMAGES: {paths[0]} is a text file")
    loaded = load(args)
    model = loaded.model

    from sycoca.decode_step import lay_out
    from sycoca.generate import generate_scored, unable

    if not loaded.config.writes:
        raise UserError(f"--model: {unable(loaded.config)}")
    with _on_the_command_line():
        decoding.lengths(loaded.config.text.context_length)
    device = next(model.parameters()).device
    if device.type == "cpu":
        lay_out(model)
    skipped, watch, used = inputs.Skipped(say), Stopwatch(), 0
    pictures = inputs.decoded(paths, inputs.square(loaded.config.vision.image_size), skipped)
    for batch in inputs.batches(progress(pictures, len(paths), "image"), args.batch_size):
        names, images = [path for path, _ in batch], inputs.to_images([picture for _, picture in batch], device)
        if "seed" in options:
            # The draws of an image do not follow the size of the batches.
            options["first"] = used
        with _on_the_command_line():
            captions = generate_scored(model, loaded.tokenizer, _seen(model, images), prompt=args.prompt, **options)
        for name, said in zip(names, captions):
            _write(name, said, args.json)
        used += len(batch)
    if used > 1:
        say(f"captioned {watch.rate(used, 'image')}")
    return finish(skipped, used, "image")


def _seen(model: Any, images: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model.encode_image(images)


def _write(path: str, captions: list[Any], as_json: bool) -> None:
    """One line for each caption."""
    # Bytes that are no text stay what they are; a line and a tab must not come from the path.
    escaped = "".join(c if c >= " " else c.encode("unicode_escape").decode() for c in path)
    safe = escaped.encode("utf-8", "surrogateescape")
    sys.stdout.flush()
    for caption in captions:
        row = {"path": path, "caption": caption.text, "score": round(caption.score, 4)}
        line = json.dumps(row, ensure_ascii=not path.isprintable()).encode() if as_json else None
        sys.stdout.buffer.write(line or safe + b"\t" + caption.text.encode())
        sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()
