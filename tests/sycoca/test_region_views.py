"""Texts of boxes that are shown whole images: which, with what, and what is no negative of them then."""

from dataclasses import replace

import pytest
import torch

from sycoca.config import ConfigError, LossConfig
from sycoca.fusion import Seen
from sycoca.masking import StepPlan
from sycoca.region_views import Shown, choose_views, shown
from sycoca.regions import areas
from sycoca.xvlm import Views
from tests.sycoca.micro_xvlm import build, micro_xvlm, regions, step


def test_the_share_is_drawn_by_seed_and_captions_are_shown_their_image():
    batch = regions([3] * 600)
    captions = areas(batch.rects) == 16
    assert torch.equal(shown(batch, 0.0, 16).whole, captions)
    assert shown(batch, 1.0, 16).whole.all()
    half = shown(batch, 0.5, 16).whole
    assert half[captions].all() and 0.4 < half[~captions].float().mean() < 0.6
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    other = shown(batch._replace(seeds=batch.seeds[order], rects=batch.rects[order]), 0.5, 16).whole
    assert torch.equal(other, half[order]), "a function of each text's seed"


def test_views_are_chosen_row_by_row():
    boxes = Seen(torch.tensor([[1, 2], [3, 0]]), torch.tensor([[True, True], [True, False]]))
    images = Seen(torch.tensor([[7, 8, 9], [4, 5, 6]]), torch.ones(2, 3, dtype=torch.bool))
    found = choose_views(torch.tensor([False, True]), boxes, images)
    assert found.index.tolist() == [[1, 2, 0], [4, 5, 6]]
    assert found.valid.tolist() == [[True, True, False], [True, True, True]]


def test_what_is_said_of_the_image_that_is_shown_is_no_negative():
    # Two images; the texts 1 and 4 say the same of one box in each.
    choice = Shown(
        whole=torch.tensor([True, False, False, True, False]),
        image_index=torch.tensor([0, 0, 0, 1, 1]),
        ids=torch.tensor([10, 20, 30, 40, 20]),
    )
    # View 0 shows image 0, of which 20 and 30 are said and 40 is not; view 1 shows its box alone; view 3 image 1.
    texts, _ = choice.without_true(torch.tensor([4, 4, -1, 1, 0]), torch.full((5,), -1))
    assert texts.tolist() == [-1, 4, -1, -1, 0]
    texts, _ = choice.without_true(torch.tensor([3, 2, 0, 2, 1]), torch.full((5,), -1))
    assert texts.tolist() == [3, 2, 0, 2, 1]
    _, views = choice.without_true(torch.full((5,), -1), torch.tensor([3, 3, 3, 0, 0]))
    assert views.tolist() == [3, -1, 3, 0, -1]


@pytest.mark.parametrize("form", ["local", "pooled"])
def test_matching_and_hidden_words_follow_the_view_and_nothing_else_does(form):
    boxed = micro_xvlm(vision={"region_form": form})
    imaged = replace(boxed, loss=replace(boxed.loss, whole_views=1.0))
    batch = step(boxed, [3, 5, 2], [4, 3, 6, 2, 5, 3])
    plan = StepPlan(False, False)
    first, second = (build(config)(batch, plan) for config in (boxed, imaged))
    for name in ("itc", "itm", "mlm", "region_itc", "l1", "giou"):
        torch.testing.assert_close(getattr(second, name), getattr(first, name))
    assert second.region_mlm != first.region_mlm and second.region_itm != first.region_itm
    # With boxes that are the whole image there is no difference.
    regions = batch.regions
    grid = torch.tensor([0, 0, 4, 4], dtype=torch.int32).expand(len(regions.rects), 4).contiguous()
    batch = batch._replace(regions=regions._replace(rects=grid))
    first, second = (build(config)(batch, plan) for config in (boxed, imaged))
    torch.testing.assert_close(torch.stack(second), torch.stack(first))


def test_matching_is_a_mean_over_the_pairs_that_are_left():
    """All texts are of one image, so that no other text is a negative of it."""
    config = micro_xvlm(loss={"whole_views": 1.0})
    batch = step(config, [3, 5], [4, 3, 6])
    regions = batch.regions._replace(images=batch.regions.images[:1], image_index=torch.zeros(3, dtype=torch.int64))
    model = build(config)
    found = model(batch._replace(regions=regions), StepPlan(False, False))
    seen = model.encode_regions(regions.images, regions.rects, regions.image_index)
    logits = model.match(
        model.encode_text(regions.tokens), Views(seen.images.tables, seen.images.seen.of(regions.image_index))
    )
    torch.testing.assert_close(found.region_itm, -logits.log_softmax(1)[:, 1].mean())


def test_shares_lie_between_nothing_and_all():
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="whole_views: must lie in"):
            LossConfig(whole_views=share)
