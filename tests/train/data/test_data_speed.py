"""Images a second of a core, against the plain composition of Pillow and torch."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from bench.loading import compared, ours, plain

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


def test_no_slower_than_the_plain_composition(photographs):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.allclose(plain(photographs, SIZE), ours(photographs, SIZE), atol=1e-5)
        rates = compared(photographs, SIZE)
    finally:
        torch.set_num_threads(threads)
    print({name: f"{rate:.0f} images/s" for name, rate in rates.items()})
    # Rounding of the clock and of a loaded machine.
    assert rates["ours"] >= 0.97 * rates["plain"]
