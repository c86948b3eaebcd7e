"""The command that draws what a phrase describes: the boxes of the model, in the pixels of the picture."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sycoca.locate import Located, draw_boxes, locate
from sycoca.tokenizer import Tokenizer
from sycoca.xvlm import XVLM
from tests.sycoca.commands.conftest import BOXES, CAPTIONS


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder, model and tokenizer."""
    torch.manual_seed(0)
    model, tokenizer = XVLM(BOXES).eval(), Tokenizer.train_wordpiece(CAPTIONS, 80)
    folder = tmp_path_factory.mktemp("boxes") / "small"
    model.save_pretrained(folder, tokenizer=tokenizer)
    return str(folder), model, tokenizer


def test_boxes_are_printed_in_pixels_and_drawn(sycoca, made, photos, tmp_path):
    folder, model, tokenizer = made
    phrases = ["a red square", "a blue disc"]
    path = photos / "02.jpg"
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    expected = locate(model, tokenizer, image, phrases)
    ran = sycoca("locate", path, *phrases, "--model", folder, "--json", "--out", "found.png")
    assert ran.code == 0, ran.err
    rows = [json.loads(line) for line in ran.out.splitlines()]
    for row, found in zip(rows, expected, strict=True):
        assert row["phrase"] == found.phrase and row["match"] == pytest.approx(found.match, abs=1e-3)
        corners = [side * size for side, size in zip(found.box, image.size * 2)]
        assert row["box"] == pytest.approx(corners, abs=0.06)
    with Image.open(tmp_path / "found.png") as drawn:
        assert drawn.size == image.size and np.abs(np.asarray(drawn, int) - np.asarray(image, int)).max() > 30
    plain = sycoca("locate", path, *phrases, "--model", folder)
    first = plain.out.splitlines()[0].split("\t")
    assert first[0] == "a red square" and first[1] == " ".join(f"{c:.0f}" for c in rows[0]["box"])
    assert (tmp_path / "located.png").is_file() and "located.png: 2 boxes" in plain.err


def test_a_frame_is_where_the_box_is():
    image = Image.new("RGB", (200, 100), "white")
    drawn = np.asarray(draw_boxes(image, [Located("it", (0.25, 0.5, 0.75, 0.9), 0.5)]), dtype=int)
    assert np.asarray(image).min() == 255
    coloured = (drawn != 255).any(2)
    rows, cols = np.flatnonzero(coloured[60:, :].any(1)) + 60, np.flatnonzero(coloured[60:, :].any(0))
    assert (cols[0], cols[-1] + 1, rows[-1] + 1) == (50, 150, 90)
    assert not coloured[60:85, 60:140].any() and coloured[50:90, 50].all()


def test_a_true_box_is_white_and_has_no_label():
    drawn = np.asarray(draw_boxes(Image.new("RGB", (60, 60)), [Located("", (0.5, 0.5, 1, 1), None)]))
    assert set(np.unique(drawn)) == {0, 255} and not drawn[:30].any() and drawn[30, 30:].all()


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0, 0, 0, 0), (1, 1, 1, 1), (0.99, 0.0, 1.0, 0.01)])
@pytest.mark.parametrize("size", [(8, 8), (300, 20), (1, 1)])
def test_any_box_can_be_drawn(box, size):
    assert draw_boxes(Image.new("RGB", size), [Located("a phrase that is long " * 3, box, None)]).size == size


def test_mistakes_are_one_line(sycoca, made, model_folder, photos, tmp_path):
    folder = made[0]
    for options, told in (
        ((photos / "02.jpg", "x", "--model", model_folder), "built without the objective 'bbox'"),
        ((photos / "03-cut.jpg", "x", "--model", folder), "unreadable image"),
        ((photos / "2.jpg", "x", "--model", folder), "did you mean"),
        ((photos, "x", "--model", folder), "several files; give one image"),
        ((photos / "02.jpg", " ", "--model", folder), "is empty"),
        ((photos / "02.jpg", "x", "--model", folder, "--out", "a.txt"), "must end in .png or .jpg or .jpeg"),
        ((photos / "02.jpg", "--model", folder), "PHRASE"),
    ):
        ran = sycoca("locate", *options)
        assert ran.code == 2 and told in ran.err and ran.err.count("\n") == 1, ran.err
    assert not (tmp_path / "located.png").exists()
