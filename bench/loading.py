"""What one core loads: `python -m bench.loading [--data SOURCE] [--preset NAME]`.

Images per second of each part of a training sample and of a whole batch, on one thread in the processor's time, so
that other work on the machine does not lengthen it. Rows: `bench/results/step.jsonl`.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from bench import rows
from sycoca.images import normalise, random_image
from sycoca.presets import MODEL_PRESETS
from sycoca.tokenizer import Tokenizer
from train.config import PRESETS
from train.data import DataError, batches, open_dataset

SAMPLES = 256


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
    return {**found, "whole batch": 3 * share / (time.process_time() - start)}


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
        print(f"{part:16} {images:8.0f} images/s and core")
    return 0


if __name__ == "__main__":
    sys.exit(main())
