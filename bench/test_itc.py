"""`pytest bench/test_itc.py --benchmark-only`: the contrastive losses beside what they replace."""

import pytest
import torch

import kernels
from bench import contrastive
from bench.baselines import contrastive_peers, siglip_peers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def sizes(full_size):
    """B and D."""
    return (65536, 768) if full_size else (1024, 512)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["ours", "eager", "logits once", "open_clip", "compiled", "Inf-CL", "memeff"])
def test_itc(benchmark, device, full_size, name, dtype):
    losses = {"ours": kernels.fused_itc_loss} | contrastive_peers(device)
    if name not in losses:
        pytest.skip(f"{name} is not installed, or needs a GPU")
    B, D = sizes(full_size)
    inputs = contrastive.features(B, D, DTYPES[dtype], device)
    benchmark.group = f"fused_itc_loss {dtype} B={B} D={D}"
    benchmark.pedantic(contrastive.step(losses[name], inputs), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["ours", "eager", "compiled", "siglip-kernel"])
def test_siglip(benchmark, device, full_size, name, dtype):
    losses = {"ours": kernels.fused_siglip_loss} | siglip_peers(device)
    if name not in losses:
        pytest.skip(f"{name} is not installed, or needs a GPU")
    B, D = sizes(full_size)
    inputs = contrastive.features(B, D, DTYPES[dtype], device, 2)
    benchmark.group = f"fused_siglip_loss {dtype} B={B} D={D}"
    benchmark.pedantic(contrastive.step(losses[name], inputs), rounds=3, warmup_rounds=1)
