"""Views of images and where boxes lie in them: against masks of pixels, and at every border."""

import numpy as np
import pytest

from sycoca.images import resized_crop
from train.data.box_augment import View, choose_view, crop_around, seen_box, speaks_of_sides

SIZE = 64


def draws(*numbers):
    """A source of given numbers, then of random ones."""

    class Given:
        def __init__(self):
            self.left, self.rng = list(numbers), np.random.default_rng(0)

        def random(self):
            return self.left.pop(0) if self.left else self.rng.random()

    return Given()


def painted(width, height, pixels):
    """An image, black but for a white rectangle, and the rectangle as shares."""
    left, top, right, bottom = pixels
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[top:bottom, left:right] = 255
    return image, (left / width, top / height, right / width, bottom / height)


@pytest.mark.parametrize("seed", range(60))
def test_a_box_goes_where_its_pixels_go(seed):
    rng = np.random.default_rng(seed)
    width, height = rng.integers(30, 200, 2).tolist()
    left, top = int(rng.integers(0, width - 8)), int(rng.integers(0, height - 8))
    right, bottom = int(rng.integers(left + 8, width + 1)), int(rng.integers(top + 8, height + 1))
    image, box = painted(width, height, (left, top, right, bottom))
    other = tuple(np.sort(rng.random((2, 2)), axis=0).ravel())
    view = choose_view([box if seed % 2 else other], ["a thing"], width, height, rng, crop=True, flip=0.5)
    x, y, w, h = view.crop
    assert x >= 0 and y >= 0 and w >= 1 and h >= 1 and x + w <= width and y + h <= height
    mask = image[y : y + h, x : x + w, 0] > 0
    found = seen_box(box, view, width, height)
    kept = mask.sum() / ((right - left) * (bottom - top))
    if found is None:
        assert kept < 0.5 and seed % 2 == 0
        return
    assert kept >= 0.5 and (kept == 1 or seed % 2 == 0)
    picture = resized_crop(image, view.crop, SIZE)
    picture = picture[:, ::-1] if view.mirrored else picture
    rows, cols = (np.flatnonzero((picture[..., 0] > 127).any(axis)) for axis in (1, 0))
    corners = np.array([cols[0], rows[0], cols[-1] + 1, rows[-1] + 1]) / SIZE
    cx, cy, bw, bh = found
    exact = np.array([cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2])
    # An edge between two pixels of the picture shows as one or the other; bicubic ringing moves it no further.
    assert np.abs(corners - exact).max() <= 1.01 / SIZE


def test_every_crop_holds_its_box_and_reaches_every_border():
    rng = np.random.default_rng(0)
    box, width, height = (0.3, 0.25, 0.7, 0.5), 10, 8
    crops = {crop_around(box, width, height, rng) for _ in range(4000)}
    assert {c[0] for c in crops} == {0, 1, 2, 3} and {c[0] + c[2] for c in crops} == {7, 8, 9, 10}
    assert {c[1] for c in crops} == {0, 1, 2} and {c[1] + c[3] for c in crops} == {4, 5, 6, 7, 8}


@pytest.mark.parametrize(
    "box", [(0, 0, 1, 1), (0, 0, 1e-6, 1e-6), (1 - 1e-6, 1 - 1e-6, 1, 1), (0.5, 0.5, 0.5001, 0.5001)]
)
@pytest.mark.parametrize("side", [1, 2, 33])
def test_crops_stay_in_the_image_whatever_the_box(box, side):
    rng = np.random.default_rng(1)
    for _ in range(50):
        left, top, w, h = crop_around(box, side, side, rng)
        assert left >= 0 and left + w <= side and top >= 0 and top + h <= side and w >= 1 and h >= 1
        found = seen_box(box, View((left, top, w, h)), side, side)
        assert found is not None and all(0 <= value <= 1 for value in found) and min(found[2:]) > 0


def test_a_box_mostly_outside_is_dropped_and_half_of_one_is_clipped():
    view = View((50, 0, 50, 100))
    assert seen_box((0.0, 0.0, 0.99, 1.0), view, 100, 100) is None
    assert seen_box((0.25, 0.2, 0.75, 0.6), view, 100, 100) == pytest.approx((0.25, 0.4, 0.5, 0.4))
    assert seen_box((0.0, 0.0, 0.4, 1.0), view, 100, 100) is None
    assert seen_box((0.0, 0.0, 0.5, 1.0), view, 100, 100, least=0.0) is None


def test_mirroring_twice_is_none_and_once_keeps_height_and_size():
    box, crop = (0.1, 0.2, 0.4, 0.9), (0, 0, 30, 20)
    plain, mirrored = seen_box(box, View(crop), 30, 20), seen_box(box, View(crop, True), 30, 20)
    assert mirrored == pytest.approx((1 - plain[0], *plain[1:]))
    cx, cy, w, h = mirrored
    again = seen_box((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), View(crop, True), 30, 20)
    assert again == pytest.approx(plain)


@pytest.mark.parametrize("text", ["the LEFT dog", "a left-handed man", "rightmost cup", "on the right.", "leftward"])
def test_texts_that_speak_of_sides_are_not_mirrored(text):
    assert speaks_of_sides([text])
    box = [(0.2, 0.2, 0.4, 0.4)]
    assert not choose_view(box, ["a dog", text], 9, 9, draws(), crop=True, flip=1.0).mirrored
    assert choose_view(box, ["a bright cleft"], 9, 9, draws(), crop=True, flip=1.0).mirrored


def test_a_view_takes_the_same_draws_whatever_it_decides():
    box = [(0.2, 0.2, 0.4, 0.4), (0.5, 0.5, 0.9, 0.9)]
    for texts, crop, flip in ((["left"], True, 1.0), (["a dog"], False, 0.0)):
        rng = np.random.default_rng(5)
        choose_view(box, texts, 40, 30, rng, crop=crop, flip=flip)
        expected = np.random.default_rng(5)
        expected.random(6)
        assert rng.random() == expected.random()
    assert choose_view(box, [], 40, 30, draws(0.9), crop=False, flip=0.0) == View((0, 0, 40, 30), False)
