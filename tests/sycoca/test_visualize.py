import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sycoca.config import CaptionDecoderConfig, ImageDecoderConfig, MaskingConfig, ModelConfig, TextConfig, VisionConfig
from sycoca.images import eval_transform
from sycoca.model import SyCoCa
from sycoca.tokenizer import Tokenizer
from sycoca.vision import patchify
from sycoca.visualize import View, overlay_figure, restore_patches, save_overview, view_pairs

SIZE, PATCH = 32, 8
CAPTIONS = ["a red square", "a blue disc above a green heart", "nothing much"]
CONFIG = ModelConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=SIZE, patch_size=PATCH, width=16, depth=1, heads=2),
    text=TextConfig(context_length=16, vocab_size=280, width=16, depth=1, heads=2),
    caption_decoder=CaptionDecoderConfig(depth=1, heads=2),
    image_decoder=ImageDecoderConfig(depth=1, width=16, heads=2),
    masking=MaskingConfig(score_space="local", masked_input="drop"),
)
COCA = replace(CONFIG, objectives=("itc", "ic"), masking=MaskingConfig(drop_ratio=0.0))
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS, 280)


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)


def build(config):
    torch.manual_seed(0)
    return SyCoCa(config).eval()


def look(config, tokenizer, pictures, count=3):
    images = torch.stack([eval_transform(picture, SIZE) for picture in pictures[:count]])
    return view_pairs(build(config), tokenizer, images, CAPTIONS[:count])


def enlarged(marked):
    return np.kron(marked, np.ones((PATCH, PATCH), dtype=bool))


def test_views_show_what_the_model_does(tokenizer, pictures):
    views = look(CONFIG, tokenizer, pictures)
    for i, view in enumerate(views):
        assert np.array_equal(view.image, pictures[i])
        assert (view.caption, view.stranger) == (CAPTIONS[i], CAPTIONS[(i + 1) % 3])
        assert np.array_equal(view.kept, view.masked)  # half is kept, half is hidden, in one order
        assert view.kept.sum() == 8
        assert view.scores[view.kept].min() >= view.scores[~view.kept].max()
        visible = ~enlarged(view.masked)
        assert np.array_equal(view.rebuilt[visible], view.image[visible])
        assert np.array_equal(view.misled[visible], view.image[visible])
        assert not np.array_equal(view.rebuilt, view.image)
        assert isinstance(view.written, str)
    assert any(not np.array_equal(view.rebuilt, view.misled) for view in views)


def test_hidden_patches_are_the_reconstruction(tokenizer, pictures):
    """A decoder of known output, at the places that were hidden."""
    model = build(CONFIG)
    model.reconstruct = lambda images, text, selection: torch.zeros(len(images), 8, PATCH * PATCH * 3)
    images = torch.stack([eval_transform(picture, SIZE) for picture in pictures])
    for view in view_pairs(model, tokenizer, images, CAPTIONS):
        hidden = view.rebuilt[enlarged(view.masked)]
        assert np.array_equal(np.unique(hidden, axis=0), [[123, 117, 104]])  # the mean colour of CLIP's statistics


