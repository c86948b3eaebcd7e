"""Images: bounded decoding, colour modes, torchvision's crops and roundings, normalisation."""

import contextlib
import io
import math
import resource
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from sycoca.images import (
    IMAGE_MEAN,
    IMAGE_STD,
    ImageError,
    center_image,
    crop_box,
    decode,
    denormalise,
    eval_transform,
    normalise,
    random_crop_box,
    random_image,
)


def ramp(height, width):
    """A picture whose every corner and channel differs."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=-1).astype(np.uint8)


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_header(width, height):
    """A PNG that claims a size and holds nothing."""
    return png(width, height, b"")


def png(width, height, rows, bits=8, kind=2):
    """A PNG of the given bits per channel and colour type."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_decode_takes_paths_bytes_and_files(tmp_path):
    picture = ramp(20, 30)
    data = encoded(Image.fromarray(picture))
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png", str(tmp_path / "a.png"), io.BytesIO(data), bytearray(data)):
        image = decode(source)
        assert image.mode == "RGB"
        assert np.array_equal(np.array(image), picture)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    picture = ramp(24, 40)
    # What a camera stores so that the viewer's rule gives the picture back.
    stored = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, 1),
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
        8: lambda p: np.rot90(p, -1),
    }[orientation](picture)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif))
    assert np.array_equal(np.array(image), picture)


def test_broken_exif_costs_nothing():
    picture = Image.fromarray(ramp(16, 16))
    image = decode(encoded(picture, "JPEG", quality=95, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f"))
    assert image.size == (16, 16)


def test_cmyk_keeps_its_colours():
    picture = Image.new("RGB", (16, 16), (200, 40, 90))
    image = decode(encoded(picture.convert("CMYK"), "JPEG", quality=100))
    assert np.abs(np.array(image).astype(int) - (200, 40, 90)).max() <= 3


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    image = np.array(decode(encoded(Image.fromarray(values))))
    assert np.abs(image[..., 0].astype(float) - values / 257).max() <= 1
    assert (image[..., 0] == image[..., 2]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_white(mode):
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, :4] = (120, 120, 120, 255)
    # Hidden colours under full transparency must not appear.
    pixels[:, 4:] = (9, 9, 9, 0)
    image = Image.fromarray(pixels)
    if mode == "LA":
        image = image.convert("LA")
    if mode == "P":
        flat = np.where(pixels[..., 3] > 0, 0, 1).astype(np.uint8)
        image = Image.fromarray(flat, "P")
        image.putpalette([120, 120, 120, 9, 9, 9])
        image.info["transparency"] = 1
    shown = np.array(decode(encoded(image)))
    assert (shown[:, :4] == 120).all()
    assert (shown[:, 4:] == 255).all()


def test_half_transparency_is_mixed():
    image = Image.new("RGBA", (4, 4), (55, 55, 55, 128))
    assert np.abs(np.array(decode(encoded(image))).astype(int) - 155).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "I;16B", "I", "F"])
def test_other_modes_become_rgb(mode):
    grey = Image.fromarray(ramp(16, 16)).convert("L")
    image = grey.convert("I").convert("I;16").convert("I").convert("F") if mode == "F" else grey
    if mode in ("I", "I;16B"):
        image = Image.fromarray(np.array(grey).astype(np.int32 if mode == "I" else ">u2") * 257)
    elif mode != "F":
        image = grey.convert(mode)
    form = "JPEG" if mode == "YCbCr" else "TIFF"
    shown = np.array(decode(encoded(image, form)).convert("L")).astype(int)
    if mode == "1":
        assert set(np.unique(shown)) == {0, 255}
    else:
        assert np.abs(shown - np.array(grey).astype(int)).max() <= 3


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(form):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    assert np.abs(np.array(decode(data))[0, 0].astype(int) - (255, 0, 0)).max() <= 1


@pytest.mark.parametrize(
    "kind, pixel, expected",
    [
        (0, (32896,), (128, 128, 128)),
        (2, (0, 32896, 65535), (0, 128, 255)),
        (4, (0, 0), (255, 255, 255)),
        (6, (0, 32896, 65535, 65535), (0, 128, 255)),
        (6, (0, 32896, 65535, 0), (255, 255, 255)),
    ],
    ids=["grey", "RGB", "grey, transparent", "RGBA", "RGBA, transparent"],
)
def test_sixteen_bits_of_every_kind(kind, pixel, expected):
    rows = b"".join(b"\0" + np.array([pixel] * 4, dtype=">u2").tobytes() for _ in range(4))
    shown = np.array(decode(png(4, 4, rows, bits=16, kind=kind)))
    assert np.abs(shown[0, 0].astype(int) - expected).max() <= 1


