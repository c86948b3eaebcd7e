"""Images a second of a core, against the plain composition of Pillow and torch."""

import io
import time

import numpy as np
import pytest
import torch
from PIL import Image

from sycoca.images import IMAGE_MEAN, IMAGE_STD, decode, normalise, random_crop_box, random_image

SIZE, COUNT = 224, 24


@pytest.fixture(scope="module")
def photographs():
    files = []
    for number in range(COUNT):
        coarse = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def plain(files):
    mean, std = torch.tensor(IMAGE_MEAN)[:, None, None], torch.tensor(IMAGE_STD)[:, None, None]
    made = []
    for number, data in enumerate(files):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        left, top, w, h = random_crop_box(*image.size, np.random.default_rng(number), (0.9, 1.0))
        image = image.crop((left, top, left + w, top + h)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div(255)
        made.append((pixels - mean) / std)
    return torch.stack(made)


def ours(files):
    pictures = np.empty((len(files), SIZE, SIZE, 3), dtype=np.uint8)
    for number, data in enumerate(files):
        pictures[number] = random_image(decode(data), SIZE, np.random.default_rng(number))
    return normalise(torch.from_numpy(pictures))


def test_no_slower_than_the_plain_composition(photographs):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.allclose(plain(photographs), ours(photographs), atol=1e-5)
        seconds = {plain: [], ours: []}
        for _ in range(5):
            for made, times in seconds.items():
                begin = time.process_time()
                made(photographs)
                times.append(time.process_time() - begin)
    finally:
        torch.set_num_threads(threads)
    rates = {made.__name__: COUNT / min(times) for made, times in seconds.items()}
    print({name: f"{rate:.0f} images/s" for name, rate in rates.items()})
    # Rounding of the clock and of a loaded machine.
    assert rates["ours"] >= 0.97 * rates["plain"]
