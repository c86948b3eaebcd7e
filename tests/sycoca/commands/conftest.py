"""A small untrained model in a folder, photographs of noise with broken files among them, and the command line."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from sycoca.__main__ import main
from sycoca.config import (
    CaptionDecoderConfig,
    FusionConfig,
    ImageDecoderConfig,
    MaskingConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from sycoca.model import SyCoCa
from sycoca.tokenizer import Tokenizer

CAPTIONS = ["a red square", "a blue disc above a green heart", "nothing much"]
CONFIG = ModelConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=32, patch_size=8, width=16, depth=1, heads=2),
    text=TextConfig(context_length=16, vocab_size=280, width=16, depth=1, heads=2),
    caption_decoder=CaptionDecoderConfig(depth=1, heads=2),
    image_decoder=ImageDecoderConfig(depth=1, width=16, heads=2),
    masking=MaskingConfig(score_space="local", masked_input="drop"),
)
# X-VLM with boxes.
BOXES = replace(
    CONFIG,
    vision=replace(CONFIG.vision, local_depth=1),
    text=TextConfig(
        context_length=16, vocab_size=80, width=16, depth=1, heads=2, kind="bidirectional", mask_id=3, sot_id=1
    ),
    fusion=FusionConfig(depth=1, heads=2),
    objectives=("itc", "itm", "bbox"),
)
COCA = replace(CONFIG, objectives=("itc", "ic"), masking=MaskingConfig(drop_ratio=0.0))


class Ran(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


def build(config: ModelConfig = CONFIG) -> SyCoCa:
    torch.manual_seed(0)
    return SyCoCa(config).eval()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CAPTIONS, 280)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer) -> str:
    folder = tmp_path_factory.mktemp("model") / "small"
    build().save_pretrained(folder, tokenizer=tokenizer)
    return str(folder)


@pytest.fixture(scope="session")
def coca_folder(tmp_path_factory, tokenizer) -> str:
    folder = tmp_path_factory.mktemp("model") / "coca"
    build(COCA).save_pretrained(folder, tokenizer=tokenizer)
    return str(folder)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Twelve readable pictures, two of them in a folder below, and three broken ones between them."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (40 + number, 60, 3), dtype=np.uint8)
        name = f"more/{number:02d}.png" if number > 9 else f"{number:02d}.jpg"
        Image.fromarray(pixels).save(folder / name)
    (folder / "03-cut.jpg").write_bytes((folder / "03.jpg").read_bytes()[:700])
    (folder / "05-text.png").write_text("no picture")
    (folder / "07-empty.jpg").touch()
    (folder / "notes.md").write_text("not an image, and not named like one")
    (folder / ".hidden.jpg").write_text("a file that programs leave behind")
    return folder


@pytest.fixture
def sycoca(capfd, monkeypatch, tmp_path):
    """Runs a command line in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        return Ran(code, *capfd.readouterr())

    return run
