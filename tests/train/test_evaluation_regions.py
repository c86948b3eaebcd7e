"""Figures of boxes and matches: counted by hand on the scenes, with answers that are known."""

from dataclasses import replace

import pytest
import torch

from sycoca.regions import from_corners, iou
from sycoca.tokenizer import Tokenizer
from sycoca.xvlm import XVLM
from tests.sycoca.micro_xvlm import MICRO_XVLM
from train.data import open_dataset
from train.evaluation_pairs import HeldOut
from train.evaluation_regions import judge, phrases_of, region_lines

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
