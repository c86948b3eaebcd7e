"""A batch in parts has the gradient of the batch at once, on any number of ranks."""

import pytest
import torch
import torch.distributed as dist

from sycoca.contrast import Spread, contrastive_loss
from sycoca.model import Batch
from sycoca.two_pass import first_pass
from tests.ranks import run_ranks
from tests.sycoca.micro import ATTENTIVE, RANDOM, batch, build, gradients, micro

# Sixteen pairs, very different numbers of tokens, empty captions among them.
LENGTHS = [8, 8, 7, -1, 1, 0, 5, 3, 2, 8, -1, 4, 6, 6, 1, 7]
IDS = torch.tensor([3, 1, 4, 5, 3, 9, 9, 11, 12, 13, 4, 15, 16, 3, 18, 19])
BAR = 1e-6
ALONE = Spread()


def cut(data: Batch, pieces: int) -> list[Batch]:
    size = len(data.tokens) // pieces
    return [Batch(*(None if x is None else x[i : i + size] for x in data)) for i in range(0, pieces * size, size)]


def in_parts(config, data, plan, parts, spread=ALONE):
    """Losses and gradients of one rank, averaged over the parts as an optimizer's engine does."""
    model = build(config)
    pieces = cut(data, parts)
    losses = []
    for part, piece in zip(first_pass(model, pieces, spread), pieces, strict=True):
        found = part.losses(model, piece, plan)
        (found.total / parts).backward()
        losses.append(torch.stack(found).detach())
    return torch.stack(losses).mean(0)[:5], gradients(model)


def at_once(config, data, plan):
    model = build(config)
    losses = model(data, plan)
    losses.total.backward()
    return torch.stack(losses).detach()[:5], gradients(model)


def distance(found, expected):
    """Of whole gradients, and the largest of single parameters, each relative to the norm."""
    assert found.keys() == expected.keys()
    pairs = [(found[name].double(), expected[name].double()) for name in expected]
    whole = torch.cat([(a - b).flatten() for a, b in pairs]).norm() / torch.cat([b.flatten() for _, b in pairs]).norm()
    # Some get no gradient by some objectives, and then have to get none either way.
    single = ((a - b).norm() / b.norm().clamp(min=1e-30) for a, b in pairs)
    return whole.item(), {name: error.item() for name, error in zip(expected, single)}


@pytest.mark.parametrize("schedule", ["gather", "ring"])
@pytest.mark.parametrize(("world", "parts"), [(1, 4), (1, 8), (2, 4), (4, 2)])
@pytest.mark.parametrize("plan", [RANDOM, ATTENTIVE])
def test_gradients_of_parts_are_those_of_the_batch(world, parts, plan, schedule):
    config = micro(loss={"label_smoothing": 0.1})
    data = batch(LENGTHS, ids=IDS)
    losses, expected = at_once(config, data, plan)

    def share(rank, world_size):
        spread = Spread(dist.group.WORLD, [len(LENGTHS) // world_size] * world_size, schedule)
        return in_parts(config, cut(data, world_size)[rank], plan, parts, spread)

    if world == 1:
        results = [in_parts(config, data, plan, parts)]
    else:
        results = run_ranks(share, world)
    mean = torch.stack([rank[0] for rank in results]).mean(0)
    assert (mean - losses).abs().max() <= BAR * losses.abs().max()
    found = {name: sum(rank[1][name] for rank in results) / world for name in expected}
    whole, single = distance(found, expected)
    assert whole <= BAR, whole
    assert single["logit_scale.log_scale"] <= BAR, single
    assert max(single.values()) <= 2 * BAR, single


@pytest.mark.parametrize("objectives", [("itc",), ("ic",), ("itc", "ic"), ("tgmim",)])
def test_any_objectives_may_come_in_parts(objectives):
    config = micro(objectives=objectives, masking={"attentive_start": 1.0})
    data = batch(LENGTHS)
    losses, expected = at_once(config, data, RANDOM)
    mean, found = in_parts(config, data, RANDOM, 4)
    assert (mean - losses).abs().max() <= BAR * losses.abs().max()
    assert distance(found, expected)[0] <= BAR


def test_both_passes_draw_alike():
    """With dropout the gradient is that of the graph of all parts held at once."""
    config, plan = micro(objectives=("itc",)), RANDOM
    pieces = cut(batch(LENGTHS), 4)

    def dropping():
        model = build(config)
        for tower in (model.vision.ln_post, model.text.ln_final):
            tower.register_forward_hook(lambda module, args, out: torch.nn.functional.dropout(out, 0.3))
        return model

    torch.manual_seed(5)
    held = dropping()
    texts, images = zip(
        *((held.encode_text(part.tokens).features, held.encode_image(part.images).features) for part in pieces)
    )
    loss = contrastive_loss(torch.cat(images), torch.cat(texts), held.logit_scale(), None, ALONE, 0.0)
    (loss * config.loss.itc_weight).backward()

    torch.manual_seed(5)
    model = dropping()
    for part, piece in zip(first_pass(model, pieces, ALONE), pieces, strict=True):
        (part.losses(model, piece, plan).itc / len(pieces)).backward()
    found, expected = gradients(model), gradients(held)
    assert distance({name: found[name] for name in expected}, expected)[0] <= BAR
