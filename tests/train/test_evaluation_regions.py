"""Figures of boxes and matches: counted by hand on the scenes, with answers that are known."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sycoca.locate import locate
from sycoca.regions import from_corners, iou
from sycoca.tokenizer import Tokenizer
from sycoca.xvlm import XVLM
from tests.sycoca.micro_xvlm import MICRO_XVLM
from train.data import open_dataset
from train.data.region_batches import region_batches
from train.evaluation_pairs import HeldOut
from train.evaluation_regions import _count_boxes, _Counts, _others, judge, phrases_of, region_lines
from train.tasks.grounding import evaluate as evaluate_grounding
from train.tasks.options import TaskOptions

PAIRS = 12
TEXT = replace(MICRO_XVLM.text, context_length=28, vocab_size=128)


@pytest.fixture(scope="module")
def judged():
    """A fresh model in eval mode, its tokenizer, scenes, and the phrases of each of the first of them."""
    dataset = open_dataset("scenes", "val", image_size=16)
    tokenizer = Tokenizer.train_wordpiece(dataset.texts(100), 128)
    torch.manual_seed(0)
    model = XVLM(replace(MICRO_XVLM, text=TEXT)).eval()
    return model, tokenizer, dataset, [phrases_of(dataset[i]) for i in range(PAIRS)]


def figures(judged, model=None, train=None):
    fresh, tokenizer, dataset, _ = judged
    model = model or fresh
    held_out = HeldOut(dataset, tokenizer, model.config, image_size=16, pairs=PAIRS, device="cpu", group=None)
    return judge(model, tokenizer, held_out, train)


def test_right_answers(judged, monkeypatch):
    model, _, dataset, phrases = judged
    boxes = from_corners(torch.tensor([phrase.box for found in phrases for phrase in found]))
    monkeypatch.setattr(model, "locate", lambda text, views: boxes)
    found = figures(judged, train=dataset)["grounding"]
    assert found["phrases"] == len(boxes) and found["acc@0.5"] == 1 and found["mean_iou"] == pytest.approx(1)
    # Objects of a scene lie apart: no answer to one phrase suits another, and one box suits one phrase.
    assert found["other_phrase"] == 0 and found["best_box"] == pytest.approx(PAIRS / len(boxes))
    # The fixed box is one of the training boxes, here the best of the same scenes.
    hits = max((iou(box.expand_as(boxes), boxes) >= 0.5).double().mean().item() for box in boxes)
    assert 1 / len(boxes) <= found["fixed_box"] <= hits + 1e-9 or found["fixed_box"] == pytest.approx(hits, abs=0.1)


def test_another_phrase_speaks_of_another_box():
    """Phrases of one box answer one another, which compares nothing; those of an image of one box are left out."""
    one, two, three = [0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [0.7, 0.2, 0.2, 0.2]
    boxes = torch.tensor([one, one, two, one, two, two, three, one])
    owner = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
    counts = _Counts()
    # Every phrase is answered rightly.
    _count_boxes(boxes, boxes, owner, None, counts)
    assert counts._sums["phrases"] == counts._sums["hits"] == 8
    assert counts._sums["several"] == 4 and counts._sums["other"] == 0
    # The one answer of the picture is that of its third phrase, which is the nearest other one of all but itself.
    counts = _Counts()
    _count_boxes(torch.where(owner[:, None] == 0, torch.tensor(two), boxes), boxes, owner, None, counts)
    assert counts._sums["several"] == 4 and counts._sums["other"] == 1
    asked, other = _others(boxes[:4])
    assert list(zip(asked.tolist(), other.tolist())) == [(0, 2), (1, 2), (2, 1), (3, 2)]


def test_one_answer_to_all(judged, monkeypatch):
    model, _, _, phrases = judged
    truth = from_corners(torch.tensor([phrase.box for found in phrases for phrase in found]))
    answer = torch.tensor([[0.3, 0.3, 0.4, 0.4]])
    monkeypatch.setattr(model, "locate", lambda text, views: answer.expand(len(text.words), 4))
    found = figures(judged)["grounding"]
    expected = (iou(answer.expand_as(truth), truth) >= 0.5).double().mean().item()
    assert found["acc@0.5"] == pytest.approx(expected) and found["fixed_box"] is None
    assert found["other_phrase"] == pytest.approx(expected)


@pytest.mark.parametrize(("verdict", "right"), [((0.0, 1.0), 0.5), ((1.0, 0.0), 0.5), ((0.0, 0.0), 0.5)])
def test_one_verdict_on_all_is_half_right(judged, monkeypatch, verdict, right):
    model = judged[0]
    monkeypatch.setattr(model, "match", lambda text, views: torch.tensor([verdict]).expand(len(text.words), 2))
    assert figures(judged)["matching"] == {"images": right, "boxes": right}


def test_what_is_not_learned_has_no_figure(judged):
    only_boxes = XVLM(replace(MICRO_XVLM, text=TEXT, objectives=("itc", "bbox"))).eval()
    found = figures(judged, only_boxes)
    assert found["matching"] is None and 0 <= found["grounding"]["acc@0.5"] <= 1
    only_itm = XVLM(replace(MICRO_XVLM, text=TEXT, objectives=("itc", "itm"))).eval()
    found = figures(judged, only_itm)
    assert found["grounding"] is None and found["matching"].keys() == {"images", "boxes"}
    assert region_lines(found)[0].startswith("matching (ITM), hard negatives: balanced accuracy 0.")
    assert region_lines({"grounding": None, "matching": None}) == []


# --- pictures that are no squares

SIZE = 16
# Where a red box lies in pictures of (width, height): all of it at a border that a centre crop cuts away, but the last.
SHAPES = {
    (96, 32): (0.0, 0.25, 0.125, 0.75),
    (32, 96): (0.25, 0.875, 1.0, 1.0),
    (80, 40): (0.75, 0.0, 1.0, 1.0),
    (48, 48): (0.25, 0.5, 0.75, 0.75),
}


@pytest.fixture(scope="module")
def banners(tmp_path_factory):
    """A folder of wide and tall blue pictures, each with a red box and a phrase for it, in both splits."""
    folder = tmp_path_factory.mktemp("banners")
    (folder / "images").mkdir()
    rows, lines = ["image\tcaption\tsplit"], []
    for number, ((width, height), box) in enumerate(list(SHAPES.items()) * 2):
        pixels = np.full((height, width, 3), (0, 0, 255), dtype=np.uint8)
        x0, y0, x1, y1 = (round(side * length) for side, length in zip(box, (width, height) * 2))
        pixels[y0:y1, x0:x1] = (255, 0, 0)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        rows.append(f"{number}.png\ta picture, number {number}\t{'val' if number < len(SHAPES) else 'train'}")
        lines.append(json.dumps({"image": f"{number}.png", "regions": [{"phrase": f"red {number}", "bbox": box}]}))
    (folder / "captions.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "regions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return open_dataset(str(folder), "val", image_size=SIZE)


class Reddest(XVLM):
    """Answers every phrase with the box about what is red in the picture that it is given."""

    def encode_image(self, images):
        self.pictures = images
        return super().encode_image(images)

    def locate(self, text, views):
        patches = self.config.vision.num_patches
        images = self.pictures[views.seen.index[:, 0] // (1 + patches)]
        red = (images[:, 0] > images[:, 2]).double()
        found = []
        for row in red:
            ys, xs = row.nonzero().T
            found.append([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        return from_corners(torch.tensor(found).float() / SIZE)


def test_no_phrase_is_cut_away(judged, banners):
    """Training, judging while training, `evaluate.py grounding` and `locate` see the same picture and the same box."""
    _, tokenizer, _, _ = judged
    torch.manual_seed(0)
    model = Reddest(replace(MICRO_XVLM, text=TEXT)).eval()
    held_out = HeldOut(banners, tokenizer, model.config, image_size=SIZE, pairs=PAIRS, device="cpu", group=None)
    found = judge(model, tokenizer, held_out)["grounding"]
    assert found["phrases"] == len(SHAPES) and found["acc@0.5"] == 1 and found["mean_iou"] == pytest.approx(1)

    skipped = SimpleNamespace(sample=pytest.fail)
    options = TaskOptions(batch_size=3)
    outcome = evaluate_grounding(model, tokenizer, banners, options=options, device="cpu", skipped=skipped)
    assert outcome.figures["phrases"] == len(SHAPES) and outcome.headline["mean IoU"] == pytest.approx(1)

    for index, box in enumerate(SHAPES.values()):
        (answer,) = locate(model, tokenizer, banners[index].image, [f"red {index}"])
        assert answer.box == pytest.approx(box)
        assert phrases_of(banners[index])[0].box == pytest.approx(box)

    form = {"image_size": SIZE, "grid": model.config.vision.grid, "context_length": 28, "crop": False}
    loader = region_batches(banners, tokenizer, elements=len(SHAPES), whole_share=0.0, epochs=1, **form)
    (batch,) = (loaded.regions for loaded in loader)
    loader.close()
    model.encode_image(batch.images)
    views = SimpleNamespace(
        seen=SimpleNamespace(index=(batch.image_index * (1 + model.config.vision.num_patches))[:, None])
    )
    assert iou(model.locate(None, views), batch.boxes).min() == pytest.approx(1)


def test_boxes_outside_their_image_are_not_judged(banners):
    sample = banners[0]
    region = sample.regions[0]
    faulty = [region._replace(box=box) for box in ((0.5, 0.5, 0.5, 0.9), (0.9, 0.1, 0.2, 0.3), (0.2, 0.2, 0.4, 1.5))]
    slack = region._replace(box=(-0.0005, 0.2, 0.4, 1.0005))
    (kept,) = phrases_of(sample._replace(regions=(*faulty, slack)))
    assert kept.box == (0.0, 0.2, 0.4, 1.0)
