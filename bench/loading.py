"""What one core loads: `python -m bench.loading [--data SOURCE] [--preset NAME]`.

Images per second of each part of a training sample and of a whole batch, and from files to a normalised batch beside
the plain composition of Pillow and torch. On one thread in the processor's time, so that other work on the machine does
not lengthen it. Rows: `bench/results/step.jsonl`.
"""

import argparse
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench import rows
from sycoca.images import IMAGE_MEAN, IMAGE_STD, decode, normalise, random_crop_box, random_image
from sycoca.presets import MODEL_PRESETS
from sycoca.tokenizer import Tokenizer
from train.config import PRESETS
from train.data import DataError, batches, open_dataset

SAMPLES = 256
ROUNDS = 5


def plain(files: Sequence[bytes], size: int, scale: tuple[float, float] = (0.9, 1.0)) -> Tensor:
    """Random crops (B, 3, size, size) fp32, normalised, by Pillow and torch alone."""
    mean, std = torch.tensor(IMAGE_MEAN)[:, None, None], torch.tensor(IMAGE_STD)[:, None, None]
    made = []
    for number, data in enumerate(files):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        left, top, w, h = random_crop_box(*image.size, np.random.default_rng(number), scale)
        image = image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div(255)
        made.append((pixels - mean) / std)
    return torch.stack(made)


def ours(files: Sequence[bytes], size: int, scale: tuple[float, float] = (0.9, 1.0)) -> Tensor:
    """The same as the loader makes them."""
    pictures = np.empty((len(files), size, size, 3), dtype=np.uint8)
    for number, data in enumerate(files):
        pictures[number] = random_image(decode(data), size, np.random.default_rng(number), scale=scale)
    return normalise(torch.from_numpy(pictures))


def compared(files: Sequence[bytes], size: int, scale: tuple[float, float] = (0.9, 1.0)) -> dict[str, float]:
    """Images per second of `ours` and `plain`, the best of rounds in turn on this process's threads."""
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(ROUNDS):
        for make in (plain, ours):
            start = time.process_time()
            make(files, size, scale)
            seconds[make.__name__].append(time.process_time() - start)
    return {name: len(files) / min(times) for name, times in seconds.items()}


def measure(source: str, preset: str) -> dict[str, float]:
    """Images per second and core, by part."""
    torch.set_num_threads(1)
    model, data = MODEL_PRESETS[preset], PRESETS[preset].data
    size = model.vision.image_size
    dataset = open_dataset(source, "train", image_size=size)
    tokenizer = Tokenizer.train(list(dataset.texts(500)), min(4096, model.text.vocab_size))
    count = min(SAMPLES, len(dataset))
    numbers = range(count)

    def rate(work) -> float:
        work(0)
        start = time.process_time()
        for number in numbers:
            work(number)
        return count / (time.process_time() - start)

    samples = [dataset.pair(number, number) for number in numbers]
    draws = np.random.Generator(np.random.Philox(key=0))
    scale = data.crop_scale or (0.9, 1.0)
    pictures = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    found = {
        "read and decode": rate(lambda n: dataset.pair(n, n)),
        "crop and resize": rate(lambda n: random_image(samples[n][0], size, draws, scale=scale)),
        "tokenise": rate(lambda n: tokenizer.encode([samples[n][1]], model.text.context_length)),
        "normalise": rate(lambda n: normalise(pictures)),
    }
    share = max(1, count // 4)
    made = batches(
        dataset,
        tokenizer,
        global_batch=share,
        image_size=size,
        context_length=model.text.context_length,
        crop_scale=data.crop_scale,
    )
    next(made)
    start = time.process_time()
    for _ in range(3):
        next(made)
    found["whole batch"] = 3 * share / (time.process_time() - start)
    files = [dataset.encoded(number)[0] for number in numbers[:64]]
    beside = compared(files, size, scale)
    return {**found, "files to pixels": beside["ours"], "by Pillow and torch": beside["plain"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="scenes", help="a data source")
    parser.add_argument("--preset", default="small", choices=sorted(MODEL_PRESETS))
    options = parser.parse_args()
    try:
        found = measure(options.data, options.preset)
    except DataError as error:
        print(f"bench.loading: {error}", file=sys.stderr)
        return 2
    name = options.data if options.data == "scenes" else Path(options.data).name
    for part, images in found.items():
        rows.write("step", operator="loading", case=part, source=name, preset=options.preset, images_per_s_core=images)
        print(f"{part:20} {images:8.0f} images/s and core")
    return 0


if __name__ == "__main__":
    sys.exit(main())
