import math

import pytest
import torch
import torch.distributed as dist

import kernels
from kernels import reference
from tests.kernels.contrastive import BARS, correlated, errors, with_gradients
from tests.ranks import run_ranks

B, D = 60, 16
# Unequal shares of the batch; one rank holds nothing.
CUTS = {1: (0, 60), 2: (0, 23, 60), 3: (0, 23, 23, 60), 4: (0, 10, 11, 40, 60)}
IDS = torch.randint(0, 20, (B,), generator=torch.Generator().manual_seed(1))
OPTIONS = {
    "pairs": {},
    "ids": {"ids": IDS},
    "smoothing": {"label_smoothing": 0.1},
    "ids, smoothing": {"ids": IDS, "label_smoothing": 0.1},
}
pytestmark = pytest.mark.usefixtures("warm_operators")


def on_rank(rank, world_size, image, text, scale, options, impl, early, chunks):
    """Loss and gradients of one rank, gradients of `chunks` equal calls averaged."""
    rows = slice(CUTS[world_size][rank], CUTS[world_size][rank + 1])
    options = {name: value[rows] if name == "ids" else value for name, value in options.items()}
    leaves = [image[rows].clone(), text[rows].clone(), torch.tensor([scale])]
    for leaf in leaves:
        leaf.requires_grad_()
    group = dist.group.WORLD
    for _ in range(chunks):
        if early:
            ids = options.get("ids")
            rest = {name: value for name, value in options.items() if name != "ids"}
            loss = kernels.fused_itc_loss(
                leaves[0], kernels.gather_texts(leaves[1], ids, group=group), leaves[2], impl=impl, **rest
            )
        else:
            loss = kernels.fused_itc_loss(*leaves, group=group, impl=impl, **options)
        (loss / chunks).backward()
    return loss.detach(), *(leaf.grad for leaf in leaves)


def mean_over_ranks(results):
    """What DDP and ZeRO make of the ranks' losses and gradients."""
    world_size = len(results)
    loss, image, text, scale = zip(*results)
    return sum(loss) / world_size, torch.cat(image) / world_size, torch.cat(text) / world_size, sum(scale) / world_size


