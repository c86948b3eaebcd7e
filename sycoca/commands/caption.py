"""Writes captions of images, a line each: path, tab, caption. Images that cannot be read are told of and skipped."""

import argparse
import json
import sys
from typing import Any

from sycoca.commands import inputs
from sycoca.commands.common import Stopwatch, add_model_options, finish, load, number, progress, say, whole
from sycoca.commands.inputs import UserError

SUMMARY = "write captions of images"
EXAMPLES = """examples:
  python -m sycoca caption photo.jpg
  python -m sycoca caption photos/ --model runs/tiny --num-beams 5 --length-penalty 0.8
  python -m sycoca caption 'photos/**/*.png' --temperature 0.9 --top-p 0.95 --num-return 3 --seed 1 --json"""

_SAMPLING = ("top_k", "top_p", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders, globs, or - for a list of paths")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a line: path, caption, score (log-probability)"
    )
    group = parser.add_argument_group("generation; greedy unless beams or a temperature are given")
    group.add_argument("--max-length", type=whole(2), metavar="N", help="most tokens, start and end included")
    group.add_argument("--min-length", type=whole(0), metavar="N", help="least tokens, start and end included")
    group.add_argument("--prompt", metavar="TEXT", help="beginning of every caption")
    group.add_argument("--num-beams", type=whole(1), metavar="N", help="width of the beam search")
    group.add_argument("--num-return", type=whole(1), metavar="N", help="captions of each image")
    group.add_argument("--length-penalty", type=number(-10, 10), metavar="X", help="above 1 favours long beams")
    group.add_argument("--temperature", type=number(0, above=True), metavar="X", help="sample; below 1 is cautious")
    group.add_argument("--top-k", type=whole(1), metavar="N", help="sample among the N likeliest tokens")
    group.add_argument("--top-p", type=number(0, 1, above=True), metavar="X", help="... that hold this probability")
    group.add_argument("--seed", type=whole(0), metavar="N", help="of the samples")
    group.add_argument("--repetition-penalty", type=number(0, above=True), metavar="X", help="above 1 avoids repeats")
    group.add_argument("--no-repeat-ngram", type=whole(0), metavar="N", help="no N tokens in a row twice")
    add_model_options(parser)


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `sycoca.generate.generate` that were given.

    Raises:
        UserError: two of them contradict each other.
    """
    names = ("max_length", "min_length", "prompt", "num_beams", "num_return", "length_penalty", "temperature")
    names += ("top_k", "top_p", "seed", "repetition_penalty", "no_repeat_ngram")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    sampled = "temperature" in given
    for name in _SAMPLING:
        if name in given and not sampled:
            raise UserError(f"--{name.replace('_', '-')}: only with --temperature")
    if sampled and given.get("num_beams", 1) > 1:
        raise UserError("--num-beams: not together with --temperature")
    beams, wanted = given.get("num_beams", 1), given.get("num_return", 1)
    if wanted > 1 and not sampled and beams < wanted:
        raise UserError(f"--num-return {wanted}: needs --temperature, or --num-beams of at least as many")
    if given.get("min_length", 0) > given.get("max_length", 1 << 30):
        raise UserError(f"--min-length {args.min_length}: longer than --max-length {args.max_length}")
    return given


def run(args: argparse.Namespace) -> int:
    paths = inputs.expand(args.images, "IMAGES")
    options = generation_options(args)
    if inputs.are_texts(paths, "IMAGES"):
        raise UserError(f"IMAGES: {paths[0]} is a text file")
    loaded = load(args)
    model = loaded.model
    if model.caption_decoder is None:
        raise UserError("--model: it was built without captioning")

    from sycoca.generate import generate_scored

    device = next(model.parameters()).device
    skipped, watch, used = inputs.Skipped(say), Stopwatch(), 0
    pictures = inputs.decoded(paths, inputs.square(loaded.config.vision.image_size), skipped)
    for batch in inputs.batches(progress(pictures, len(paths), "image"), args.batch_size):
        names, images = [path for path, _ in batch], inputs.to_images([picture for _, picture in batch], device)
        if "seed" in options:
            # Every batch draws its own numbers, whatever came before it.
            options["seed"] = args.seed + used
        try:
            captions = generate_scored(model, loaded.tokenizer, _seen(model, images), **options)
        except ValueError as error:
            raise UserError(str(error)) from None
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
