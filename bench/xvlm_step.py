"""A region step of X-VLM beside the published composition: `python -m bench.xvlm_step [--threads N] [--rounds N]`.

Forward and backward over texts and boxes of the built-in scenes, sampled as the published configuration does (up to
five of an image, its own caption among them). Both compute the same losses of the same weights, which is checked first;
the published one pads texts and projects keys and values for every box. Rows: `bench/results/xvlm_step.jsonl`.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bench import rows
from bench.measure import interleaved
from bench.xvlm_published import published_region_losses
from sycoca.mlm import MaskedWords, mask_words
from sycoca.presets import MODEL_PRESETS
from sycoca.regions import RegionBatch
from sycoca.tokenizer import Tokenizer
from sycoca.xvlm import XVLM
from train.data import open_dataset
from train.data.region_batches import region_batches
from train.inputs import trim

OPERATOR = "region step"


def region_batch(preset: str, elements: int, whole_share: float = 1.0) -> tuple[RegionBatch, MaskedWords]:
    """Texts and boxes of the scenes, padded to the context length, and their texts with hidden words."""
    config = MODEL_PRESETS[preset]
    source = open_dataset("scenes", image_size=config.vision.image_size)
    tokenizer = Tokenizer.train_wordpiece(source.texts(1000), config.text.vocab_size)
    size, grid, T = config.vision.image_size, config.vision.grid, config.text.context_length
    options: dict[str, Any] = {"elements": elements, "image_size": size, "grid": grid, "context_length": T}
    regions = next(region_batches(source, tokenizer, **options, whole_share=whole_share, seed=1)).regions
    return regions, mask_words(regions.tokens, regions.seeds, tokenizer.continues(), config.text, config.words)


def trimmed(regions: RegionBatch, masked: MaskedWords, pad_id: int) -> tuple[RegionBatch, MaskedWords]:
    """The batch as the training loop hands it over: without the padding that all texts share."""
    tokens = trim(regions.tokens, pad_id)
    return regions._replace(tokens=tokens), masked._replace(tokens=masked.tokens[:, : tokens.shape[1]].contiguous())


def steps(preset: str, elements: int) -> dict[str, Callable[[], float]]:
    """One forward and backward pass by composition; each returns its loss."""
    torch.manual_seed(0)
    config = MODEL_PRESETS[preset]
    # Published, matching sees boxes alone.
    model = XVLM(replace(config, loss=replace(config.loss, whole_views=0.0)))
    padded = region_batch(preset, elements)
    short = trimmed(*padded, model.config.text.pad_id)

    def run(loss: Callable[[], torch.Tensor]) -> float:
        model.zero_grad(set_to_none=True)
        total = loss()
        total.backward()
        return total.item()

    return {
        "shared": lambda: run(lambda: model.region_losses(*short).total),
        "published": lambda: run(lambda: published_region_losses(model, *padded)["total"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="xvlm_tiny")
    parser.add_argument("--elements", type=int, default=128, help="texts of a step (128, the published number)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    calls = steps(options.preset, options.elements)
    losses = {name: call() for name, call in calls.items()}
    if abs(losses["shared"] - losses["published"]) > 1e-4 * losses["published"]:
        raise AssertionError(f"the compositions disagree: {losses}")
    timings = interleaved(calls, options.rounds)
    for name, timing in timings.items():
        ratio = timings["published"].p50_ms / timing.p50_ms
        case = {"preset": options.preset, "elements": options.elements}
        rows.write("xvlm_step", operator=OPERATOR, impl=name, **case, **timing._asdict(), times_faster=ratio)
        print(f"{name:10} {timing.p50_ms:8.1f} ms, {ratio:.2f} times as fast as published", flush=True)


if __name__ == "__main__":
    main()
