"""Names of shards written with braces: {000..099} counts, {a,b} lists, and they nest and combine."""

import re
from collections.abc import Iterator

from train.data.sample import DataError

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST_SHARDS = 1_000_000


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return place
    raise DataError(f"data source {text!r}: a brace is not closed")


def _choices(inner: str) -> Iterator[str]:
    if match := _RANGE.fullmatch(inner):
        first, last = int(match[1]), int(match[2])
        if abs(last - first) >= MOST_SHARDS:
            raise DataError(f"data source: {{{inner}}} are over {MOST_SHARDS} shards")
        width = len(match[1]) if match[1].startswith("0") or len(match[1]) == len(match[2]) else 0
        for number in range(first, last + 1) if first <= last else range(first, last - 1, -1):
            yield f"{number:0{width}d}"
        return
    depth, begin = 0, 0
    for place, letter in enumerate(inner + ","):
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            yield from expand(inner[begin:place])
            begin = place + 1


def expand(text: str) -> list[str]:
    """All names that a pattern stands for, in order.

    Raises:
        DataError: a brace is not closed, or far too many names.
    """
    start = text.find("{")
    if start < 0:
        return [text]
    end = _closing(text, start)
    inner, tails = text[start + 1 : end], expand(text[end + 1 :])
    if not _RANGE.fullmatch(inner) and "," not in inner:
        return [text[: end + 1] + tail for tail in tails]
    return [text[:start] + choice + tail for choice in _choices(inner) for tail in tails]