def test_restored_patches_have_the_true_mean_and_deviation():
    torch.manual_seed(0)
    target = 3 * torch.randn(2, 5, 48) + 7
    units = (target - target.mean(-1, keepdim=True)) / (target.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(restore_patches(units, target), target, atol=1e-4)


def test_a_perfect_model_of_normalised_patches_restores_the_picture(tokenizer, pictures):
    config = replace(CONFIG, loss=replace(CONFIG.loss, tgmim_kind="mse_normalised"))
    model = build(config)

    def perfect(images, text, selection):
        patches = patchify(images, PATCH)
        target = patches.gather(1, selection.masked[:, :, None].expand(-1, -1, patches.shape[2]))
        variance, mean = torch.var_mean(target, dim=-1, correction=0, keepdim=True)
        return (target - mean) / (variance + 1e-6).sqrt()

    model.reconstruct = perfect
    images = torch.stack([eval_transform(picture, SIZE) for picture in pictures])
    for view in view_pairs(model, tokenizer, images, CAPTIONS):
        assert np.abs(view.rebuilt.astype(int) - view.image).max() <= 1


def test_predicted_features_are_no_picture(tokenizer, pictures):
    views = look(replace(CONFIG, loss=replace(CONFIG.loss, tgmim_kind="ema_features")), tokenizer, pictures)
    assert all(view.rebuilt is None and view.stranger is None and view.masked.sum() == 8 for view in views)
    assert not any("rebuilt" in title for title in titles(views))


def titles(views):
    return [axes.get_title() for axes in overlay_figure(views).axes if axes.get_title()]


def test_columns_are_what_the_model_has(tokenizer, pictures):
    assert len(titles(look(CONFIG, tokenizer, pictures))) == 6
    assert titles(look(COCA, tokenizer, pictures)) == ["image"]
    assert len(titles(look(CONFIG, tokenizer, pictures, count=1))) == 5  # a lone image has no stranger
    captioning_only = replace(CONFIG, objectives=("itc", "ic"))
    assert len(titles(look(captioning_only, tokenizer, pictures))) == 3


def test_no_view_is_an_error():
    with pytest.raises(ValueError, match="at least one view"):
        overlay_figure([])


def sample(picture, caption, *boxes):
    return SimpleNamespace(
        image=picture, captions=(caption,), described=lambda which: [SimpleNamespace(box=box) for box in boxes]
    )


def test_overview_is_a_picture_without_gossip(tmp_path, tokenizer, pictures):
    wide = Image.fromarray(np.tile(pictures[1], (1, 2, 1)))
    samples = [
        sample(pictures[0], "costs $5 or $6_a^", (0.1, 0.2, 0.5, 0.9), (0.0, 0.0, 1.0, 1.0)),
        sample(wide, "二つの青い丸 \x07 \n" + 40 * "unbreakable"),
        sample(pictures[2], "a sentence without an end " * 20),
    ]
    path = tmp_path / "overview.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_overview(path, build(CONFIG), tokenizer, samples, image_size=SIZE, device="cpu")
    with Image.open(path) as written:
        assert written.format == "PNG"
        width, height = written.size
        assert 1200 < width < 2400
        assert 600 < height < 1200
        pixels = np.asarray(written.convert("RGB"))
    # The first image stands there in its own colours, every pixel of it enlarged.
    colours = {tuple(colour) for colour in pictures[0].reshape(-1, 3).tolist()}
    drawn = {tuple(colour) for colour in np.unique(pixels.reshape(-1, 3), axis=0).tolist()}
    assert len(colours & drawn) > 0.9 * len(colours)


def test_boxes_are_drawn_where_they_are_known(tokenizer, pictures):
    views = look(CONFIG, tokenizer, pictures, count=1)
    boxed = [replace(views[0], boxes=np.array([[0.25, 0.5, 0.75, 1.0]]))]
    without = [len(axes.patches) for axes in overlay_figure(views).axes]
    drawn = overlay_figure(boxed).axes[1].patches
    assert sum(without) == 0
    assert drawn[0].get_bbox().bounds == (7.5, 15.5, 16, 16)  # pixel edges lie half a pixel off the centres


def test_a_caption_stays_in_its_column():
    view = View(np.zeros((8, 8, 3), dtype=np.uint8), caption="w" * 400, written="")
    figure = overlay_figure([view])
    words = [text.get_text() for text in figure.texts]
    assert words[0] == "caption" and words[-1] == "(nothing)"
    assert all(text.get_clip_on() for text in figure.texts)
    assert len(words) <= 1 + 3 + 2


def test_matplotlib_waits_for_the_first_figure():
    code = "import sys, sycoca.visualize, train.evaluation_run; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
