"""Error lines about words and paths that are wrong: what is there, closest to them."""

import difflib
import os
from contextlib import contextmanager
from pathlib import Path

from train.data.sample import DataError

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")


def quoted_nearest(word: str, known) -> str:
    """The end of an error line about a word that is not known: the one closest to it."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def nearest_path(path: Path) -> str:
    """The end of an error line about a path that is not there: what is, closest to it."""
    fixed = Path(path.anchor) if path.is_absolute() else Path()
    parts = path.parts[1:] if path.is_absolute() else path.parts
    for position, part in enumerate(parts):
        following = fixed / part
        if following.exists():
            fixed = following
            continue
        try:
            names = [] if not fixed.is_dir() else os.listdir(fixed)
        except OSError:
            names = []
        close = difflib.get_close_matches(part, names, n=1, cutoff=0.6)
        if not close:
            # The last name alone may be wrong in its ending only.
            close = [n for n in names if Path(n).stem == Path(part).stem][:1]
        if close:
            whole = fixed.joinpath(close[0], *parts[position + 1 :])
            return f"; did you mean '{whole if whole.exists() else fixed / close[0]}'?"
        return f"; the nearest existing path is '{fixed}'"
    return ""


@contextmanager
def told(path):
    """Turns what the system refuses while a source is opened into one line that names the path."""
    try:
        yield
    except OSError as error:
        raise DataError(f"data source '{error.filename or path}': {error.strerror or error}") from None
