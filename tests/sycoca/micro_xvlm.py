"""An X-VLM of a few thousand parameters and batches for it, both pure functions of small integers."""

from dataclasses import replace

import torch
from torch import Tensor

from sycoca.config import FusionConfig, ModelConfig, TextConfig, VisionConfig
from sycoca.mlm import mask_words
from sycoca.model import Batch
from sycoca.regions import RegionBatch, cells, whole
from sycoca.xvlm import XVLM, XBatch, build_model
from tests.sycoca.micro import MICRO, uniform

# P = 16, T = 10; no two widths are equal. Tokens from 30 on go on with a word.
MICRO_XVLM = ModelConfig(
    embed_dim=20,
    vision=VisionConfig(image_size=16, patch_size=4, width=32, depth=3, heads=2, local_depth=2),
    text=TextConfig(context_length=10, vocab_size=37, width=24, depth=2, heads=3, kind="bidirectional", mask_id=3),
    caption_decoder=MICRO.caption_decoder,
    image_decoder=MICRO.image_decoder,
    fusion=FusionConfig(depth=2, heads=2),
    objectives=("itc", "itm", "mlm", "bbox"),
)
CONTINUES = torch.arange(37) >= 30


def micro_xvlm(*, vision: dict | None = None, loss: dict | None = None, **changes) -> ModelConfig:
    """The micro configuration with some fields changed."""
    base = MICRO_XVLM
    parts = {"vision": replace(base.vision, **(vision or {})), "loss": replace(base.loss, **(loss or {}))}
    return replace(base, **parts, **changes)


def build(config: ModelConfig, salt: int = 1) -> XVLM:
    """A model whose weights come from a hash, not from a generator."""
    model = build_model(config)
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(model.named_parameters())):
            if not any(part in name for part in ("ln_", "norm", "log_scale")):
                p.copy_(uniform(*p.shape, salt=salt * 1000 + i) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1))
    return model


def texts(lengths: list[int], salt: int = 7) -> Tensor:
    """Tokens (B, 10): [CLS], so many pieces of words, padding."""
    tokens = torch.zeros(len(lengths), 10, dtype=torch.int64)
    pieces = (uniform(len(lengths), 10, salt=salt).abs() * 1e4).long() % 32 + 5
    for row, length in enumerate(lengths):
        tokens[row, 0] = 1
        tokens[row, 1 : length + 1] = pieces[row, :length]
    return tokens


def pairs(lengths: list[int], *, salt: int = 3, ids: Tensor | None = None) -> Batch:
    """Images with captions of the given numbers of pieces."""
    B = len(lengths)
    return Batch(uniform(B, 3, 16, 16, salt=salt), texts(lengths, salt), torch.arange(B) + 100 * salt, ids)


def regions(lengths: list[int], per_image: int = 2, *, salt: int = 5, whole_every: int = 3) -> RegionBatch:
    """Texts of the given numbers of pieces, `per_image` of them to an image; every so many-th is a caption."""
    E = len(lengths)
    size = uniform(E, 2, salt=salt + 1).abs().clamp(0.2, 1.6) / 2
    centre = 0.5 + (1 - size) * uniform(E, 2, salt=salt + 2).clamp(-1, 1) / 2
    boxes = torch.cat([centre, size], dim=1)
    has_box = torch.arange(E) % whole_every != 0
    boxes[~has_box] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    rects = torch.where(has_box[:, None], cells(boxes, (4, 4)), whole(E, (4, 4)))
    images = uniform(-(-E // per_image), 3, 16, 16, salt=salt)
    ids, seeds = torch.arange(E) + 1000 * salt, torch.arange(E) + 10_000 * salt
    return RegionBatch(images, texts(lengths, salt), boxes, rects, torch.arange(E) // per_image, has_box, ids, seeds)


def step(config: ModelConfig, lengths: list[int], region_lengths: list[int], **changes) -> XBatch:
    """Pairs and regions with what masked words need."""
    found, boxed = pairs(lengths), regions(region_lengths)._replace(**changes)
    if not config.learns("mlm"):
        return XBatch(found, boxed)
    masked = (mask_words(part.tokens, part.seeds, CONTINUES, config.text, config.words) for part in (found, boxed))
    return XBatch(found, boxed, *masked)