@pytest.mark.parametrize("world_size", CUTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("schedule", ["gather", "early", "ring", "reference"])
def test_mean_over_ranks_is_the_gradient_of_the_batch(world_size, options, schedule):
    image, text = correlated(B, D, 0.4, 0.1)
    exact = reference_gradients(image, text, 14.3, options)
    impl = "reference" if schedule == "reference" else "cpu"
    how = {"schedule": "ring"} if schedule == "ring" else {}
    results = run_ranks(on_rank, world_size, image, text, 14.3, {**options, **how}, impl, schedule == "early", 1)
    # The plain composition cancels in the scale's gradient, on one process as on several.
    bar = 1e-5 if schedule == "reference" else BARS[torch.float32, 14.3]
    assert max(errors(mean_over_ranks(results), exact)) <= bar


@pytest.mark.parametrize("schedule", ["gather", "ring"])
def test_unsafe_sums_on_one_rank_send_all_to_the_online_form(schedule):
    image, text = correlated(B, D, 0.3, 0.0)
    image[:20], text[:] = correlated(B, D, -0.9, -0.9)[0][:20], correlated(B, D, -0.9, -0.9)[1]
    exact = reference_gradients(image, text, 100.0, {})
    results = run_ranks(on_rank, 3, image, text, 100.0, {"schedule": schedule}, "cpu", False, 1)
    assert max(errors(mean_over_ranks(results), exact)) <= BARS[torch.float32, 100.0]


def test_accumulation_averages_separate_batches():
    image, text = correlated(B, D, 0.4, 0.1)
    results = run_ranks(on_rank, 2, image, text, 14.3, {}, "cpu", False, 2)
    assert (
        max(errors(mean_over_ranks(results), reference_gradients(image, text, 14.3, {}))) <= BARS[torch.float32, 14.3]
    )


def test_low_precision_text_gradients_are_summed_in_fp32():
    image, text = (x.bfloat16() for x in correlated(B, D, 0.4, 0.1))
    _, *exact = reference_gradients(image, text, 14.3, {})
    results = mean_over_ranks(run_ranks(on_rank, 4, image, text, 14.3, {}, "cpu", False, 1))
    rounded = exact[1].bfloat16()
    rounding = errors([rounded], [exact[1]])[0]
    assert errors([results[2]], [exact[1]])[0] <= math.hypot(rounding, BARS[torch.bfloat16, 14.3])


def group_of_two(rank, world_size, image, text):
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = pairs[rank % 2]
    rows = slice(30 * (rank // 2), 30 * (rank // 2) + 30)
    leaves = [x[rows].clone().requires_grad_() for x in (image[rank % 2], text[rank % 2])]
    loss = kernels.fused_itc_loss(*leaves, 14.3, group=group, impl="cpu")
    loss.backward()
    with pytest.raises(ValueError, match="must be a member of the group"):
        kernels.fused_itc_loss(*leaves, 14.3, group=pairs[1 - rank % 2])
    return loss.detach(), *(leaf.grad for leaf in leaves)


def test_groups_smaller_than_the_world():
    batches = [correlated(B, D, 0.4, 0.1, seed) for seed in (0, 1)]
    results = run_ranks(group_of_two, 4, *zip(*batches))
    for index, (image, text) in enumerate(batches):
        loss, dimage, dtext, _ = reference_gradients(image, text, 14.3, {})
        mine = [results[index], results[index + 2]]
        got = sum(x[0] for x in mine) / 2, torch.cat([x[1] for x in mine]) / 2, torch.cat([x[2] for x in mine]) / 2
        assert max(errors(got, (loss, dimage, dtext))) <= BARS[torch.float32, 14.3]


def two_passes(rank, world_size, image, text, weights):
    """GradCache: features without a graph, gradient of the loss at them, then the towers chunk by chunk."""
    rows = slice(CUTS[world_size][rank], CUTS[world_size][rank + 1])
    towers = [w.clone().requires_grad_() for w in weights]
    inputs = image[rows], text[rows]
    with torch.no_grad():
        features = [x @ w for x, w in zip(inputs, towers)]
    leaves = [x.requires_grad_() for x in features]
    kernels.fused_itc_loss(*leaves, 1.0, group=dist.group.WORLD, impl="cpu").backward()
    for x, w, leaf in zip(inputs, towers, leaves):
        for part, gradient in zip(x.split(7), leaf.grad.split(7)):
            ((part @ w) * gradient).sum().backward()
    return [w.grad for w in towers]


def test_two_pass_training():
    image, text = correlated(B, D, 0.4, 0.1)
    weights = [torch.randn(D, D, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]

    def whole(image_weight, text_weight):
        return reference.itc_loss(
            image.double() @ image_weight, text.double() @ text_weight, torch.tensor(1.0).double()
        )

    exact = with_gradients(whole, *(w.double() for w in weights))[1:]
    results = run_ranks(two_passes, 2, image, text, weights)
    assert max(errors([sum(x) / 2 for x in zip(*results)], exact)) <= 1e-5


def known_counts(rank, world_size, text):
    b = (4, 2)[rank]
    handle = kernels.gather_texts(text[rank, :b], group=dist.group.WORLD, counts=(4, 2))
    loss = kernels.fused_itc_loss(text[rank, :b], text[rank, :b], 1.0, group=dist.group.WORLD, counts=(4, 2))
    assert torch.equal(loss, kernels.fused_itc_loss(text[rank, :b], handle, 1.0))
    with pytest.raises(ValueError, match="counts must give b of 2 ranks"):
        kernels.gather_texts(text[rank], group=dist.group.WORLD, counts=(3, 3))
    with pytest.raises(ValueError, match="group must be the handle's"):
        kernels.fused_itc_loss(text[rank, :b], handle, 1.0, group=dist.new_group([0, 1]))
    return handle.wait()[0]


def test_counts_that_are_known_are_not_exchanged():
    text = torch.randn(2, 4, 3)
    for gathered in run_ranks(known_counts, 2, text):
        assert torch.equal(gathered, torch.cat((text[0], text[1, :2])))


def test_a_failing_rank_is_reported():
    def fails(rank, world_size):
        raise KeyError("broken on purpose")

    with pytest.raises(RuntimeError, match="broken on purpose"):
        run_ranks(fails, 2)


def reference_gradients(image, text, scale, options):
    """Of the whole batch, in fp64; the scale has shape (1,)."""
    return with_gradients(
        lambda i, t, s: reference.itc_loss(i, t, s, **options),
        image.double(),
        text.double(),
        torch.tensor([scale]).double(),
    )
