"""What the commands share: the options for a model and a device, loading it, progress."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from sycoca.commands.inputs import UserError


def whole(least: int | None = None) -> Callable[[str], int]:
    """Reads an integer, one of at least `least` where that is given."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or (least is not None and value < least):
            bound = "" if least is None else f" of at least {least}"
            raise argparse.ArgumentTypeError(f"must be an integer{bound}, got {text}")
        return value

    return read


def number(text: str) -> float:
    """Reads a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text}") from None


# Options of the command line that `load_pretrained` takes by the same name.
_LOADING = ("image_size", "revision", "config", "correct_cls_mask", "allow_pickle")


def add_model_options(parser: argparse.ArgumentParser, *, batch_size: int = 32) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="PATH_OR_NAME",
        help="folder of a model or of a run, weights of open_clip's CoCa, or a name; without it the newest run's",
    )
    group.add_argument("--revision", help="branch, tag or commit of a name on the hub")
    group.add_argument(
        "--config",
        metavar="NAME",
        help="what a weight file alone is of: a CoCa of open_clip, or its JSON file",
    )
    group.add_argument(
        "--correct-cls-mask", action="store_true", help="open_clip's weights were trained with its flag of this name"
    )
    group.add_argument(
        "--allow-pickle", action="store_true", help="read weights that hold Python objects, which can run any code"
    )
    group.add_argument("--image-size", type=whole(1), metavar="PIXELS", help="another than the model was trained at")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ...; without it a GPU where there is one")
    group.add_argument(
        "--batch-size", type=whole(1), default=batch_size, metavar="N", help="inputs at a time (%(default)s)"
    )


def newest_model(root: Path = Path("runs")) -> str:
    """The newest run's folder of a model, looked for where runs are left.

    Raises:
        UserError: there is none.
    """
    folders = [path.parent for path in root.glob("*/model/config.json")]
    if not folders:
        raise UserError("--model: name the folder of a model or of a run; there is none under runs/ to take instead")
    return str(max(folders, key=lambda folder: (folder / "config.json").stat().st_mtime))


def load(args: argparse.Namespace) -> Any:
    """The model that the options name, as `sycoca.hub.load_pretrained` gives it, on its device.

    Raises:
        UserError: no such model, or no such device.
    """
    name = args.model or newest_model()
    if not args.model:
        print(f"model: {name}", file=sys.stderr, flush=True)
    from sycoca.hub import load_pretrained

    options = {option: getattr(args, option) for option in _LOADING}
    try:
        return load_pretrained(name, device=pick_device(args.device), **options)
    except OSError as error:
        told = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        raise UserError(f"--model: {told}") from None
    except (ValueError, KeyError, ImportError) as error:
        told = str(error.args[0] if error.args else error).strip().splitlines()[0]
        raise UserError(f"--model {told if told.startswith(str(name)) else f'{name}: {told}'}") from None


def pick_device(name: str | None) -> Any:
    """The device of that name, or the best one there is.

    Raises:
        UserError: it is not there.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def progress(items: Iterable[Any], total: int | None, unit: str, *, done: int = 0) -> Iterator[Any]:
    """The items, with a bar on a terminal and nothing elsewhere."""
    from tqdm import tqdm

    return tqdm(items, total=total, unit=unit, initial=done, disable=None, file=sys.stderr, leave=False, smoothing=0.1)


def say(line: str) -> None:
    """A line for the person, beside a progress bar if there is one; results go to standard output."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


class Stopwatch:
    """How long something took, as people say it."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def rate(self, count: int, unit: str) -> str:
        """`640 images in 12.0 s (53 images/s)`."""
        seconds = max(1e-9, time.perf_counter() - self._start)
        return f"{count} {unit}s in {seconds:.1f} s ({count / seconds:.0f} {unit}s/s)"


def finish(skipped: Any, used: int, unit: str) -> int:
    """Tells what was left out; the exit code of a command that used so many inputs."""
    if line := skipped.line(used + skipped.total):
        print(line, file=sys.stderr, flush=True)
    if used == 0:
        print(f"error: none of the {unit}s could be used", file=sys.stderr, flush=True)
        return 1
    return 0


def readable_path(path: str) -> str:
    """A path for the terminal: bytes that are no text, and control characters, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in path)
