"""A model as CLIP_benchmark takes one: encoders, captions as token ids, a transform and a tokenizer.

CLIP_benchmark normalises features itself and decodes captions with CLIP's vocabulary, which is that of the models whose
weights come from OpenCLIP.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from sycoca.generate import generate_tokens
from sycoca.hub import load_pretrained
from sycoca.images import eval_transform


class Benchmarked(NamedTuple):
    """What CLIP_benchmark's loaders return: a model, a transform of PIL images, a tokenizer of sentences."""

    model: "Encoders"
    transform: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[str | Sequence[str]], Tensor]


class Encoders(nn.Module):
    """SyCoCa under the names that CLIP_benchmark calls.

    Args:
        model: with the objective `itc`; `generate` needs `ic`.
        options: of `sycoca.generate_tokens`, for `generate`.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Features (B, E) fp32, unit rows, of images (B, 3, H, W) as the transform makes them."""
        return self.model.encode_image(images).features

    @torch.no_grad()
    def encode_text(self, tokens: Tensor) -> Tensor:
        """Features (B, E) fp32, unit rows, of tokens (B, T) int64 as the tokenizer makes them."""
        return self.model.encode_text(tokens).features

    @torch.no_grad()
    def generate(self, images: Tensor) -> Tensor:
        """Captions (B, L) int64 of images, [SOT] first, padded behind [EOT]."""
        return generate_tokens(self.model, self.model.encode_image(images), **self.options).tokens[:, 0]


def load(name_or_path: str | os.PathLike, *, device: Any = "cpu", **options: Any) -> Benchmarked:
    """Loads a model for CLIP_benchmark.

    Args:
        name_or_path: as for `sycoca.load_pretrained`.
        device: of the model.
        options: of `sycoca.generate_tokens`, for captions.

    Returns:
        Model in evaluation mode, transform, tokenizer.

    Raises:
        WeightsError: as `sycoca.load_pretrained`.
    """
    model, tokenizer, config = load_pretrained(name_or_path, device=device)

    def transform(image: Image.Image) -> Tensor:
        return eval_transform(image.convert("RGB"), config.vision.image_size)

    def tokenize(texts: str | Sequence[str]) -> Tensor:
        return tokenizer.encode([texts] if isinstance(texts, str) else list(texts), config.text.context_length)

    return Benchmarked(Encoders(model, **options).eval(), transform, tokenize)
