"""The training step of `tiny`: forward and backward of SyCoCa, and of CoCa of the same size."""

from dataclasses import replace

import pytest
import torch

from sycoca.config import ModelConfig
from sycoca.model import Batch, StepPlan, SyCoCa
from sycoca.presets import MODEL_PRESETS

BATCH = 32


def _configuration(name: str) -> ModelConfig:
    config = MODEL_PRESETS["tiny"]
    if name == "sycoca":
        return config
    masking = replace(config.masking, drop_ratio=0.0)
    return replace(config, masking=masking, loss=replace(config.loss, tgmim_weight=0.0))


def _batch(config: ModelConfig, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    text, side = config.text, config.vision.image_size
    tokens = torch.randint(3, text.vocab_size, (BATCH, text.context_length), generator=generator)
    tokens[:, 0] = text.sot_id
    for row, length in enumerate(torch.randint(12, text.context_length, (BATCH,), generator=generator).tolist()):
        tokens[row, length - 1] = text.eot_id
        tokens[row, length:] = text.pad_id
    images = torch.randn(BATCH, 3, side, side, generator=generator)
    return Batch(images.to(device), tokens.to(device), torch.arange(BATCH, device=device), None)


@pytest.mark.parametrize("name", ["sycoca", "coca"])
def test_step(benchmark, name, device):
    config = _configuration(name)
    torch.manual_seed(0)
    model, batch = SyCoCa(config).to(device), _batch(config, device)
    plan = StepPlan(attentive=config.selects, mask_captioning=config.num_dropped > 0)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(batch, plan).total.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"step of tiny, {BATCH} pairs"
    benchmark.pedantic(step, rounds=5, warmup_rounds=2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
