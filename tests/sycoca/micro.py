"""A model of a few thousand parameters and batches for it, both pure functions of small integers."""

from dataclasses import replace

import torch
from torch import Tensor

from sycoca.config import (
    CaptionDecoderConfig,
    ImageDecoderConfig,
    LossConfig,
    MaskingConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from sycoca.masking import hash_tensor
from sycoca.model import Batch, StepPlan, SyCoCa

RANDOM, ATTENTIVE = StepPlan(False, False), StepPlan(True, True)

# P = 16, T = 10; no two widths are equal, so that a swapped axis cannot pass.
MICRO = ModelConfig(
    embed_dim=20,
    vision=VisionConfig(image_size=16, patch_size=4, width=32, depth=2, heads=2),
    text=TextConfig(context_length=10, vocab_size=37, width=24, depth=2, heads=3),
    caption_decoder=CaptionDecoderConfig(depth=1, heads=2),
    image_decoder=ImageDecoderConfig(depth=1, width=16, heads=2),
    masking=MaskingConfig(score_space="local", masked_input="drop", local_dim=12, local_group=2),
)


def micro(*, masking: dict | None = None, loss: dict | None = None, **changes) -> ModelConfig:
    """The micro configuration with some fields changed."""
    return replace(
        MICRO,
        masking=replace(MICRO.masking, **(masking or {})),
        loss=replace(MICRO.loss if "loss" not in changes else LossConfig(), **(loss or {})),
        **changes,
    )


def uniform(*shape: int, salt: int) -> Tensor:
    """Numbers of mean 0 and variance 1 that are the same on every machine."""
    index = torch.arange(torch.Size(shape).numel()) + (salt << 32)
    return (((hash_tensor(index) >> 40) & 0xFFFFFF).float() * 2.0**-24 - 0.5).view(shape) * 12**0.5


def build(config: ModelConfig, salt: int = 1) -> SyCoCa:
    """A model whose weights come from a hash, not from a generator."""
    model = SyCoCa(config)
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(model.named_parameters())):
            if "ln_" not in name and "norm" not in name and "log_scale" not in name:
                p.copy_(uniform(*p.shape, salt=salt * 1000 + i) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1))
    return model


def captions(lengths: list[int], context_length: int = 10, salt: int = 7) -> Tensor:
    """Tokens (B, T): [SOT] and [EOT] around `length` words; a length below 0 is padding alone."""
    tokens = torch.zeros(len(lengths), context_length, dtype=torch.int64)
    words = 3 + (hash_tensor(torch.arange(tokens.numel()) + (salt << 32)) >> 33).remainder(34).view_as(tokens)
    for row, length in enumerate(lengths):
        if length >= 0:
            tokens[row, 0] = 1
            tokens[row, 1 : length + 1] = words[row, :length]
            tokens[row, length + 1] = 2
    return tokens


def batch(lengths: list[int], *, salt: int = 3, ids: Tensor | None = None) -> Batch:
    """Pairs with captions of the given numbers of words."""
    B = len(lengths)
    return Batch(uniform(B, 3, 16, 16, salt=salt), captions(lengths, salt=salt), torch.arange(B) + 100 * salt, ids)


def gradients(model: SyCoCa) -> dict[str, Tensor]:
    """Gradients by parameter name."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
