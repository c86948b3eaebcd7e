"""Visual grounding on RefCOCO+ as published: figures by split, and a detector's boxes chosen by heat."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import train.tasks.grounding as grounding
from sycoca.config import ConfigError
from sycoca.regions import from_corners, iou
from sycoca.xvlm import XVLM
from tests.train.data.test_convert_refcoco import DETECTIONS, convert, dump, published
from tests.train.tasks.test_tasks_fused import CONFIG, CPU, model, scenes, tokenizer
from train.data.sample import Region, Skipped
from train.tasks.heat import best_detections
from train.tasks.judge import judge
from train.tasks.options import TaskOptions
from train.tasks.sources import open_source

__all__ = ["model", "published", "tokenizer"]

CHOOSING = TaskOptions(batch_size=1, grounding="detections")


def opened(folder, split, *options):
    assert convert(folder, *options, "--images", folder / "images") == 0
    return open_source("grounding", f"{folder / 'out'}?images={folder / 'images'}", split, image_size=32)


def heat_at(col, row):
    """Stands for `match_heat`: all heat in one of 4 x 4 patches."""

    def heat(model, text, views):
        found = torch.zeros(len(text.words), 4, 4)
        found[:, row, col] = 1
        return found.flatten(1)

    return heat


def test_the_best_detection_is_that_of_brute_force():
    draws = torch.Generator().manual_seed(0)
    heat = torch.rand(4, 12, generator=draws) ** 4
    heat[3] = 0
    corners = torch.rand(9, 2, 2, generator=draws).sort(1).values.flatten(1)
    # Less than a pixel in a corner, and the whole picture.
    corners = torch.cat([corners, torch.tensor([[0.999, 0.999, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])])
    listed = [corners, corners[:3], corners[:0], corners]
    found = best_detections(heat, (3, 4), listed, 32)
    picture = F.interpolate(heat.double().view(4, 1, 3, 4), size=(32, 32), mode="bicubic")[:, 0]
    for row in range(2):
        scores = []
        for x0, y0, x1, y1 in listed[row].double().tolist():
            left, top, right, bottom = (int(32 * side) for side in (x0, y0, x1, y1))
            held = picture[row, top : max(bottom, top + 1), left : max(right, left + 1)].sum().item()
            scores.append(held / ((x1 - x0) * (y1 - y0)) ** 0.5)
        best = max(range(len(scores)), key=scores.__getitem__)
        assert torch.equal(found[row], from_corners(listed[row][best]))
    # No answer is left over from the phrase before.
    assert found[2].tolist() == found[3].tolist() == [0.5, 0.5, 1.0, 1.0]


def test_detections_are_chosen_where_the_heat_is(model, tokenizer, published, monkeypatch):
    """In a picture of 200 x 100, so that rows and columns cannot be taken for one another."""
    source = opened(published, "train", "--detections", published / "dets.json")
    left, right = ((18, 12, 100, 50), (150, 50, 50, 50))
    for (col, row), (x, y, w, h) in (((1, 1), left), ((3, 3), right)):
        monkeypatch.setattr(grounding, "match_heat", heat_at(col, row))
        found = judge("grounding", model, tokenizer, source, options=CHOOSING, device=CPU).outcome
        assert found.figures["method"] == "detections" and found.figures["without_detections"] == 0
        chosen = torch.tensor([[x / 200, y / 100, (x + w) / 200, (y + h) / 100]])
        shown = [box for label, box in found.examples[0].boxes if label]
        assert shown and all(box == pytest.approx(chosen[0].tolist(), abs=1e-6) for box in shown)
        true = from_corners(torch.tensor([[0.1, 0.1, 0.6, 0.6], [0.1, 0.1, 0.6, 0.6], [0, 0, 0.25, 1.0]]))
        expected = (iou(from_corners(chosen).expand_as(true), true) >= 0.5).double().mean().item()
        assert found.headline["Acc@0.5"] == pytest.approx(expected)
        # The detector has the box of the first object alone.
        assert found.headline["Acc@0.5 of the best detection"] == pytest.approx(2 / 3)


def test_what_the_detector_does_not_see_is_the_whole_image(model, tokenizer, published, monkeypatch):
    source = opened(published, "test", "--detections", published / "dets.json")
    with pytest.raises(ValueError, match="lists no boxes of a detector"):
        judge("grounding", model, tokenizer, source, options=CHOOSING, device=CPU)
    dump(published / "dets.json", str({**DETECTIONS, "5": [[0, 0, 10, 10]]}).replace("'", '"'))
    source = opened(published, "test", "--detections", published / "dets.json")
    monkeypatch.setattr(grounding, "match_heat", heat_at(0, 0))
    found = judge("grounding", model, tokenizer, source, options=CHOOSING, device=CPU).outcome
    # testA's true box is half of its image, testB's is the detection.
    by_file = {name: entry["acc"] for name, entry in found.figures["by_file"].items()}
    assert by_file == {"testA": 1.0, "testB": 1.0, "all": 1.0} and found.figures["without_detections"] == 1
    assert found.tables["by file"][1] == [("testA", 1, 1.0), ("testB", 1, 1.0), ("all", 2, 1.0)]


def test_a_single_file_has_no_table_of_files(model, tokenizer, published):
    found = judge("grounding", model, tokenizer, opened(published, "val"), options=TaskOptions(), device=CPU).outcome
    assert found.figures["method"] == "regress" and "by_file" not in found.figures


def test_detections_need_matching(tokenizer, published):
    only_boxes = XVLM(replace(CONFIG, objectives=("itc", "bbox")))
    with pytest.raises(ConfigError, match="grounding=detections: needs the objective 'itm'"):
        judge("grounding", only_boxes, tokenizer, opened(published, "val"), options=CHOOSING, device=CPU)


def test_boxes_that_vanish_in_the_picture_are_counted(model, tokenizer):
    """Those that lie in the slack around an image for the most part."""

    class Thin(list):
        name, skipped = "thin", Skipped()

    boxes = (0.2, 0.2, 0.6, 0.6), (-0.0009, 0.1, 0.0005, 0.5)
    regions = tuple(Region(f"box {i}", box, -1) for i, box in enumerate(boxes))
    sample = scenes(1)[0]
    source = Thin([sample._replace(regions=regions), sample._replace(key="other", regions=regions[1:2])])
    found = judge("grounding", model, tokenizer, source, options=TaskOptions(), device=CPU)
    assert found.outcome.figures["phrases"] == found.outcome.figures["images"] == 1
    counts = {"box of a region has no area in its image": 2, "image without a usable region": 1}
    assert found.skipped.counts() == counts
