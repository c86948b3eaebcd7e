"""RandAugment: every operation against its formula in numpy, and draws that depend on the sample alone."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.train.data.test_region_batches import FORM, MIXED, TOKENIZER, Boxes
from tests.train.data.test_region_batches import take as take_regions
from train.data.loader import batches
from train.data.randaugment import COLOURS, PLACES, randaugment

RNG = np.random.default_rng(0)
# Smooth, so that a hair's breadth of a pixel makes no difference, and neither black nor white anywhere.
ROWS, COLS = np.mgrid[0:48, 0:64]
SMOOTH = np.stack([40 + 2 * COLS, 60 + 3 * ROWS, 90 + COLS + ROWS], axis=-1).astype(np.uint8)
NOISE = RNG.integers(30, 200, (48, 64, 3), dtype=np.uint8)


def done(name, picture, s):
    return np.array((COLOURS | PLACES)[name](Image.fromarray(picture), s)).astype(int)


def near(found, expected, off=1):
    return np.abs(found - np.clip(expected, 0, 255)).max() <= off


def test_blends():
    for s in (0.0, 0.7, 1.0):
        factor = 0.1 + 1.8 * s
        for sign in (1, -1):
            assert near(done("brightness", NOISE, sign * s), factor * NOISE)
            x = NOISE.astype(float)
            around = sum(np.roll(x, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1))
            smooth = np.round((around + 4 * x) / 13)
            inner = (slice(1, -1), slice(1, -1))
            assert near(done("sharpness", NOISE, sign * s)[inner], (smooth + factor * (x - smooth))[inner], 2)
    assert np.array_equal(done("identity", NOISE, 0.7), NOISE)


def test_channels_are_stretched_each_by_itself():
    low, high = NOISE.min((0, 1)).astype(float), NOISE.max((0, 1))
    assert near(done("autocontrast", NOISE, 0.7), (NOISE - low) * 255 / (high - low))
    flat = np.full((8, 8, 3), 77, dtype=np.uint8)
    assert np.array_equal(done("autocontrast", flat, 0.7), flat) and np.array_equal(done("equalise", flat, 1), flat)
    found = done("equalise", NOISE, 0.7)
    for channel in range(3):
        values = NOISE[..., channel]
        counts = np.bincount(values.ravel(), minlength=256)
        step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        table = np.minimum((step // 2 + np.cumsum(counts) - counts) // step, 255)
        assert np.array_equal(found[..., channel], table[values])


def moved(picture, matrix):
    """Bilinear, from centre to centre; NaN where nothing of the picture is, and within a pixel of its border."""
    a, b, c, d, e, f = matrix
    x = a * (COLS + 0.5) + b * (ROWS + 0.5) + c - 0.5
    y = d * (COLS + 0.5) + e * (ROWS + 0.5) + f - 0.5
    height, width = picture.shape[:2]
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    inside = (left >= 0) & (top >= 0) & (left < width - 1) & (top < height - 1)
    left, top = left.clip(0, width - 2), top.clip(0, height - 2)
    u, v = (x - left)[..., None], (y - top)[..., None]
    value = (picture[top, left] * (1 - u) + picture[top, left + 1] * u) * (1 - v)
    value = value + (picture[top + 1, left] * (1 - u) + picture[top + 1, left + 1] * u) * v
    far = (x < -1) | (y < -1) | (x > width) | (y > height)
    return value, inside, far


@pytest.mark.parametrize("s", [0.7, -0.7, 1.0])
def test_pixels_move_by_the_formula(s):
    angle = -math.radians(30 * s)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = 32, 24
    turn = (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)
    matrices = {
        "shear_x": (1, 0.3 * s, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * s, 1, 0),
        "translate_x": (1, 0, s * 64 * 10 / 224, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, s * 48 * 10 / 224),
        "rotate": turn,
    }
    assert matrices.keys() == PLACES.keys()
    for name, matrix in matrices.items():
        found = done(name, SMOOTH, s)
        value, inside, far = moved(SMOOTH.astype(float), matrix)
        assert inside.mean() > 0.5 and near(found[inside], value[inside]), name
        assert (found[far] == 128).all(), name


def test_the_published_strength_moves_seven_pixels_of_224():
    picture = RNG.integers(0, 256, (224, 224, 3), dtype=np.uint8)
    found = done("translate_x", picture, 0.7)
    assert np.array_equal(found[:, :-7], picture[:, 7:]) and (found[:, -7:] == 128).all()


def drawn(*numbers):
    given = iter(numbers)
    return type("Draws", (), {"random": lambda self: next(given)})()


def test_operations_follow_the_draws():
    operations = [*COLOURS, *PLACES]
    for place, name in enumerate(operations):
        which = (place + 0.5) / len(operations)
        assert np.array_equal(randaugment(NOISE, drawn(which, 0.4, 0.9), 1, 7), done(name, NOISE, 0.7))
        assert np.array_equal(randaugment(NOISE, drawn(which, 0.4, 0.1), 1, 7), done(name, NOISE, -0.7))
        assert randaugment(NOISE, drawn(which, 0.5, 0.1), 1, 7) is NOISE
    two = randaugment(NOISE, drawn(0.35, 0.1, 0.9, 0.99, 0.1, 0.9), 2, 7)
    assert np.array_equal(two, done("rotate", done("brightness", NOISE, 0.7).astype(np.uint8), 0.7))
    mirrored = NOISE[:, ::-1]
    assert np.array_equal(randaugment(mirrored, drawn(0.35, 0.1, 0.9), 1, 7), done("brightness", mirrored.copy(), 0.7))


def test_without_geometry_nothing_moves():
    """Two flat halves stay where they are; half of the operations are done."""
    halves = np.full((16, 16, 3), 60, dtype=np.uint8)
    halves[:, 8:] = (200, 120, 90)
    draws, untouched = np.random.default_rng(0), 0
    for _ in range(300):
        found = randaugment(halves, draws, 2, 10, geometric=False)
        untouched += found is halves
        assert (found[2:-2, 2:6] == found[8, 3]).all() and (found[2:-2, 10:-2] == found[8, 12]).all()
    assert 0.17 < untouched / 300 < 0.33


def take(count, **options):
    form = {name: FORM[name] for name in ("image_size", "context_length")}
    loader = batches(Boxes([1] * 64), TOKENIZER, global_batch=8, seed=1, crop_scale=None, **form, **options)
    made = [next(loader) for _ in range(count)]
    loader.close()
    return made


def test_batches_depend_on_the_sample_alone():
    plain, augmented = take(4), take(4, randaugment=(2, 7))
    changed = torch.stack([(a.images != b.images).flatten(1).any(1) for a, b in zip(plain, augmented)])
    assert 0.4 < changed.float().mean() < 0.95
    assert all(torch.equal(a.tokens, b.tokens) and a.keys == b.keys for a, b in zip(plain, augmented))
    for again in (take(4, randaugment=(2, 7), workers=2), take(4, randaugment=(2, 7))):
        assert all(torch.equal(a.images, b.images) for a, b in zip(augmented, again))
    (resumed,) = take(1, randaugment=(2, 7), start=3)
    assert torch.equal(resumed.images, augmented[3].images)
    halves = [take(4, randaugment=(2, 7), rank=rank, world=2) for rank in range(2)]
    assert all(torch.equal(whole.images, torch.cat([a.images, b.images])) for whole, a, b in zip(augmented, *halves))
    with pytest.raises(ValueError, match="boxes do not follow augmentation"):
        take(1, randaugment=(2, 7), described_in=8)


def test_region_batches_keep_their_boxes():
    options = {"crop": True, "flip": 0.5}
    plain = take_regions(4, Boxes(MIXED), **options)
    augmented = take_regions(4, Boxes(MIXED), **options, randaugment=(2, 7))
    changed = torch.cat([(a.regions.images != b.regions.images).flatten(1).any(1) for a, b in zip(plain, augmented)])
    assert 0.3 < changed.float().mean() < 0.95
    for a, b in zip(plain, augmented):
        assert all(torch.equal(x, y) for x, y in zip(a.regions[1:], b.regions[1:]))
