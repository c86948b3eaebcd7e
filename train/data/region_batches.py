"""Region batches: an exact number of texts, each with a box of an image or with the whole of it.

    pack           p elements; E of a global batch are E / p packs, and rank r of W takes the r-th of W equal slices
    pack k         positions k m ... (k + 1) m - 1 of the epoch, image after image until p elements are there
    image          its whole-image caption, where one is drawn, then boxes in random order, at most `max_regions` in all
    too few        stand-ins: mix(seed, e, k, attempt) mod n, images that the global batch does not have yet
    id             a hash of the text in plain words, or of the attribute `kind` where a source says what a box
                   shows, so that what says the same is a positive of each other

m is p over the mean number of elements of an image. No element is taken twice to fill a batch; an image that gives no
element is in none. Everything is a function of (seed, epoch, pack), whatever the number of ranks and workers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import blake2b
from math import gcd
from typing import Any, NamedTuple

import numpy as np
import torch

from sycoca.images import as_pil, normalise, resized_crop
from sycoca.regions import RegionBatch, cells
from train.data.ahead import Fault, Loader, Maker, Tickets
from train.data.box_augment import choose_view, seen_box
from train.data.order import AUGMENT, CAPTION, CROP, REGIONS, SEED, STAND_IN, mix
from train.data.randaugment import randaugment
from train.data.regions import box_fault, united
from train.data.sample import BadSample, DataError, Region, Sample, Source

PACK = 16
WHOLE = (0.5, 0.5, 1.0, 1.0)
_ATTEMPTS = 200
_PROBED = 256
_DROPPED = re.compile(r"[,.'!?\"()*#:;~]")
_SPACED = re.compile(r"[-/\s]+")
_ARTICLE = re.compile(r"^(?:a|an|the) ")


class LoadedRegions(NamedTuple):
    """A rank's share of a global region batch, on the host.

    `keys` are those of its N images. `epoch` and `index` place the global batch: `index + 1` is where to resume.
    """

    regions: RegionBatch
    keys: tuple[str, ...]
    epoch: int
    index: int


class Element(NamedTuple):
    """A text, its box, (cx, cy, w, h) in 0..1 of the picture, None for the whole image, and what it says."""

    text: str
    box: tuple[float, float, float, float] | None
    kind: str


class _Seen(NamedTuple):
    """An image as a batch sees it."""

    picture: np.ndarray
    elements: list[Element]
    key: str
    number: int


def plain(text: str) -> str:
    """A text as texts are compared: small letters, no punctuation, no leading article."""
    spaced = _SPACED.sub(" ", _DROPPED.sub("", text.lower())).strip()
    return _ARTICLE.sub("", spaced)


def text_id(text: str) -> int:
    """An integer in [0, 2^63) that is equal for texts equal in plain words."""
    return int.from_bytes(blake2b(plain(text).encode("utf-8", "replace"), digest_size=8).digest(), "big") >> 1


class Form(NamedTuple):
    """What a region batch looks like; see `region_batches`."""

    image_size: int
    grid: tuple[int, int]
    context_length: int
    max_regions: int
    whole_share: float
    crop: bool
    flip: float
    randaugment: tuple[int, float] | None


class _NoRegion(BadSample):
    """An image that has no phrase with a box."""


class _Elements(Maker):
    """Makes region batches."""

    def __init__(self, source: Source, tokenizer: Any, seed: int, form: Form, plan: _Plan) -> None:
        super().__init__(source, seed)
        self.tokenizer, self.form, self.plan = tokenizer, form, plan

    def make(self, epoch: int, index: int, faults: list[Fault]) -> LoadedRegions:
        plan = self.plan
        step = plan.packs * plan.images
        positions = index * step + np.arange(step)
        chosen = self.source.order(epoch, positions, self.seed)
        mine = slice(plan.first * plan.images, (plan.first + plan.local) * plan.images)
        self.look_ahead(epoch, positions[mine], step)
        images: list[_Seen] = []
        for pack in range(plan.first, plan.first + plan.local):
            images += self._pack(epoch, index * plan.packs + pack, pack, chosen, faults)
        elements = [(row, place, e) for row, seen in enumerate(images) for place, e in enumerate(seen.elements)]
        texts = [e.text for _, _, e in elements]
        boxes = torch.tensor([e.box or WHOLE for _, _, e in elements], dtype=torch.float32)
        key = mix(self.seed, epoch, SEED)
        seeds = [mix(key, images[row].number, place) >> 1 for row, place, _ in elements]
        regions = RegionBatch(
            normalise(torch.from_numpy(np.stack([seen.picture for seen in images]))),
            self.tokenizer.encode(texts, self.form.context_length),
            boxes,
            cells(boxes, self.form.grid),
            torch.tensor([row for row, _, _ in elements]),
            torch.tensor([e.box is not None for _, _, e in elements]),
            torch.tensor([text_id(e.kind) for _, _, e in elements]),
            torch.tensor(seeds),
        )
        return LoadedRegions(regions, tuple(seen.key for seen in images), epoch, index)

    def _pack(self, epoch: int, pack: int, place: int, chosen: np.ndarray, faults: list[Fault]) -> list[_Seen]:
        """The images of a pack, with exactly as many elements as it has."""
        images: list[_Seen] = []
        missing = self.plan.pack
        for number in self._candidates(epoch, pack, place, chosen):
            try:
                seen = self._see(epoch, number)
            except _NoRegion as none:
                # The sample may be sound, so that it is not counted among those that are not.
                self.source.skipped.part(f"{none.key} regions", none.cause, none.key)
                continue
            except BadSample as bad:
                faults.append((bad.key, bad.cause, number % len(self.source)))
                continue
            images.append(seen._replace(elements=seen.elements[:missing]))
            missing -= len(images[-1].elements)
            if not missing:
                return images
        raise DataError(
            f"data source '{self.source.name}': {len(images)} usable images found for {self.plan.pack} elements, "
            f"{missing} short; {self.source.skipped.line() or faults[-1:]}"
        )

    def _candidates(self, epoch: int, pack: int, place: int, chosen: np.ndarray) -> Iterator[int]:
        """The images of a pack in the order in which they are tried, none twice."""
        source, images = self.source, self.plan.images
        own = chosen[place * images : (place + 1) * images]
        tried = set(source.identities(own).tolist())
        yield from own.tolist()
        elsewhere = set(source.identities(chosen).tolist())
        for attempt in range(_ATTEMPTS):
            word = mix(self.seed, epoch, pack, STAND_IN, attempt)
            number = source.stand_in(int(own[attempt % images]), word, attempt)
            name = int(source.identities(np.array([number]))[0])
            # A source that a batch all but uses up has few images that no other pack has.
            if name not in tried and (attempt >= _ATTEMPTS // 2 or name not in elsewhere):
                tried.add(name)
                yield number

    def _see(self, epoch: int, number: int) -> _Seen:
        """An image in an epoch, with at least one element."""
        form = self.form
        sample = self.source[number + epoch * len(self.source) if self.source.fresh else number]
        draws = np.random.Generator(np.random.Philox(key=mix(self.seed, epoch, number, REGIONS)))
        whole = bool(draws.random() < form.whole_share and sample.captions)
        caption = sample.captions[mix(self.seed, epoch, number, CAPTION) % len(sample.captions)] if whole else None
        regions = self._usable(sample)
        said = [_said(region, draws.random()) for region in regions]
        order = draws.random(len(regions)).argsort(kind="stable").tolist()
        width, height = as_pil(sample.image).size
        crops = np.random.Generator(np.random.Philox(key=mix(self.seed, epoch, number, CROP)))
        view = choose_view(
            [region.box for region in regions],
            said if caption is None else [*said, caption],
            width,
            height,
            crops,
            crop=form.crop,
            flip=form.flip,
        )
        elements = [Element(caption, None, caption)] if caption is not None else []
        for i in order:
            box = seen_box(regions[i].box, view, width, height)
            if box is not None and len(elements) < form.max_regions:
                elements.append(Element(said[i], box, region_kind(regions[i], said[i])))
        if not elements:
            raise _NoRegion("no region of an image can be used", sample.key)
        picture = resized_crop(sample.image, view.crop, form.image_size)
        picture = picture[:, ::-1] if view.mirrored else picture
        if form.randaugment is not None:
            colours = np.random.Generator(np.random.Philox(key=mix(self.seed, epoch, number, AUGMENT)))
            picture = randaugment(picture, colours, *form.randaugment, geometric=False)
        return _Seen(picture, elements, sample.key, number)

    def _usable(self, sample: Sample) -> list[Region]:
        """The regions of a sample, each once."""
        sound: list[Region] = []
        for place, region in enumerate(sample.regions or ()):
            fault = box_fault(region.box) or ("region without a phrase" if not region.phrase.strip() else None)
            if fault:
                self.source.skipped.part(f"{sample.key} region {place}", fault, sample.key)
            else:
                sound.append(region)
        found: dict[tuple, Region] = {}
        for region in united(sound):
            found.setdefault((plain(region.phrase), region.box), region)
        if not found:
            raise _NoRegion(
                "no region of an image can be used" if sample.regions else "image without a region", sample.key
            )
        return list(found.values())


def region_kind(region: Region, text: str) -> str:
    """What tells apart texts that do not match the same boxes: the kind of thing where the source names it."""
    return (region.attributes or {}).get("kind") or text


def _said(region: Region, draw: float) -> str:
    """One of the phrases that a region may be called by."""
    phrases = (region.attributes or {}).get("phrases") or (region.phrase,)
    return phrases[int(draw * len(phrases))]


class _Plan(NamedTuple):
    """Elements of a pack, positions of a pack, packs of a global batch, and which of them are this rank's."""

    pack: int
    images: int
    packs: int
    first: int
    local: int


