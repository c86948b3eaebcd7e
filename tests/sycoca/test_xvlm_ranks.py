"""The gradient of several processes is that of one with the same global batch, the pairs of ITM held fixed."""

import pytest
import torch
import torch.distributed as dist

import sycoca.xvlm
from sycoca.masking import StepPlan
from sycoca.mlm import MaskedWords
from sycoca.model import Batch
from sycoca.regions import RegionBatch
from sycoca.xvlm import XBatch
from tests.ranks import run_ranks
from tests.sycoca.micro import gradients
from tests.sycoca.micro_xvlm import build, micro_xvlm, step

# Very different numbers of words and boxes on each of 2 or 4 ranks.
LENGTHS = [9, 8, 0, 1, 7, 2, 3, 0]
REGION_LENGTHS = [9, 1, 2, 0, 4, 4, 2, 1]


def neighbours(image, text, scale, *, ids, floor, seed):
    other = torch.arange(len(image)) ^ 1
    return other, other


def share(batch: XBatch, rank: int, world: int) -> XBatch:
    def part(x):
        return x[rank * len(x) // world : (rank + 1) * len(x) // world]

    regions = RegionBatch(*(part(x) for x in batch.regions))
    regions = regions._replace(image_index=regions.image_index - rank * 4 // world)
    pairs = Batch(*(None if x is None else part(x) for x in batch.pairs))
    masked = [MaskedWords(*(part(x) for x in words)) for words in (batch.masked, batch.masked_regions)]
    return XBatch(pairs, regions, *masked)


def losses_and_gradients(config, batch, group=None, shares=None):
    model = build(config)
    losses = model(batch, StepPlan(False, False), group, shares)
    losses.total.backward()
    return [x.item() for x in losses], gradients(model)


@pytest.mark.parametrize(("world", "form"), [(2, "local"), (4, "local"), (2, "pooled"), (4, "pooled")])
def test_ranks_equal_one(monkeypatch, world, form):
    monkeypatch.setattr(sycoca.xvlm, "sample_hard_negatives", neighbours)
    config = micro_xvlm(vision={"region_form": form}, loss={"region_weight": 0.7})
    # Equal phrases on different ranks; only the last two ranks of four have boxes.
    changes = {"ids": torch.tensor([1, 2, 3, 1, 4, 5, 3, 6]), "has_box": torch.arange(8) > 4}
    batch = step(config, LENGTHS, REGION_LENGTHS, **changes)

    def on_rank(rank, world_size):
        shares = [8 // world] * world if form == "local" else None
        return losses_and_gradients(config, share(batch, rank, world), dist.group.WORLD, shares)

    losses, expected = losses_and_gradients(config, batch)
    ranks = run_ranks(on_rank, world)
    # All but the accuracy, which is no sum.
    for i in range(len(losses) - 1):
        assert sum(rank[0][i] for rank in ranks) / world == pytest.approx(losses[i], rel=1e-5), i
    for name, truth in expected.items():
        mean = sum(rank[1][name] for rank in ranks) / world
        assert (mean - truth).norm() <= 1e-5 * truth.norm() + 1e-8, name
