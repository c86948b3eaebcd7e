"""What lies where in a tar file: samples as WebDataset groups them, without reading or unpickling a member.

A member `a/b.jpg` belongs to the sample of key `a/b`: all up to the first dot of its name. Members of a sample need not
stand together. A damaged header costs its own member: reading goes on at the next sound one.
"""

from __future__ import annotations

import os
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train.data.paths import IMAGE_ENDINGS

IMAGE, TEXT, JSON, LABEL = range(4)
LARGEST_IMAGE = 64 << 20
LARGEST_TEXT = 1 << 20
_ROLES = {ending[1:]: IMAGE for ending in IMAGE_ENDINGS} | {"img": IMAGE, "txt": TEXT, "json": JSON, "cls": LABEL}
_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)")
_BLOCK = 512


class Listing(NamedTuple):
    """The samples of a tar: their keys, and (n, 4, 2) int64 offset and size of each role, -1 where none is.

    `endings` are those of the images; `faults` what could not be used, as (cause, where).
    """

    keys: list[str]
    spans: np.ndarray
    endings: list[str]
    faults: list[tuple[str, str]]


def scan(path: Path) -> Listing:
    """Lists the samples of a tar.

    Raises:
        OSError: the file cannot be read.
    """
    places: dict[str, list[tuple[int, int]]] = {}
    endings: dict[str, str] = {}
    faults: list[tuple[str, str]] = []
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        expected = 0
        for member in _members(file):
            if member.offset > expected:
                faults.append(("damaged part of a shard", f"{path.name}@{expected}"))
            expected = member.offset_data + -(-member.size // _BLOCK) * _BLOCK if member.isreg() else member.offset_data
            match = _NAME.fullmatch(member.name.removeprefix("./"))
            role = _ROLES.get(match[2].lower()) if match else None
            if role is None or not member.isreg() or member.issparse():
                continue
            if member.offset_data + member.size > size:
                faults.append(("shard ends within a member", f"{path.name} {member.name}"))
                continue
            spans = places.setdefault(match[1], [(-1, -1)] * 4)
            if spans[role][0] >= 0:
                faults.append(("duplicate key", f"{path.name} {member.name}"))
                continue
            spans[role] = (member.offset_data, member.size)
            if role == IMAGE:
                endings[match[1]] = match[2].lower()
        if not places:
            faults.append(("shard without a sample", path.name) if size else ("empty file", path.name))
    spans = np.array(list(places.values()), dtype=np.int64).reshape(-1, 4, 2)
    return Listing(list(places), spans, [endings.get(key, "jpg") for key in places], faults)


def _members(file):
    try:
        # Zeros ignored means that reading goes on behind whatever is no header.
        with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True, errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                yield member
                # The module would keep every member it ever saw.
                tar.members = []
    except (tarfile.TarError, EOFError, ValueError):
        return