def elements_per_image(source: Source, max_regions: int, whole_share: float) -> float:
    """Mean number of elements that an image gives, over the first samples of an order.

    Raises:
        DataError: none of them has a region.
    """
    looked_at = source.order(0, np.arange(min(_PROBED, len(source))), 0).tolist()
    counts = []
    for number in looked_at:
        try:
            counts.append(source.region_count(number))
        except BadSample:
            counts.append(0)
    if not any(counts):
        raise DataError(
            f"data source '{source.name}': none of {len(counts)} samples looked at has a region; "
            "region batches need phrases with boxes"
        )
    return float(np.mean([min(max_regions, count + whole_share) if count else 0 for count in counts]))


def region_batches(
    dataset: Source,
    tokenizer: Any,
    *,
    elements: int,
    image_size: int,
    grid: tuple[int, int],
    context_length: int,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    epoch: int = 0,
    start: int = 0,
    epochs: int | None = None,
    workers: int = 0,
    max_regions: int = 5,
    whole_share: float = 1.0,
    crop: bool = True,
    flip: float = 0.0,
    randaugment: tuple[int, float] | None = None,
    pack: int | None = None,
    pin_memory: bool | None = None,
) -> Loader:
    """This rank's region batches, from a place in an epoch on.

    Args:
        dataset: the source; its samples have regions.
        tokenizer: whose `encode(texts, context_length)` gives (b, T) int64.
        elements: texts in a step of all ranks together.
        image_size: side of the pictures in pixels.
        grid: patches per column and per row.
        context_length: T.
        seed: of order, views, choice of elements and their seeds.
        rank: of this process.
        world: processes that share each global batch.
        epoch: where to begin.
        start: global batches already seen from there; as many as an epoch has end it.
        epochs: the epoch to end before; None goes on for ever.
        workers: processes that make batches ahead; 0 makes each when it is asked for.
        max_regions: elements of an image, at most, its whole-image caption among them.
        whole_share: share of the images whose caption is an element, where they have one, 0..1.
        crop: each view is a crop about a box drawn; otherwise the image is seen whole.
        flip: share of the views that are mirrored where no text says left or right, 0..1.
        randaugment: operations drawn for each picture and their strength, 0..10; None does none. No pixels move.
        pack: elements that are filled together; None for the largest common divisor of a rank's elements and `PACK`.
            Equal packs give equal global batches, whatever the number of ranks.
        pin_memory: page-locked tensors; None where CUDA is.

    Returns:
        An iterator of `LoadedRegions` that goes on over the epochs; every one holds `elements / world` elements.

    Raises:
        DataError: no region in the source, or too few images for a global batch.
        ValueError: the packs of a global batch cannot be shared out evenly, a rank would have none, or a place that is
            not in the epoch.
    """
    if not 0 <= rank < world:
        raise ValueError(f"region batches: rank {rank} of {world}")
    if elements < world:
        raise ValueError(f"region batches: {elements} elements for {world} ranks; each takes at least one")
    if pack is None:
        pack = gcd(elements // world, PACK)
    if pack < 1 or elements % (pack * world):
        raise ValueError(
            f"region batches: {elements} elements are no whole number of packs of {pack} on each of {world} ranks "
            f"(rank {rank})"
        )
    if max_regions < 1 or not 0 <= whole_share <= 1 or not 0 <= flip <= 1:
        raise ValueError(f"region batches: max_regions {max_regions}, whole_share {whole_share}, flip {flip}")
    per_image = elements_per_image(dataset, max_regions, whole_share)
    images, packs = max(1, round(pack / per_image)), elements // pack
    per_epoch = len(dataset) // (images * packs)
    if not per_epoch:
        raise DataError(
            f"data source '{dataset.name}': {len(dataset)} images of {per_image:.1f} elements each do not fill a "
            f"region batch of {elements}"
        )
    if epoch < 0 or start < 0:
        raise ValueError(f"region batches: no batch {start} in epoch {epoch}")
    epoch, start = epoch + start // per_epoch, start % per_epoch
    local = packs // world
    form = Form(image_size, tuple(grid), context_length, max_regions, whole_share, crop, flip, randaugment)
    maker = _Elements(dataset, tokenizer, seed, form, _Plan(pack, images, packs, rank * local, local))
    return Loader(maker, Tickets(epoch, start, per_epoch, epochs), workers, pin_memory)