def test_one_pixel_is_a_picture():
    dot = decode(encoded(Image.new("RGB", (1, 1), (10, 200, 30))))
    assert (center_image(dot, 32) == (10, 200, 30)).all()
    assert (random_image(dot, 32, np.random.default_rng(0)) == (10, 200, 30)).all()
    assert eval_transform(dot, 32).shape == (3, 32, 32)


@pytest.mark.parametrize("size", [(8001, 8001), (13_000, 14_000), (30_000, 30_000), (60_000, 60_000)])
def test_size_is_judged_by_the_header(size):
    # Above this limit, above Pillow's warning, above Pillow's error.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="image too large"):
            decode(png_header(*size))


def test_a_bomb_takes_no_memory():
    bomb = encoded(Image.new("L", (12_000, 12_000)), optimize=True)
    assert len(bomb) < 200_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match="image too large"):
        decode(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 1024


def test_max_pixels_is_the_largest_area():
    data = encoded(Image.new("RGB", (10, 10)))
    assert decode(data, max_pixels=100).size == (10, 10)
    with pytest.raises(ImageError) as caught:
        decode(data, max_pixels=99)
    assert caught.value.cause == "image too large"


PICTURE = encoded(Image.fromarray(ramp(64, 64)), "JPEG")
DAMAGED = {
    "nothing": b"",
    "words": b"this is not an image",
    "half a JPEG": PICTURE[: len(PICTURE) // 2],
    "a JPEG's head": PICTURE[:20],
    "an empty PNG": png_header(8, 8),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_damage_has_one_name(data):
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert caught.value.cause == "unreadable image"


def test_any_flipped_bytes_decode_or_are_called_unreadable():
    draws = np.random.default_rng(0)
    data = np.frombuffer(encoded(Image.fromarray(ramp(32, 32))), dtype=np.uint8)
    for _ in range(200):
        broken = data.copy()
        broken[draws.integers(0, data.size, 4)] ^= draws.integers(1, 256, 4).astype(np.uint8)
        with contextlib.suppress(ImageError):
            assert decode(broken.tobytes()).mode == "RGB"


def test_missing_and_folder(tmp_path):
    with pytest.raises(ImageError, match="missing image"):
        decode(tmp_path / "none.jpg")
    with pytest.raises(ImageError, match="unreadable image"):
        decode(tmp_path)


# Landscape, portrait, square, one pixel off, upscaled, a strip.
@pytest.mark.parametrize("shape", [(480, 640), (640, 480), (300, 300), (225, 224), (40, 61), (10, 900)])
def test_center_image_follows_torchvision(shape):
    size, picture = 224, ramp(*shape)
    height, width = shape
    # torchvision's rule, written out: truncate the longer side, round the corner half to even.
    if width <= height:
        new_width, new_height = size, int(size * height / width)
    else:
        new_width, new_height = int(size * width / height), size
    resized = np.array(Image.fromarray(picture).resize((new_width, new_height), Image.Resampling.BICUBIC))
    top, left = int(round((new_height - size) / 2.0)), int(round((new_width - size) / 2.0))  # noqa: RUF046
    expected = resized[top : top + size, left : left + size]
    assert np.array_equal(center_image(Image.fromarray(picture), size), expected)
    assert np.array_equal(center_image(picture, size), expected)


@pytest.mark.parametrize("long", ["width", "height"])
def test_a_strip_takes_little_memory(long):
    # By torchvision's rule 224 x 13,440,000 pixels, to be cut away.
    strip = np.zeros((60_000, 1, 3), dtype=np.uint8)
    strip[30_000] = (10, 200, 30)
    strip = strip if long == "height" else strip.transpose(1, 0, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (center_image(np.ascontiguousarray(strip), 224) == (10, 200, 30)).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


def test_longer_side_is_truncated():
    # 640 * 224 / 480 = 298.67: rounding up would move every pixel.
    resized = Image.fromarray(ramp(480, 640)).resize((298, 224), Image.Resampling.BICUBIC)
    assert np.array_equal(center_image(ramp(480, 640), 224), np.array(resized)[:, 37:261])


def test_transforms_agree_with_torchvision():
    transforms = pytest.importorskip("torchvision.transforms")
    bicubic = transforms.InterpolationMode.BICUBIC
    for shape in ((480, 640), (333, 500), (225, 224)):
        image = Image.fromarray(ramp(*shape))
        theirs = transforms.CenterCrop(224)(transforms.Resize(224, bicubic)(image))
        assert np.abs(np.array(theirs).astype(int) - center_image(image, 224)).max() <= 1


def test_boxes_follow_the_centre_crop():
    picture = np.zeros((100, 200, 3), dtype=np.uint8)
    picture[20:40, 80:120] = 255
    box = crop_box((0.4, 0.2, 0.6, 0.4), picture)
    assert box == pytest.approx((0.3, 0.2, 0.7, 0.4))
    shown = center_image(picture, 50)[..., 0] > 127
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    assert (columns[0] / 50, rows[0] / 50, (columns[-1] + 1) / 50, (rows[-1] + 1) / 50) == pytest.approx(box)
    # Cut by the edge, and wholly outside.
    assert crop_box((0.0, 0.0, 0.5, 1.0), Image.fromarray(picture)) == pytest.approx((0, 0, 0.5, 1))
    x0, _, x1, _ = crop_box((0.0, 0.0, 0.2, 1.0), picture)
    assert x0 == x1 == 0


def test_random_crops_stay_inside_and_cover_their_range():
    draws = np.random.default_rng(1)
    crops = np.array([random_crop_box(640, 480, draws, (0.3, 1.0)) for _ in range(2000)])
    left, top, width, height = crops.T
    assert left.min() >= 0 and top.min() >= 0
    assert (left + width).max() <= 640 and (top + height).max() <= 480
    area, aspect = width * height / (640 * 480), width / height
    assert 0.29 < area.min() < 0.33 and area.max() > 0.95
    assert aspect.min() > 0.74 and aspect.max() < 1.345
    # Every legal corner can come up, the last one included.
    assert (left == 0).any() and (left + width == 640).any()


@pytest.mark.parametrize("width, height", [(1000, 10), (10, 1000)])
def test_a_strip_falls_back_to_the_middle(width, height):
    left, top, w, h = random_crop_box(width, height, np.random.default_rng(0), (0.9, 1.0))
    short, long = 10, round(10 * 4 / 3)
    assert sorted((w, h)) == [short, long]
    assert (left, top) == ((width - w) // 2, (height - h) // 2)


def test_random_image_is_its_crop_resized():
    class Fixed:
        def __init__(self):
            self.numbers = iter([0.5, 0.5, 0.25, 0.75])

        def random(self):
            return next(self.numbers)

    picture = ramp(60, 80)
    # Area share 0.64 and aspect 1.
    side = round(math.sqrt(60 * 80 * 0.64))
    top, left = int(0.25 * (60 - side + 1)), int(0.75 * (80 - side + 1))
    with_crop = np.ascontiguousarray(picture[top : top + side, left : left + side])
    expected = np.array(Image.fromarray(with_crop).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(random_image(picture, 32, Fixed(), scale=(0.6, 0.68)), expected)


@pytest.mark.parametrize("shape", [(5, 7, 3), (2, 5, 7, 3)])
def test_normalise_is_the_formula(shape):
    pictures = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    images = normalise(pictures)
    truth = (pictures.double() / 255 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    assert images.dtype == torch.float32 and images.is_contiguous()
    torch.testing.assert_close(images.double(), truth.movedim(-1, -3), rtol=0, atol=1e-6)


def test_denormalise_gives_every_pixel_back():
    pictures = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(denormalise(normalise(pictures)), pictures)
    assert denormalise(torch.full((3, 1, 1), 99.0)).eq(255).all()
    assert denormalise(torch.full((3, 1, 1), -99.0)).eq(0).all()


def test_eval_transform_is_crop_and_normalise():
    image = Image.fromarray(ramp(50, 70))
    expected = normalise(torch.from_numpy(center_image(image, 32)))
    assert torch.equal(eval_transform(image, 32), expected)


def test_import_needs_no_torchvision():
    code = "import sys; sys.modules['torchvision'] = None; import sycoca.images"
    subprocess.run([sys.executable, "-c", code], check=True)
