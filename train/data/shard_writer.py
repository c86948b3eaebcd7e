"""Writing of tar shards: one at a time, whole or not at all, the same bytes for the same samples.

Member          content
NUMBER.jpg      the image as it was stored, or smaller where that was asked for
NUMBER.txt      the captions, one a line
NUMBER.json     {"key", "captions", "regions", "detections"}
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

from train.data.fetch import sha256_of
from train.data.sample import BadSample, Sample, Skipped, Source

_QUALITY = 95


def shrunk(data: bytes, ending: str, image, size: int) -> tuple[bytes, str]:
    """The encoded image with its shorter side brought down to `size`; unchanged where it is no larger."""
    from PIL import Image

    if min(image.size) <= size:
        return data, ending
    scale = size / min(image.size)
    shape = tuple(max(size, round(side * scale)) for side in image.size)
    file = io.BytesIO()
    image.resize(shape, Image.Resampling.BICUBIC).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue(), "jpg"


def _described(sample: Sample) -> bytes:
    data: dict[str, Any] = {"key": sample.key, "captions": list(sample.captions)}
    if sample.regions is not None:
        data["regions"] = [
            {"phrase": r.phrase, "bbox": list(r.box), "caption": r.caption}
            | ({"attributes": r.attributes} if r.attributes else {})
            for r in sample.regions
        ]
    if sample.detections is not None:
        data["detections"] = [list(box) for box in sample.detections]
    return json.dumps(data).encode()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_shard(
    source: Source, indices: range, path: Path, image_size: int | None, seen: Skipped
) -> tuple[dict[str, Any], list[str]]:
    """Writes the usable samples among the given ones.

    Args:
        source: where they come from.
        indices: of the samples; their numbers name the members.
        path: of the shard.
        image_size: the shorter side in pixels that larger images are brought down to; None leaves them as stored.
        seen: account that takes what is left out.

    Returns:
        The shard's entry in an index, without its file; and the keys of its samples.
    """
    part = path.with_name(path.name + ".part")
    keys = []
    with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in indices:
            try:
                sample = source[index]
                data, ending = source.encoded(index)
            except BadSample as bad:
                seen.sample(bad.key, bad.cause, index)
                continue
            if image_size is not None:
                from sycoca.images import as_pil

                data, ending = shrunk(data, ending, as_pil(sample.image), image_size)
            number = f"{index:09d}"
            _add(tar, f"{number}.{ending}", data)
            _add(tar, f"{number}.txt", "\n".join(" ".join(text.split()) for text in sample.captions).encode())
            _add(tar, f"{number}.json", _described(sample))
            keys.append(sample.key)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    entry = {"split": source.split, "samples": len(keys), "bytes": part.stat().st_size, "sha256": sha256_of(part)}
    os.replace(part, path)
    return entry, keys
