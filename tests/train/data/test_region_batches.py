"""Region batches: exactly as many elements as asked for, no false negatives, the same for any workers and ranks."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from sycoca.images import normalise
from sycoca.regions import cells, to_corners
from sycoca.tokenizer import Tokenizer
from train.data import DataError, open_dataset
from train.data.region_batches import region_batches, text_id
from train.data.regions import asked_of, united
from train.data.sample import BadSample, Region, Sample, Skipped, Source

SIZE, GRID = 24, (3, 3)
WORDS = "one two three four five six seven eight nine ten the box of image caption left"
TOKENIZER = Tokenizer.train([WORDS], 320)
FORM = {"image_size": SIZE, "grid": GRID, "context_length": 12}


class Boxes(Source):
    """Noise with as many boxes as `counts` says, image by image; a negative count is an unreadable image."""

    def __init__(self, counts, captions=1, faulty=()):
        self.name, self.split, self.skipped = "boxes", "train", Skipped()
        self.counts, self.captions, self.faulty = counts, captions, dict(faulty)

    def __len__(self):
        return len(self.counts)

    def __getitem__(self, index):
        if self.counts[index] < 0:
            raise BadSample("unreadable image", f"b{index}")
        rng = np.random.default_rng(index)
        corners = np.sort(rng.integers(0, 40, (self.counts[index], 2, 2)), axis=1) + [[0, 0], [1, 1]]
        regions = [Region(f"box {i} of {index}", tuple((c / 41).ravel().tolist()), -1) for i, c in enumerate(corners)]
        regions += [Region("broken", box, -1) for box in self.faulty.get(index, ())]
        pixels = rng.integers(0, 256, (41, 41, 3), dtype=np.uint8)
        return Sample(
            pixels, tuple(f"caption {i} of {index}" for i in range(self.captions)), f"b{index}", tuple(regions)
        )


def take(count, source, **options):
    loader = region_batches(source, TOKENIZER, **{"elements": 32, "seed": 1, **FORM, **options})
    made = list(itertools.islice(loader, count))
    loader.close()
    return made


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.regions, b.regions)) and a[1:] == b[1:]


MIXED = [3, 1, 7, 0, 4, 2, -1, 5] * 12


def test_a_batch_has_the_promised_form():
    for regions, keys, *_ in take(6, Boxes(MIXED)):
        assert regions.images.shape == (len(keys), 3, SIZE, SIZE) and regions.images.dtype == torch.float32
        assert regions.tokens.shape == (32, 12) and regions.boxes.shape == regions.rects.shape == (32, 4)
        assert regions.boxes.dtype == torch.float32 and regions.rects.dtype == torch.int32
        assert torch.equal(regions.rects, cells(regions.boxes, GRID))
        assert regions.has_box.dtype == torch.bool and regions.has_box.any() and not regions.has_box.all()
        assert (regions.boxes[~regions.has_box] == torch.tensor([0.5, 0.5, 1.0, 1.0])).all()
        assert regions.seeds.dtype == regions.ids.dtype == regions.image_index.dtype == torch.int64
        assert (regions.seeds >= 0).all() and (regions.ids >= 0).all() and len(set(regions.seeds.tolist())) == 32


def test_every_image_is_used_and_none_twice():
    for batch in take(8, Boxes(MIXED)):
        index = batch.regions.image_index.tolist()
        assert index == sorted(index) and set(index) == set(range(len(batch.keys)))
        assert len(set(batch.keys)) == len(batch.keys)
        for row, text in zip(index, TOKENIZER.decode(batch.regions.tokens)):
            assert text.split()[-1] == batch.keys[row][1:]


def test_the_caption_comes_first_and_no_element_twice():
    for batch in take(8, Boxes(MIXED), max_regions=4):
        for row in range(len(batch.keys)):
            mine = batch.regions.image_index == row
            assert mine.sum() <= 4 and not batch.regions.has_box[mine][0] and batch.regions.has_box[mine][1:].all()
        assert len(set(batch.regions.ids.tolist())) == 32


def test_the_share_of_whole_captions():
    assert all(b.regions.has_box.all() for b in take(4, Boxes(MIXED), whole_share=0.0))
    assert all(b.regions.has_box.all() for b in take(4, Boxes(MIXED, captions=0)))
    some = [len(b.keys) - int((~b.regions.has_box).sum()) for b in take(12, Boxes(MIXED), whole_share=0.5)]
    images = sum(len(b.keys) for b in take(12, Boxes(MIXED), whole_share=0.5))
    assert 0.3 < sum(some) / images < 0.7


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    source = Boxes(MIXED)
    assert all(map(same, take(6, source), take(6, source, workers=workers)))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_each_global_batch(world):
    source = Boxes(MIXED)
    whole = take(4, source, elements=64)
    parts = [take(4, source, elements=64, rank=rank, world=world) for rank in range(world)]
    for batch, shares in zip(whole, zip(*parts)):
        for name in ("images", "tokens", "boxes", "rects", "has_box", "ids", "seeds"):
            joined = torch.cat([getattr(share.regions, name) for share in shares])
            assert torch.equal(getattr(batch.regions, name), joined), name
        starts = np.cumsum([0, *(len(share.keys) for share in shares)])
        places = [share.regions.image_index + int(start) for share, start in zip(shares, starts)]
        assert torch.equal(batch.regions.image_index, torch.cat(places))
        assert batch.keys == sum((share.keys for share in shares), ())
        assert all(len(share.regions.ids) == 64 // world for share in shares)


def test_any_share_can_be_taken():
    source = Boxes(MIXED)
    assert [len(take(1, source, elements=24 * world, world=world)[0].regions.ids) for world in (1, 2, 3)] == [24] * 3
    whole, first = take(1, source, elements=48, pack=8)[0], take(1, source, elements=48, world=2)[0]
    assert torch.equal(whole.regions.boxes[:24], first.regions.boxes)


@pytest.mark.parametrize("crop", [True, False])
def test_an_image_whose_boxes_vanish_in_the_view_is_in_no_batch(crop):
    """Boxes that lie in the slack around the image for the most part."""
    slack = {number: [(-0.0009, 0.1, 0.0005, 0.5)] for number in range(0, 96, 2)}
    counts = [0 if number in slack else 3 for number in range(96)]
    for batch in take(6, Boxes(counts, captions=0, faulty=slack), crop=crop):
        assert set(batch.regions.image_index.tolist()) == set(range(len(batch.keys)))
        assert all(int(key[1:]) % 2 for key in batch.keys)


@pytest.mark.parametrize(("elements", "world"), [(0, 1), (-4, 1), (3, 4)])
def test_every_rank_has_an_element(elements, world):
    with pytest.raises(ValueError, match=f"{elements} elements for {world} ranks; each takes at least one"):
        take(1, Boxes(MIXED), elements=elements, world=world)


def test_any_place_can_be_resumed_from():
    source = Boxes(MIXED[:48])
    whole = take(9, source)
    assert len({batch.epoch for batch in whole}) > 1
    for done in (1, 4, 6):
        last = whole[done - 1]
        assert all(map(same, whole[done:], take(9 - done, source, epoch=last.epoch, start=last.index + 1)))
        assert all(map(same, whole[done:], take(9 - done, source, start=done)))


def test_equal_phrases_have_equal_ids_wherever_they_are():
    assert text_id("A red, round  ball!") == text_id("the red round ball") == text_id("red-round ball")
    assert text_id("a red ball") != text_id("a red bell") and 0 <= text_id("") < 2**63

    class Alike(Boxes):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            told = [(f"{'a' if i % 2 else 'the'} box of {WORDS.split()[(index + i) % 5]}", i) for i in range(4)]
            kinds = [{"kind": "image"} if i == 3 else None for _, i in told]
            regions = (Region(t, r.box, -1, k) for (t, _), r, k in zip(told, sample.regions, kinds))
            return sample._replace(regions=tuple(regions), captions=())

    (batch,) = take(1, Alike([4] * 40), elements=64)
    texts = [text.removeprefix("a ").removeprefix("the ") for text in TOKENIZER.decode(batch.regions.tokens)]
    kinds = batch.regions.ids == text_id("image")
    assert 8 < kinds.sum() < 24 and len(set(texts)) == 5
    for i, j in itertools.combinations((~kinds).nonzero().flatten().tolist(), 2):
        assert (texts[i] == texts[j]) == (batch.regions.ids[i] == batch.regions.ids[j]).item()


def test_boxes_of_scenes_hold_what_the_phrase_says():
    """The mean colour about the centre of a box is nearer to the named colour than to any other."""
    from train.data.scene_shapes import COLOURS

    source = open_dataset("scenes", image_size=96)
    tokenizer = Tokenizer.train(source.texts(300), 700)
    (batch,) = itertools.islice(
        region_batches(source, tokenizer, elements=128, image_size=96, grid=(12, 12), context_length=28, flip=0.5), 1
    )
    names, palette = list(COLOURS), torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    black = normalise(torch.zeros(1, 1, 3, dtype=torch.uint8))[:, 0, 0]
    white = normalise(torch.full((1, 1, 3), 255, dtype=torch.uint8))[:, 0, 0]
    right = []
    for e in batch.regions.has_box.nonzero().flatten().tolist():
        said = next((n for n in names if n in tokenizer.decode(batch.regions.tokens[[e]])[0].split()), None)
        cx, cy, w, h = (batch.regions.boxes[e] * 96).tolist()
        rows, cols = (slice(int(c - s / 5), int(c + s / 5) + 1) for c, s in ((cy, h), (cx, w)))
        patch = batch.regions.images[batch.regions.image_index[e], :, rows, cols].flatten(1).median(1).values
        rgb = (patch - black) / (white - black) * 255
        right.append(names[int((palette - rgb).norm(dim=1).argmin())] == said)
    assert len(right) > 80 and np.mean(right) > 0.8


def test_what_cannot_be_used_is_counted_once():
    faulty = {
        0: [(0.5, 0.5, 0.5, 0.9)],
        1: [(0.9, 0.1, 0.2, 0.5)],
        2: [(0.2, 0.2, 1.4, 0.5)],
        3: [(0.1, 0.1, 0.1, 0.2)],
    }
    source = Boxes([3, 3, 3, 0, -1, 0, 4, 4, 4, 4, 4, 4], faulty=faulty.items())
    loader = region_batches(source, TOKENIZER, elements=8, whole_share=1.0, **FORM)
    for batch in itertools.islice(loader, 30):
        assert torch.isfinite(batch.regions.boxes).all() and (batch.regions.boxes[:, 2:] > 0).all()
    assert set(loader.skipped.samples.values()) == {"unreadable image"}
    assert loader.skipped.counts() == {
        "unreadable image": 1,
        "no region of an image can be used": 1,
        "image without a region": 1,
        "box of a region has no area": 2,
        "box of a region has swapped corners": 1,
        "box of a region is outside its image": 1,
    }


def test_a_phrase_that_is_listed_twice_is_one_element():
    class Twice(Boxes):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return sample._replace(regions=sample.regions * 3)

    for batch in take(3, Twice([3] * 40), max_regions=9):
        assert max(Counter(batch.regions.image_index.tolist()).values()) <= 4


def test_a_phrase_of_several_boxes_has_the_box_about_them():
    """Where its caption names them together; regions of no caption are apart."""
    boxes = (0.1, 0.2, 0.3, 0.4), (0.5, 0.1, 0.6, 0.3), (0.2, 0.5, 0.25, 0.9)
    whole = (0.1, 0.1, 0.6, 0.9)
    several = [Region(phrase, box, 0) for phrase, box in zip(("two dogs", "Two dogs", "two dogs "), boxes)]
    other = Region("two dogs", (0.0, 0.0, 1.0, 0.5), 1)
    apart = [Region("two dogs", box, -1) for box in boxes]
    assert [r.box for r in united([several[0], other, *several[1:]])] == [whole, other.box]
    assert united(apart) == apart and united([]) == []
    broken = Region("two dogs", (0.0, 0.7, 0.0, 0.9), 0)
    assert [(phrase, region.box) for phrase, region in asked_of([*several, broken])] == [("two dogs", whole)]

    class Named(Boxes):
        def __getitem__(self, index):
            return super().__getitem__(index)._replace(regions=(*several, broken))

    batch = take(1, Named([1] * 40), whole_share=0.0, crop=False)[0]
    assert len(batch.keys) == 32 and to_corners(batch.regions.boxes).numpy() == pytest.approx(np.array([whole] * 32))


def test_a_region_may_be_called_by_several_phrases():
    class Called(Boxes):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            said = {"phrases": ("one", "two", "three")}
            return sample._replace(regions=tuple(r._replace(attributes=said) for r in sample.regions), captions=())

    said = Counter(t for b in take(4, Called([4] * 60)) for t in TOKENIZER.decode(b.regions.tokens))
    assert set(said) == {"one", "two", "three"} and min(said.values()) > 15


def test_sources_that_cannot_fill_a_batch_are_refused_in_one_line():
    with pytest.raises(DataError, match="none of 5 samples looked at has a region"):
        take(1, Boxes([0] * 5))
    with pytest.raises(DataError, match=r"4 images of 4\.0 elements each do not fill a region batch of 64"):
        take(1, Boxes([3] * 4), elements=64)
    with pytest.raises(ValueError, match="no whole number of packs"):
        take(1, Boxes(MIXED), elements=32, world=4, pack=16)
    with pytest.raises(DataError, match="1 usable images found for 8 elements, 4 short"):
        broken = {i: [(0.5, 0.5, 0.5, 0.9)] * 3 for i in range(9) if i != 4}
        take(1, Boxes([0, 0, 0, 0, 3, 0, 0, 0, 0], faulty=broken), elements=8, pack=8, crop=False)


def test_the_last_images_of_a_small_source_still_fill_a_batch():
    source = Boxes([5, 1, 1, 5, 5, 1])
    for batch in take(20, source, elements=16, pack=8):
        assert len(batch.regions.ids) == 16


@pytest.mark.parametrize("spec", ["scenes", "scenes=0.5,scenes?seed=3=0.5"])
def test_built_in_sources(spec):
    source = open_dataset(spec, image_size=SIZE)
    first, again = (take(2, source, elements=64, crop=crop) for crop in (False, False))
    assert all(map(same, first, again))
    assert all(3 <= 64 / len(batch.keys) <= 5 for batch in first)
