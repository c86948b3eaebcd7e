import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import kernels
from kernels import groups
from tests.kernels.contrastive import correlated, error
from tests.ranks import run_ranks


def test_takes_open_clips_arguments():
    image, text = correlated(20, 8, 0.4, 0.1)
    module = kernels.FusedClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1)
    logits, labels = 10.0 * image @ text.T, torch.arange(20)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    arguments = {"image_features": image, "text_features": text, "logit_scale": torch.tensor(10.0)}
    value = module(**arguments, logit_bias=torch.tensor(-3.0), output_dict=True)
    assert error(value["contrastive_loss"], expected) <= 1e-6
    assert torch.equal(module(**arguments), value["contrastive_loss"])


def on_uneven_rank(rank, world_size, image, text):
    module = kernels.FusedClipLoss(rank=rank, world_size=world_size, uneven=True)
    mine = slice(0, 3) if rank == 0 else slice(3, None)
    return module(image[mine], text[mine], torch.tensor(10.0))


def exchanges(rank, world_size, image, text):
    """Sizes that were asked for; modules of equal ranks ask for none."""
    asked, gather = [], groups._gather
    groups._gather = lambda x, *rest: (asked.append(x.dtype), gather(x, *rest))[1]
    mine = image[rank::2], text[rank::2], torch.tensor(10.0)
    kernels.FusedClipLoss(world_size=world_size)(*mine)
    kernels.FusedSigLipLoss(world_size=world_size)(*mine)
    assert not asked
    kernels.FusedClipLoss(world_size=world_size, uneven=True)(*mine)
    return len(asked)


def on_rank(rank, world_size, image, text):
    module = kernels.FusedClipLoss(rank=rank, world_size=world_size)
    assert module.group is dist.group.WORLD
    return module(image[rank::2], text[rank::2], torch.tensor(10.0))


@pytest.mark.usefixtures("warm_operators")
def test_world_size_takes_the_default_group():
    image, text = correlated(20, 8, 0.4, 0.1)
    losses = run_ranks(on_rank, 2, image, text)
    assert error(sum(losses) / 2, kernels.fused_itc_loss(image, text, 10.0)) <= 1e-6


@pytest.mark.usefixtures("warm_operators")
def test_uneven_ranks():
    image, text = correlated(20, 8, 0.4, 0.1)
    losses = run_ranks(on_uneven_rank, 2, image, text)
    assert error(sum(losses) / 2, kernels.fused_itc_loss(image, text, 10.0)) <= 1e-6


@pytest.mark.usefixtures("warm_operators")
def test_equal_ranks_exchange_no_sizes():
    assert run_ranks(exchanges, 2, *correlated(20, 8, 0.4, 0.1)) == [1, 1]


def told_of_unequal_ranks(rank, world_size, image, text):
    with pytest.raises(ValueError, match=r"counts must be those of the ranks, \[3, 17\]"):
        mine = slice(0, 3) if rank == 0 else slice(3, None)
        kernels.FusedClipLoss(world_size=world_size)(image[mine], text[mine], torch.tensor(10.0))
    return 1


@pytest.mark.usefixtures("warm_operators")
def test_unequal_ranks_are_told_where_values_are_checked(monkeypatch):
    monkeypatch.setenv("KERNELS_CHECK", "1")
    assert run_ranks(told_of_unequal_ranks, 2, *correlated(20, 8, 0.4, 0.1)) == [1, 1]


@pytest.mark.parametrize("module", [kernels.FusedClipLoss, kernels.FusedSigLipLoss])
def test_a_world_without_its_group_is_an_error(module):
    with pytest.raises(ValueError, match="process group must be initialised before"):
        module(world_size=8)
