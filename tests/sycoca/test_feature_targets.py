"""TG-MIM that predicts features, and TG-MIM that starts late."""

import pytest
import torch

from sycoca.losses import feature_loss, feature_targets
from sycoca.masking import StepPlan, select_at_random
from sycoca.vision import VisionTransformer
from tests.sycoca.micro import ATTENTIVE, RANDOM, batch, build, gradients, micro, uniform
from tests.sycoca.test_two_pass import at_once, distance, in_parts

FEATURES = micro(loss={"tgmim_kind": "ema_features"})
# An empty caption and one of padding alone, which guide nothing.
LENGTHS = [3, 8, 0, 1, -1, 4]


def with_targets(data):
    """The batch with features of another encoder than the one that is trained."""
    other = build(FEATURES, salt=2)
    with torch.no_grad():
        return data._replace(targets=feature_targets(other.encode_image(data.images).patches))


def plain_targets(patches):
    mean = patches.mean(2, keepdim=True)
    return (patches - mean) / ((patches - mean).square().mean(2, keepdim=True) + 1e-5).sqrt()


def plain_loss(pred, targets, index):
    error = torch.stack([pred[b] - targets[b, index[b]] for b in range(len(pred))]).abs()
    return torch.where(error < 1, error.square() / 2, error - 0.5).sum()


def test_loss_and_gradient_against_fp64():
    """Values on both sides of a difference of 1, some of them far away."""
    results = []
    patches, index = 3 * uniform(3, 7, 12, salt=1) + 5, torch.tensor([[0, 4], [6, 1], [2, 3]])
    for dtype, targets, loss in (
        (torch.float64, plain_targets, plain_loss),
        (torch.float32, plain_targets, plain_loss),
        (torch.float32, feature_targets, feature_loss),
    ):
        pred = (2 * uniform(3, 2, 12, salt=2)).to(dtype).requires_grad_()
        found = loss(pred, targets(patches.to(dtype)), index)
        found.backward()
        results.append((found.detach().double(), pred.grad.double()))
    for truth, plain, mine in zip(*results):
        error, budget = (mine - truth).norm(), (plain - truth).norm()
        assert error <= 2 * budget + 4 * 2**-23 * truth.norm()


@pytest.mark.parametrize("plan", [RANDOM, ATTENTIVE])
@pytest.mark.parametrize("form", ["token", "drop"])
def test_tgmim_is_the_error_of_the_predicted_features(plan, form):
    config = micro(masking={"masked_input": form}, loss={"tgmim_kind": "ema_features"})
    model, data = build(config), with_targets(batch(LENGTHS))
    image, text = model.encode_image(data.images), model.encode_text(data.tokens)
    selection = model.select(image, text) if plan.attentive else select_at_random(data.seeds, config)
    pred = model.reconstruct(data.images, text, selection)
    assert pred.shape == (6, 8, 32)
    present = text.scored.any(1)
    error = plain_loss(pred[present].double(), data.targets[present].double(), selection.masked[present])
    torch.testing.assert_close(model(data, plan).tgmim.double(), error / (present.sum() * 8 * 32), rtol=1e-5, atol=0)


def test_targets_are_missed_by_name():
    with pytest.raises(ValueError, match=r"^Batch.targets: missing; loss.tgmim_kind 'ema_features' predicts them$"):
        build(FEATURES)(batch(LENGTHS), ATTENTIVE)


@pytest.mark.parametrize("plan", [ATTENTIVE, StepPlan(True, True, reconstruct=False)])
def test_parts_have_the_gradient_of_the_batch(plan):
    data = with_targets(batch([8, 7, -1, 1, 0, 5, 3, 2]))
    losses, expected = at_once(FEATURES, data, plan)
    found, grads = in_parts(FEATURES, data, plan, 4)
    assert (found - losses).abs().max() <= 1e-6 * losses.abs().max()
    whole, single = distance(grads, expected)
    assert whole <= 1e-6 and max(single.values()) <= 2e-6, single


@pytest.mark.parametrize("attentive", [True, False])
def test_before_its_start_tgmim_costs_nothing_and_changes_nothing_else(monkeypatch, attentive):
    config, data = micro(masking={"masked_input": "token"}), batch(LENGTHS)
    model = build(config)
    expected = model(data, StepPlan(attentive, attentive))
    monkeypatch.setattr(VisionTransformer, "encode_visible", None)
    found = model(data, StepPlan(attentive, attentive, reconstruct=False))
    assert found.tgmim == 0
    for name in ("itc", "caption", "local", "mask_overlap"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    torch.testing.assert_close(found.total, expected.total - expected.tgmim)
    found.total.backward()
    decoder = {name for name, _ in model.named_parameters() if name.startswith("image_decoder.")}
    missing = {name for name, _ in model.named_parameters()} - gradients(model).keys()
    assert missing == decoder | {"vision.sequence.mask_token"}
