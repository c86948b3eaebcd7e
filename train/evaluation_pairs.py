"""Held-out pairs as batches, and what ranks of a process group tell one another about them.

A pair is an image with its first caption. Its stranger is the first caption of the next usable pair, cyclically:
every caption is then a stranger once. Every rank of W reads ceil(n / W) of n pairs, padded, so that all run the same
number of forward passes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sycoca.images import crop_box, eval_transform
from train.data.sample import BadSample, Sample
from train.evaluation import described_area


class Pairs(NamedTuple):
    """A batch; `counted` is False for unreadable images and padding, whose other rows are filler."""

    images: Tensor  # (B, 3, H, W) fp32, normalised
    tokens: Tensor  # (B, T) int64
    strangers: Tensor  # (B, T) int64
    indices: Tensor  # (B,) int64, places in the data set
    counted: Tensor  # (B,) bool
    described: Tensor  # (B, P) fp64, share of a patch inside boxes of what the caption describes
    undescribed: Tensor  # (B, P) fp64, share inside boxes of what the source says no caption describes


class HeldOut:
    """The first pairs of a data set, sliced over a process group.

    Args:
        dataset: a source of samples.
        tokenizer: encodes the captions.
        config: of the model.
        image_size: side of the images in pixels.
        pairs: how many, at most.
        device: of the batches.
        group: a process group, None for this process alone.
    """

    def __init__(self, dataset, tokenizer, config, *, image_size: int, pairs: int, device, group) -> None:
        self._dataset, self._tokenizer, self._config = dataset, tokenizer, config
        self._image_size, self.device, self._group = image_size, device, group
        self._rank = dist.get_rank(group) if group is not None else 0
        self._world = dist.get_world_size(group) if group is not None else 1
        self._count = min(pairs, len(dataset))
        self._samples: dict[int, tuple[str, tuple[str, ...]] | None] = {}
        self._skipped: dict[int, str] = {}

    def batches(self, batch_size: int) -> Iterator[Pairs]:
        """This rank's slice of the pairs, in order."""
        for rows in _batches(self._slice(self._count), batch_size):
            yield self._batch(rows)

    def rows(self, batch_size: int) -> Iterator[list[int]]:
        """Indices of this rank's slice of the pairs, in order, without padding."""
        for rows in _batches(self._slice(self._count), batch_size):
            yield [index for index in rows if index < self._count]

    def share(self) -> dict[int, tuple[str, tuple[str, ...]]]:
        """Key and captions of every usable pair by its index, from all ranks; call it behind `batches`."""
        gathered = [(self._samples, self._skipped)]
        if self._group is not None:
            gathered = [None] * self._world
            dist.all_gather_object(gathered, (self._samples, self._skipped), group=self._group)
        for samples, skipped in gathered:
            self._samples.update(samples)
            self._skipped.update(skipped)
        return {i: self._samples[i] for i in range(self._count) if self._samples[i] is not None}

    def images(self, indices: list[int]) -> Tensor:
        """The images (B, 3, H, W) of usable pairs, read anew."""
        read = [eval_transform(self._dataset[i].image, self._image_size) for i in indices]
        return torch.stack(read).to(self.device)

    def skipped(self) -> dict[str, int]:
        """Unusable pairs by cause; of all ranks behind `share`."""
        causes = [self._skipped[i] for i in sorted(self._skipped)]
        return {cause: causes.count(cause) for cause in dict.fromkeys(causes)}

    def captions(self, texts: list[str], batch_size: int) -> Iterator[Tensor]:
        """Tokens (B, T) of this rank's slice of some captions, in order, padded with empty ones."""
        for rows in _batches(self._slice(len(texts)), batch_size):
            yield self._encode([texts[i] if i < len(texts) else "" for i in rows])

    def gather(self, rows: list[Tensor], count: int) -> Tensor:
        """What the ranks computed for their slices of `count` items, put together in order."""
        mine = torch.cat(rows).contiguous()
        parts = [mine]
        if self._group is not None:
            parts = [torch.empty_like(mine) for _ in range(self._world)]
            dist.all_gather(parts, mine, group=self._group)
        return torch.cat(parts)[:count]

    def sum(self, values: list[float]) -> list[float]:
        """Sums over the ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        return total.tolist()

    def _slice(self, count: int) -> range:
        each = -(-count // self._world)
        return range(self._rank * each, (self._rank + 1) * each)

    def read(self, index: int) -> Sample | None:
        """A sample, None where it cannot be used, which is counted."""
        try:
            sample = self._dataset[index]
            if not sample.captions:
                raise BadSample("image without a caption", sample.key)
        except BadSample as bad:
            self._samples[index], self._skipped[index] = None, bad.cause
            return None
        self._samples[index] = (sample.key, tuple(sample.captions))
        return sample

    def _stranger(self, index: int) -> str:
        for step in range(1, self._count + 1):
            other = (index + step) % self._count
            if other not in self._samples:
                self.read(other)
            if self._samples[other] is not None:
                return self._samples[other][1][0]
        return ""

    def _encode(self, captions: list[str]) -> Tensor:
        tokens = self._tokenizer.encode(captions, self._config.text.context_length)
        return torch.as_tensor(tokens, dtype=torch.int64).to(self.device)

    def _batch(self, indices: range) -> Pairs:
        vision = self._config.vision
        images = torch.zeros(len(indices), 3, self._image_size, self._image_size)
        areas = torch.zeros(2, len(indices), vision.num_patches, dtype=torch.float64)
        captions, strangers, counted = [""] * len(indices), [""] * len(indices), [False] * len(indices)
        samples = [self.read(index) if index < self._count else None for index in indices]
        for row, (index, sample) in enumerate(zip(indices, samples)):
            if sample is None:
                continue
            counted[row], captions[row], strangers[row] = True, sample.captions[0], self._stranger(index)
            images[row] = eval_transform(sample.image, self._image_size)
            silent = [r for r in sample.regions or () if (r.attributes or {}).get("described") is False]
            for area, regions in zip(areas, (sample.described(0), silent)):
                boxes = [crop_box(region.box, sample.image) for region in regions]
                area[row] = described_area(boxes, vision.grid, vision.patch_size)
        return Pairs(
            images.to(self.device),
            self._encode(captions),
            self._encode(strangers),
            torch.tensor(list(indices), device=self.device),
            torch.tensor(counted, device=self.device),
            areas[0].to(self.device),
            areas[1].to(self.device),
        )


def _batches(indices: range, size: int) -> Iterator[range]:
    for first in range(0, len(indices), size):
        yield indices[first : first + size]
