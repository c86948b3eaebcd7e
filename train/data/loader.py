"""Batches in an order that depends on integers alone.

    samples of epoch e        permutation of range(n) keyed by (seed, e)
    global batch k            positions k G ... (k + 1) G - 1 of it; rank r of W takes the r-th of W equal slices,
                              part by part where it is to come in parts
    caption, crop, mask seed  functions of (seed, e, sample)
    stand-in for a bad one    mix(seed, e, position, attempt) mod n

The end of an epoch that does not fill a global batch is left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sycoca.images import center_image, crop_box, normalise, random_image
from train.data.ahead import Fault, Loader, Maker, Tickets
from train.data.order import AUGMENT, CAPTION, CROP, SEED, STAND_IN, mix, mix_array
from train.data.randaugment import randaugment
from train.data.sample import BadSample, DataError, Sample, Source
from train.evaluation import described_area

_ATTEMPTS = 100


class LoadedBatch(NamedTuple):
    """A rank's share of a global batch, or a part of it; the first four fields are those of `sycoca.model.Batch`.

    `images` (b, 3, S, S) fp32 normalised, or (b, S, S, 3) uint8; `tokens` (b, T), `seeds` (b,), `ids` (b,) int64;
    equal ids are the same sample. `epoch` and `index` place the global batch: `index + 1` is where to resume.
    `described` (b, P) fp32 is the share of each patch inside boxes of what the caption describes, where asked for.
    """

    images: Tensor
    tokens: Tensor
    seeds: Tensor
    ids: Tensor
    keys: tuple[str, ...]
    epoch: int
    index: int
    described: Tensor | None = None


class _Pairs(Maker):
    """Makes batches of images with one caption each."""

    def __init__(self, source: Source, tokenizer, order: dict[str, int], form: dict[str, Any]) -> None:
        super().__init__(source, order["seed"])
        self.tokenizer = tokenizer
        self.global_batch = order["global_batch"]
        self.parts = order["parts"]
        self.local = order["global_batch"] // order["world"] // order["parts"]
        self.first = order["rank"] * order["parts"] * self.local
        self.image_size = form["image_size"]
        self.context_length = form["context_length"]
        self.crop_scale = form["crop_scale"]
        self.flip = form["flip"]
        self.randaugment = form["randaugment"]
        self.normalised = form["normalised"]
        self.patch_size = form["described_in"]

    def make(self, epoch: int, number: int, faults: list[Fault]) -> LoadedBatch:
        index, part = divmod(number, self.parts)
        positions = index * self.global_batch + self.first + part * self.local + np.arange(self.local)
        chosen = self.source.order(epoch, positions, self.seed)
        self.look_ahead(epoch, positions, self.global_batch)
        pictures = np.empty((self.local, self.image_size, self.image_size, 3), dtype=np.uint8)
        captions, keys, described = [], [], []
        for row, position in enumerate(positions.tolist()):
            number = int(chosen[row])
            for attempt in range(_ATTEMPTS):
                try:
                    pictures[row], caption, key, area = self._sample(epoch, number)
                    break
                except BadSample as bad:
                    faults.append((bad.key, bad.cause, number % len(self.source)))
                    word = mix(self.seed, epoch, position, STAND_IN, attempt)
                    number = self.source.stand_in(number, word, attempt)
            else:
                raise DataError(
                    f"data source '{self.source.name}': {_ATTEMPTS} samples in a row were bad, {faults[-1][:2]}"
                )
            chosen[row] = number
            captions.append(caption)
            keys.append(key)
            described.append(area)
        seeds = (mix_array(mix(self.seed, epoch, SEED), chosen) >> np.uint64(1)).astype(np.int64)
        images = torch.from_numpy(pictures)
        return LoadedBatch(
            normalise(images) if self.normalised else images,
            self.tokenizer.encode(captions, self.context_length),
            torch.from_numpy(seeds),
            torch.from_numpy(self.source.identities(chosen)),
            tuple(keys),
            epoch,
            index,
            None if self.patch_size is None else torch.stack(described).float(),
        )

    def _sample(self, epoch: int, number: int) -> tuple[np.ndarray, str, str, Tensor | None]:
        index = number + epoch * len(self.source) if self.source.fresh else number
        pick = mix(self.seed, epoch, number, CAPTION)
        if self.patch_size is not None:
            return self._described(self.source[index], pick)
        image, caption, key = self.source.pair(index, pick)
        draws = np.random.Generator(np.random.Philox(key=mix(self.seed, epoch, number, CROP)))
        if self.crop_scale is None:
            picture = center_image(image, self.image_size)
        else:
            picture = random_image(image, self.image_size, draws, scale=self.crop_scale)
        # The last draw, so that crops are the same with and without it.
        mirrored = self.flip > 0 and draws.random() < self.flip
        picture = picture[:, ::-1] if mirrored else picture
        if self.randaugment is not None:
            draws = np.random.Generator(np.random.Philox(key=mix(self.seed, epoch, number, AUGMENT)))
            picture = randaugment(picture, draws, *self.randaugment)
        return picture, caption, key, None

    def _described(self, sample: Sample, pick: int) -> tuple[np.ndarray, str, str, Tensor]:
        """The centre of a sample's image with one caption, and what of its patches that caption describes."""
        which, cells = pick % len(sample.captions), self.image_size // self.patch_size
        boxes = [crop_box(region.box, sample.image) for region in sample.described(which)]
        area = described_area(boxes, (cells, cells), self.patch_size)
        return center_image(sample.image, self.image_size), sample.captions[which], sample.key, area


