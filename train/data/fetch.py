"""Files from elsewhere, `http(s)://` and `pipe:COMMAND`: whole, checked, and asked for again when that fails.

Waits double from one attempt to the next, with some chance in them so that ranks do not come back together. What an
HTTP server has already sent is kept where it can go on from a place in the file.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import random
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

ATTEMPTS = 6
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
TIMEOUT_S = 30.0
_PIPE_TIMEOUT_S = 3600.0
_FINAL = frozenset((400, 401, 403, 404, 405, 410))
_CHUNK = 1 << 20


class FetchError(Exception):
    """A file that did not come; its text says why in words that many files share."""


class _Final(FetchError):
    """Asking again would not help."""


def fetch(location: str, target: Path, *, size: int | None = None, sha256: str | None = None) -> None:
    """Brings a file here; `target` exists afterwards only whole.

    Args:
        location: a URL, or `pipe:` and a shell command that writes the file to its output.
        target: where it goes.
        size: in bytes, if known.
        sha256: of its content in hexadecimal, if known.

    Raises:
        FetchError: it did not come in any attempt.
    """
    part = target.with_name(target.name + ".part")
    chance = random.SystemRandom()
    for attempt in range(ATTEMPTS):
        try:
            (_pipe if location.startswith("pipe:") else _http)(location, part)
            _check(part, size, sha256)
            os.replace(part, target)
            return
        except _Final:
            part.unlink(missing_ok=True)
            raise
        except FetchError as error:
            if attempt + 1 == ATTEMPTS:
                part.unlink(missing_ok=True)
                raise FetchError(f"{error}, {ATTEMPTS} attempts") from None
        time.sleep(min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt) * (0.5 + 0.5 * chance.random()))


def _check(part: Path, size: int | None, sha256: str | None) -> None:
    found = part.stat().st_size
    if size is not None and found != size:
        if found > size:
            part.unlink()
        raise FetchError("size differs from the index")
    if sha256 is not None and sha256_of(part) != sha256:
        part.unlink()
        raise FetchError("hash differs from the index")


def sha256_of(path: Path) -> str:
    """The hash of a file's content in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _http(location: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(location, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            goes_on = have and answer.status == 206
            length = answer.headers.get("Content-Length")
            expected = None if length is None else int(length) + (have if goes_on else 0)
            with open(part, "ab" if goes_on else "wb") as file:
                while chunk := answer.read(_CHUNK):
                    file.write(chunk)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:
            part.unlink()
        raise (_Final if error.code in _FINAL else FetchError)(f"HTTP {error.code}") from None
    except (OSError, http.client.HTTPException, ValueError):
        raise FetchError("connection failed") from None
    if expected is not None and part.stat().st_size != expected:
        raise FetchError("connection ended early")


def _pipe(location: str, part: Path) -> None:
    with open(part, "wb") as file:
        try:
            done = subprocess.run(
                location.removeprefix("pipe:"),
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.PIPE,
                timeout=_PIPE_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise FetchError("command did not end") from None
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise FetchError(f"command ended with code {done.returncode}{': ' + last[0][:200] if last else ''}")
    if part.stat().st_size == 0:
        raise FetchError("command gave nothing")
