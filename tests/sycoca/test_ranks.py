"""The gradient of several processes is that of one with the same global batch."""

import pytest
import torch
import torch.distributed as dist

from sycoca.model import Batch
from tests.ranks import run_ranks
from tests.sycoca.micro import ATTENTIVE, RANDOM, batch, build, gradients, micro

# Shares of 4 and 2 pairs (whole groups of the local term) with very different numbers of tokens and empty captions.
LENGTHS = [8, 8, 7, -1, 1, 0]
SHARES = (slice(0, 4), slice(4, 6))


def losses_and_gradients(config, data, plan, group=None, shares=None):
    model = build(config)
    losses = model(data, plan, group, shares)
    losses.total.backward()
    return [x.item() for x in losses], gradients(model)


@pytest.mark.parametrize("ids", [None, torch.tensor([3, 1, 4, 5, 3, 9])])
@pytest.mark.parametrize("plan", [RANDOM, ATTENTIVE])
def test_two_ranks_equal_one(plan, ids):
    config = micro(loss={"label_smoothing": 0.1})
    data = batch(LENGTHS, ids=ids)

    def share(rank, world_size):
        part = Batch(*(None if x is None else x[SHARES[rank]] for x in data))
        shares = [4, 2] if plan.attentive else None
        return losses_and_gradients(config, part, plan, dist.group.WORLD, shares)

    losses, expected = losses_and_gradients(config, data, plan)
    ranks = run_ranks(share, 2)
    for i, name in enumerate(("total", "itc", "caption", "tgmim", "local")):
        assert sum(rank[0][i] for rank in ranks) / 2 == pytest.approx(losses[i], rel=1e-5), name
    assert "logit_scale.log_scale" in expected and "local.scale.log_scale" in expected
    for name, truth in expected.items():
        mean = sum(rank[1][name] for rank in ranks) / 2
        assert (mean - truth).norm() <= 1e-5 * truth.norm() + 1e-8, name
