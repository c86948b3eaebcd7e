"""Held-out figures while a run trains: when, of what, and what a resumed run keeps of them."""

import json

import pytest
import torch

from train import evaluations
from train.evaluations import NAME, Evaluations, line

FIGURES = {
    "retrieval": {"pairs": {"images": 8, "image_to_text": {"r@1": 0.25}, "text_to_image": {"r@1": 0.5}}},
    "captioning": {"nats_per_token": 1.5},
    "tgmim": None,
    "selection": {"described_share": None},
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Finishes steps of a run; returns what was said."""
    model = torch.nn.Dropout()

    def evaluate(judged, **how):
        assert not judged.training and how == {"examples": 0, "pairs": 8}
        if run.fails:
            raise ValueError("none of them can be used")
        return FIGURES

    monkeypatch.setattr(evaluations, "evaluate", evaluate)

    def run(first, last, total, every=4, writes=True):
        said = []
        judge = Evaluations(tmp_path, every, first_step=first, total_steps=total, writes=writes, pairs=8)
        for step in range(first, last):
            judge.after(step + 1, lambda: model, said.append)
            assert model.training
        return said

    run.fails, run.rows = False, tmp_path / NAME
    return run


def steps(run):
    return [json.loads(row)["step"] for row in run.rows.read_text().splitlines()]


def test_rows_come_every_so_many_steps_but_not_at_the_end(run):
    said = run(0, 12, 12)
    assert steps(run) == [4, 8] and [text.split(":")[0] for text in said] == [
        "held out after step 4",
        "held out after step 8",
    ]
    costs = [json.loads(row)["step_cpu_s"] for row in run.rows.read_text().splitlines()]
    assert all(0 <= cost < 1 for cost in costs)


def test_a_resumed_run_judges_again_what_it_trains_again(run):
    run(0, 9, 20)
    run(6, 20, 20)
    assert steps(run) == [4, 8, 12, 16]


def test_nothing_is_judged_unless_asked_and_one_rank_writes(run):
    assert run(0, 12, 12, every=None) == [] and not run.rows.exists()
    assert run(0, 12, 12, writes=False) and not run.rows.exists()


def test_unusable_pairs_do_not_end_the_training(run):
    run.fails = True
    assert run(0, 5, 12) == ["no held-out figures: none of them can be used"]


def test_a_line_leaves_out_what_is_not_known():
    assert line(4, FIGURES) == "held out after step 4: r@1 0.250 / 0.500 of 8, 1.500 nats/token"
    boxes = {"retrieval": None, "grounding": {"acc@0.5": 0.25}, "matching": {"images": 0.5, "boxes": None}}
    assert line(4, boxes) == "held out after step 4: 0.250 Acc@0.5, 0.500 ITM of images"
