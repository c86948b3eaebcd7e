"""Decoding with and without memory of keys and values: `python -m bench.generation [--full] [--preset NAME]`.

Rows in `bench/results/generation.jsonl`: captions of 64 tokens, one thread, the processor's time. The session without
memory computes the vocabulary at the last position only, as the one with memory does.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bench import rows
from bench.measure import interleaved
from sycoca.cache import Cached, Recomputed
from sycoca.decode_step import lay_out
from sycoca.fused_captioner import FusedCached, FusedRecomputed
from sycoca.generate import Generated, generate_tokens
from sycoca.presets import MODEL_PRESETS
from sycoca.xvlm import build_model

TOKENS = 64
# Of a captioning decoder, and of X-VLM's fusion encoder.
SESSIONS = {"cached": (Cached, FusedCached), "recomputed": (Recomputed, FusedRecomputed)}
# (preset, images, beams)
CASES = [("tiny", 1, 1), ("tiny", 8, 1), ("small", 1, 1), ("small", 8, 1), ("small", 32, 1), ("small", 8, 4)]
CASES += [("xvlm_tiny", 8, 1), ("xvlm_tiny", 8, 4)]
LARGE = [("base_16", 1, 1), ("base_16", 1, 4), ("xvlm_base", 1, 1)]


def writers(preset: str, images: int, beams: int, device: torch.device) -> dict[str, Callable[[], Generated]]:
    """What writes captions of exactly `TOKENS` tokens with a preset's sizes, by session."""
    config = MODEL_PRESETS[preset]
    fused = not config.learns("ic")
    room = max(TOKENS, config.text.context_length)
    config = replace(config, text=replace(config.text, context_length=room, writes=fused))
    torch.manual_seed(0)
    model = build_model(config).to(device).eval()
    if device.type == "cpu":
        lay_out(model)
    side = config.vision.image_size
    with torch.no_grad():
        features = model.encode_image(torch.randn(images, 3, side, side, device=device))
    options: dict[str, Any] = {"num_beams": beams, "min_length": TOKENS, "max_length": TOKENS}
    return {
        name: lambda session=kinds[fused]: generate_tokens(model, features, session=session, **options)
        for name, kinds in SESSIONS.items()
    }


def measure(preset: str, images: int, beams: int, device: torch.device, rounds: int) -> None:
    """Appends a row per session, behind equal tokens."""
    calls = writers(preset, images, beams, device)
    found = [call() for call in calls.values()]
    if not torch.equal(found[0].tokens, found[1].tokens):
        raise AssertionError(f"{preset}, {images} images, {beams} beams: the sessions disagree")
    timings = interleaved(calls, rounds)
    for name, timing in timings.items():
        row = rows.write(
            "generation",
            operator="generate",
            impl=name,
            preset=preset,
            B=images,
            beams=beams,
            tokens=TOKENS,
            **timing._asdict(),
            times_faster=timings["recomputed"].p50_ms / timing.p50_ms,
        )
        print({key: row[key] for key in ("preset", "B", "beams", "impl", "p50_ms", "times_faster")}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="base_16 and xvlm_base as well")
    known = sorted({preset for preset, *_ in (*CASES, *LARGE)})
    parser.add_argument("--preset", choices=known, help="of this one alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for cases, rounds in ((CASES, 3), (LARGE if options.full else [], 1)):
        for case in cases:
            if options.preset in (None, case[0]):
                measure(*case, torch.device("cpu"), rounds=rounds)


if __name__ == "__main__":
    main()
