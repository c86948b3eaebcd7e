"""Configuration of the encoders that transformers brings: Swin in the place of the ViT, BERT's layers for the texts."""

import importlib.util
from dataclasses import dataclass, fields
from typing import Any

from sycoca.checked import Strict, require

# Of all norms of a BERT.
BERT_EPS = 1e-12


def _share(config: Any, *names: str) -> None:
    for name in names:
        require(0 <= getattr(config, name) < 1, f"{name}: must lie in 0..1, 1 excluded, got {getattr(config, name)}")


@dataclass(frozen=True)
class SwinConfig(Strict):
    """Swin (arXiv 2103.14030): stages of shifted windows, each on half the grid and twice as wide as the one before.

    Attributes:
        embed_width: of the first stage.
        depths, heads: blocks of each stage and their heads.
        window: side of a window, in cells of its stage's grid.
        patch_size: of the first stage, pixels; `VisionConfig.patch_size` is that of the last one.
        drop_path: chance, 0..1, of the last block's branches to be left out in training; lower blocks have less.
    """

    embed_width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    patch_size: int = 4
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        for name in ("embed_width", "window", "patch_size"):
            require(getattr(self, name) > 0, f"{name}: must be positive, got {getattr(self, name)}")
        stages = f"{len(self.depths)} stages, heads {len(self.heads)}"
        require(len(self.depths) == len(self.heads) > 0, f"depths: {stages}; each stage needs its own")
        require(all(depth > 0 for depth in self.depths), f"depths: {self.depths}, each must be positive")
        for stage, heads in enumerate(self.heads):
            width = self.embed_width * 2**stage
            require(heads > 0 and width % heads == 0, f"heads: {heads} does not divide the width {width}")
        _share(self, "drop_path")

    @property
    def implied(self) -> dict[str, int]:
        """What the image encoder's own fields have to be: those of the last stage, and all blocks."""
        doubled = 2 ** (len(self.depths) - 1)
        return {
            "patch_size": self.patch_size * doubled,
            "width": self.embed_width * doubled,
            "depth": sum(self.depths),
            "heads": self.heads[-1],
        }

    def check(self, vision: Any) -> None:
        """Refuses an image encoder's fields that a Swin cannot have."""
        for name, value in self.implied.items():
            found = getattr(vision, name)
            require(found == value, f"{name}: {found}, the stages of vision.swin make it {value}")
        require(vision.region_form == "pooled", "region_form: 'local' needs a ViT; vision.swin needs 'pooled'")
        require(not vision.cls_position, "cls_position: vision.swin has no [CLS]")
        cells = vision.grid[0]
        require(self.window <= cells, f"swin.window: {self.window}, the last grid has {cells} x {cells} cells")


@dataclass(frozen=True)
class BertConfig(Strict):
    """BERT's layers (arXiv 1810.04805), normalised behind each sum: the text encoder's, then the fusion encoder's.

    Attributes:
        positions: rows of the position table, of which texts use the first ones.
        segments: rows of the table of token types, of which texts use the first one.
        dropout: share, 0..1, of states, and of self-attention, dropped in training.
    """

    positions: int = 512
    segments: int = 2
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("positions", "segments"):
            require(getattr(self, name) > 0, f"{name}: must be positive, got {getattr(self, name)}")
        _share(self, "dropout")

    def check(self, text: Any) -> None:
        """Refuses a text encoder's fields that BERT cannot have."""
        require(text.kind == "bidirectional", f"kind: '{text.kind}', text.bert needs 'bidirectional'")
        fits = text.context_length <= self.positions
        require(fits, f"context_length: {text.context_length}, text.bert has {self.positions} positions")


def missing_package(model: Any) -> str | None:
    """One line where a model's configuration needs transformers and Python does not find it, else None."""
    parts = [(name, getattr(model, name)) for name in ("vision", "text")]
    keys = [
        f"model.{part}.{field.name}"
        for part, config in parts
        for field in fields(config)
        if isinstance(getattr(config, field.name), SwinConfig | BertConfig)
    ]
    if not keys or importlib.util.find_spec("transformers") is not None:
        return None
    return f'{keys[0]}: needs transformers, which is not installed: pip install -e ".[transformers]"'