def batches(
    dataset: Source,
    tokenizer,
    *,
    global_batch: int,
    image_size: int,
    context_length: int,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    epoch: int = 0,
    start: int = 0,
    epochs: int | None = None,
    parts: int = 1,
    workers: int = 0,
    crop_scale: tuple[float, float] | None = (0.9, 1.0),
    flip: float = 0.0,
    randaugment: tuple[int, float] | None = None,
    normalised: bool = True,
    described_in: int | None = None,
    pin_memory: bool | None = None,
) -> Loader:
    """This rank's batches, from a place in an epoch on.

    Args:
        dataset: the source.
        tokenizer: whose `encode(texts, context_length)` gives (b, T) int64.
        global_batch: samples in a step of all ranks together, a multiple of `world` times `parts`.
        image_size: side of the pictures in pixels.
        context_length: T.
        seed: of order, captions, crops and mask seeds.
        rank: of this process.
        world: processes that share each global batch.
        epoch: where to begin.
        start: global batches of that epoch already seen.
        epochs: the epoch to end before; None goes on for ever.
        parts: equal pieces, one after the other, in which this rank's share of each global batch comes.
        workers: processes that make batches ahead; 0 makes each when it is asked for.
        crop_scale: range of a random crop's share of the area; None crops the centre.
        flip: share of pictures that are mirrored.
        randaugment: operations drawn for each picture and their strength, 0..10; None does none.
        normalised: fp32 images ready for the model, rather than uint8 pictures for `sycoca.images.normalise`.
        described_in: side in pixels of the patches whose described share is wanted, or None; the picture is then the
            centre of the image, which boxes can follow.
        pin_memory: page-locked tensors; None where CUDA is.

    Returns:
        An iterator that goes on over the epochs.

    Raises:
        DataError: the source has fewer samples than a global batch.
        ValueError: `world` and `parts` do not divide `global_batch`, or a place that is not in the epoch.
    """
    if described_in is not None and (crop_scale is not None or flip or randaugment):
        raise ValueError("batches: boxes do not follow augmentation; crop_scale=None, flip=0, randaugment=None")
    if global_batch < 1 or parts < 1 or global_batch % (world * parts) or not 0 <= rank < world:
        raise ValueError(
            f"batches: global_batch {global_batch}, rank {rank}, world {world} and parts {parts} do not agree"
        )
    per_epoch = len(dataset) // global_batch
    if not per_epoch:
        raise DataError(f"data source '{dataset.name}': {len(dataset)} samples do not fill a batch of {global_batch}")
    if epoch < 0 or not 0 <= start <= per_epoch:
        raise ValueError(f"batches: no batch {start} in epoch {epoch}; an epoch has {per_epoch}")
    order = {"seed": seed, "global_batch": global_batch, "rank": rank, "world": world, "parts": parts}
    form = {
        "image_size": image_size,
        "context_length": context_length,
        "crop_scale": crop_scale,
        "flip": flip,
        "randaugment": randaugment,
        "normalised": normalised,
        "described_in": described_in,
    }
    maker = _Pairs(dataset, tokenizer, order, form)
    return Loader(maker, Tickets(epoch, start * parts, per_epoch * parts, epochs), workers, pin_memory)
