"""`pytest bench/test_generation.py --benchmark-only`: captions with and without memory of keys and values."""

import pytest
import torch

from bench import generation


@pytest.mark.parametrize("session", generation.SESSIONS)
@pytest.mark.parametrize("beams", [1, 4])
def test_generation(benchmark, device, full_size, beams, session):
    preset, images = ("base_16", 32) if full_size else ("tiny", 8)
    calls = generation.writers(preset, images, beams, device)
    assert torch.equal(*(call().tokens for call in calls.values()))

    def run() -> None:
        calls[session]()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{generation.TOKENS} tokens of {preset}, {images} images, {beams} beams"
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
