"""Files, folders and globs on a command line, and the images and texts in them, read ahead and in order.

A source that cannot be read is told of, counted by cause and left out.
"""

import glob
import importlib.util
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sycoca.config import ConfigError, nearest

if TYPE_CHECKING:
    import numpy as np

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".mpo")
TEXT_SUFFIXES = (".txt",)
# Sources that are named one by one when they are left out; the rest is only counted.
_NAMED = 20

T = TypeVar("T")


class UserError(ConfigError):
    """What a person can put right; the message is one line."""


def expand(patterns: Sequence[str], option: str = "inputs") -> list[str]:
    """Paths that a command line names, each once, in its order.

    Args:
        patterns: files, folders (everything below with the suffix of an image, by name), globs (`**` goes into
            folders), or `-` for a list of paths on standard input.
        option: what the arguments are called in an error.

    Returns:
        At least one path.

    Raises:
        UserError: a pattern names nothing.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        paths = list(_expand_one(pattern))
        if not paths:
            raise UserError(f"{option}: {_why_nothing(pattern)}")
        found.update(dict.fromkeys(paths))
    if not found:
        raise UserError(f"{option}: name at least one file, folder or glob")
    return list(found)


def _expand_one(pattern: str) -> Iterator[str]:
    if pattern == "-":
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
    elif os.path.isdir(pattern):
        yield from _below(pattern)
    elif os.path.lexists(pattern):
        yield pattern
    elif glob.has_magic(pattern):
        for path in sorted(glob.glob(pattern, recursive=True)):
            if os.path.isdir(path):
                yield from () if "**" in pattern else _below(path)
            elif path.lower().endswith((*IMAGE_SUFFIXES, *TEXT_SUFFIXES)):
                yield path


def _below(folder: str) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                yield os.path.join(parent, name)


def _why_nothing(pattern: str) -> str:
    if pattern == "-":
        return "standard input lists no path"
    if os.path.isdir(pattern):
        return f"no image below the folder {pattern}"
    if glob.has_magic(pattern):
        return f"nothing matches {pattern}"
    folder, name = os.path.split(pattern)
    if not os.path.isdir(folder or "."):
        return f"{pattern}: no such file or folder"
    return f"{pattern}: no such file or folder{nearest(name, os.listdir(folder or '.'))}"


def are_texts(paths: Sequence[str], option: str = "inputs") -> bool:
    """Whether the paths are files of texts, one text to a line; otherwise they are images.

    Raises:
        UserError: they are some of each.
    """
    texts = [path for path in paths if path.lower().endswith(TEXT_SUFFIXES)]
    if texts and len(texts) < len(paths):
        other = next(path for path in paths if path not in texts)
        raise UserError(f"{option}: images and texts cannot be mixed, got {texts[0]} and {other}")
    return bool(texts)


class Skipped:
    """Sources that were left out: each of the first few named on standard error, all counted by cause."""

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self._counts: Counter[str] = Counter()
        self._say = say or (lambda line: print(line, file=sys.stderr, flush=True))

    def add(self, source: str, cause: str) -> None:
        """Counts one source."""
        self._counts[cause] += 1
        total = self.total
        if total <= _NAMED:
            self._say(f"skipped {source}: {cause}")
        elif total == _NAMED + 1:
            self._say("skipped more; they are counted at the end")

    @property
    def total(self) -> int:
        """How many were left out."""
        return self._counts.total()

    def line(self, of: int) -> str | None:
        """The sum in one line, None where nothing was left out."""
        if not self._counts:
            return None
        causes = ", ".join(f"{count} x {cause}" for cause, count in self._counts.most_common())
        return f"skipped {self.total} of {of}: {causes}"


def decoded(
    paths: Iterable[str], read: Callable[[str], T], skipped: Skipped, *, workers: int | None = None
) -> Iterator[tuple[str, T]]:
    """Images in the order of their paths, decoded ahead by threads.

    Args:
        paths: of the images.
        read: makes of a path what is wanted; raises `ImageError`.
        skipped: told of what cannot be read.
        workers: threads; None for one per core, up to eight.

    Yields:
        Path and what `read` made of it.
    """
    from sycoca.images import ImageError

    def attempt(path: str) -> T | ImageError:
        try:
            return read(path)
        except ImageError as error:
            return error

    workers = workers or min(8, os.cpu_count() or 1)
    queue: deque = deque()
    source = iter(paths)
    pool = ThreadPoolExecutor(workers)
    try:
        queue.extend((path, pool.submit(attempt, path)) for path in islice(source, 4 * workers))
        while queue:
            path, future = queue.popleft()
            queue.extend((path, pool.submit(attempt, path)) for path in islice(source, 1))
            result = future.result()
            if isinstance(result, ImageError):
                skipped.add(path, result.cause)
            else:
                yield path, result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def square(size: int) -> Callable[[str], "np.ndarray"]:
    """Reads a path as the picture that a model sees, (size, size, 3) uint8."""
    from sycoca.images import center_image, decode

    return lambda path: center_image(decode(path), size)


def texts(paths: Sequence[str], skipped: Skipped, *, start: int = 0) -> Iterator[tuple[str, str]]:
    """Lines of text files with their place, `file:number`; empty ones are left out.

    Args:
        paths: of the files.
        skipped: told of empty lines.
        start: lines, over all files, that are passed over in silence.

    Raises:
        UserError: a file cannot be read as UTF-8.
    """
    passed = 0
    for path in paths:
        try:
            with open(path, encoding="utf-8-sig", newline="\n") as file:
                for number, line in enumerate(file, 1):
                    passed += 1
                    place, text = f"{path}:{number}", line.strip()
                    if passed <= start:
                        continue
                    if text:
                        yield place, text
                    else:
                        skipped.add(place, "empty text")
        except UnicodeDecodeError:
            raise UserError(f"{path}: not a UTF-8 text file") from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` consecutive items, the last one of what is left."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def to_images(pictures: Sequence["np.ndarray"], device: Any) -> Any:
    """Pictures (H, W, 3) uint8 as a model takes them, (B, 3, H, W) fp32 on its device."""
    import numpy as np
    import torch

    from sycoca.images import normalise

    return normalise(torch.from_numpy(np.stack(pictures)).to(device))


def encode(loaded: Any, items: Sequence, *, textual: bool) -> Any:
    """Features (n, E) fp32, unit rows, of n texts or of n pictures (H, W, 3) uint8."""
    model, config = loaded.model, loaded.config
    device = next(model.parameters()).device
    if textual:
        tokens = loaded.tokenizer.encode(items, config.text.context_length)
        return model.encode_text(tokens.to(device)).features
    return model.encode_image(to_images(items, device)).features


def suffix_of(path: Path, allowed: Sequence[str], option: str) -> str:
    """The suffix of an output path, one of those allowed.

    Raises:
        UserError: another one, or a folder that is not there or takes no file.
    """
    if path.suffix.lower() not in allowed:
        raise UserError(f"{option}: {path} must end in {' or '.join(allowed)}")
    parent = path.parent
    if not parent.is_dir():
        raise UserError(f"{option}: the folder {parent} does not exist")
    if path.is_dir():
        raise UserError(f"{option}: {path} is a folder")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{option}: the folder {parent} cannot be written to")
    return path.suffix.lower()


def require_matplotlib(option: str, path: Path) -> None:
    """Raises unless a PNG can be drawn.

    Raises:
        UserError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f'{option} {path}: a PNG needs matplotlib: pip install "sycoca[pictures]", or write an .html')
