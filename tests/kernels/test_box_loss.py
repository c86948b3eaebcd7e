import pytest
import torch

import kernels
from kernels.box_loss import MIN_AREA
from tests.kernels.masking import DTYPES, INTERPRETED, assert_within_budget, device_of, fused

IMPLS = fused("box_loss")
# one; few; one past a tile
COUNTS = (7, 257) if INTERPRETED else (1, 7, 257)
EVERY = pytest.mark.parametrize("impl", [*IMPLS, "reference"])


def boxes(E, dtype=torch.float32, seed=0):
    """Boxes of every size, that overlap, touch or lie apart, and which are valid."""
    generator = torch.Generator().manual_seed(seed)
    pred, target = (torch.rand(E, 4, generator=generator) for _ in range(2))
    pred[E // 2 :] = (target + 0.1 * torch.randn(E, 4, generator=generator))[E // 2 :].clamp(0, 1)
    return pred.to(dtype), target.to(dtype), torch.rand(E, generator=generator) < 0.8


def differentiate(function, pred):
    pred = pred.detach().clone().requires_grad_()
    losses = function(pred)
    weights = [torch.tensor(w, dtype=losses[0].dtype, device=pred.device) for w in (3.0, 0.5)]
    (dpred,) = torch.autograd.grad(losses, pred, weights, retain_graph=True)
    (again,) = torch.autograd.grad(losses, pred, weights)
    assert torch.equal(dpred, again) and dpred.dtype == pred.dtype
    return *(loss.detach().cpu() for loss in losses), dpred.cpu()


def loss(impl, pred, target, valid=None, **options):
    device = device_of(impl)
    valid = torch.ones(len(pred), dtype=torch.bool) if valid is None else valid
    return differentiate(
        lambda pred: kernels.box_loss(pred, target.to(device), valid.to(device), impl=impl, **options), pred.to(device)
    )


def assert_right(impl, pred, target, valid, **options):
    got, plain = (loss(name, pred, target, valid, **options) for name in (impl, "reference"))
    truth = loss("reference", pred.double(), target.double(), valid, **options)
    assert got[0].dtype == got[1].dtype == torch.float32
    for name, left, middle, right in zip(("l1", "giou", "dpred"), got, plain, truth):
        assert_within_budget(left, middle, right, name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("E", COUNTS)
def test_losses_and_gradient(impl, dtype, E):
    pred, target, valid = boxes(E, dtype)
    assert_right(impl, pred, target, valid)
    assert_right(impl, pred, target.float(), valid, reduction="sum")


def one_by_one(pred, target):
    """L1 and 1 - GIoU of a pair of boxes, in Python's numbers."""
    corners = [[b[k] + sign * b[k + 2] / 2 for sign in (-1, 1) for k in (0, 1)] for b in (pred, target)]
    (x0, y0, x1, y1), (u0, v0, u1, v1) = corners
    overlap = max(0.0, min(x1, u1) - max(x0, u0)) * max(0.0, min(y1, v1) - max(y0, v0))
    union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - overlap
    hull = (max(x1, u1) - min(x0, u0)) * (max(y1, v1) - min(y0, v0))
    return sum(abs(a - b) for a, b in zip(pred, target)), 1 - (overlap / union - (hull - union) / hull)


@EVERY
def test_definition(impl):
    pred, target, valid = boxes(12)
    pairs = [one_by_one(*pair) for pair in zip(pred[valid].tolist(), target[valid].tolist())]
    for got, expected in zip(loss(impl, pred, target, valid), zip(*pairs)):
        assert got.item() == pytest.approx(sum(expected) / len(pairs), rel=1e-5)
    for got, expected in zip(loss(impl, pred, target, valid, reduction="sum"), zip(*pairs)):
        assert got.item() == pytest.approx(sum(expected), rel=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="no kernel of Triton takes fp64")
@pytest.mark.parametrize("which", (0, 1), ids=("l1", "giou"))
def test_gradient_is_that_of_the_loss(which):
    pred, target, valid = boxes(9, torch.float64)
    assert torch.autograd.gradcheck(
        lambda pred: kernels.box_loss(pred, target, valid, impl="cpu")[which], pred.requires_grad_()
    )


@EVERY
def test_equal_boxes_cost_nothing(impl):
    box = torch.tensor([[0.31, 0.7, 0.123, 0.6], [0.5, 0.5, 1.0, 1.0], [0.2, 0.3, 0.0, 0.4], [0.9, 0.1, 0.0, 0.0]])
    l1, giou, dpred = loss(impl, box, box)
    assert l1.item() == giou.item() == 0 and not dpred.any()


@EVERY
def test_boxes_far_apart(impl):
    pred, target = torch.tensor([[0.02, 0.02, 0.04, 0.04]]), torch.tensor([[0.97, 0.97, 0.06, 0.06]])
    _, giou, dpred = loss(impl, pred, target)
    assert 1 < giou.item() < 2
    # towards the target, where the sides of the boxes no longer meet; and larger
    assert (dpred < 0).all()


@EVERY
def test_rows_that_are_not_valid_do_not_count(impl):
    pred, target, valid = boxes(6)
    valid[:] = torch.tensor([True, False, True, False, True, False])
    expected = loss(impl, pred[valid], target[valid])
    for rubbish in (0.0, 1e30, float("inf"), float("nan")):
        pred[~valid], target[~valid] = rubbish, rubbish / 2 - 1
        l1, giou, dpred = loss(impl, pred, target, valid)
        assert torch.allclose(l1, expected[0]) and torch.allclose(giou, expected[1])
        assert torch.allclose(dpred[valid], expected[2]) and dpred[~valid].eq(0).all()


@EVERY
def test_no_valid_box(impl):
    for E in (0, 3):
        for reduction in ("mean", "sum"):
            pred, target, _ = boxes(E)
            valid = torch.zeros(E, dtype=torch.bool)
            l1, giou, dpred = loss(impl, pred, target, valid, reduction=reduction)
            assert l1.item() == giou.item() == 0 and dpred.shape == (E, 4) and not dpred.any()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.float16], ids=str)
def test_degenerate_boxes_are_finite(impl, dtype):
    sides = (0.0, 1e-7, 1.0) if INTERPRETED else (0.0, 1e-30, 1e-7, 1e-4, -0.2, 1.0)
    # every pair of a predicted and a true size, in the same place and elsewhere
    pairs = [(x, w, h, u, v) for x in (0.3, 0.5, 0.8) for w in sides for h in sides for u in sides for v in sides]
    x, w, h, u, v = torch.tensor(pairs).unbind(1)
    middle = torch.full_like(x, 0.5)
    pred, target = torch.stack([x, middle, w, h], 1), torch.stack([middle, middle, u, v], 1)
    for start in range(0, len(pairs), len(pairs) // 4):
        part = slice(start, start + len(pairs) // 4)
        l1, giou, dpred = loss(impl, pred[part].to(dtype), target[part].to(dtype))
        assert l1.isfinite() and 0 <= giou < 2
        # a gradient of 1 / side may pass the range of fp16
        assert dpred.isfinite().all() if dtype == torch.float32 else not dpred.isnan().any()


@EVERY
def test_a_negative_side_counts_as_none(impl):
    target = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
    negative, none = torch.tensor([[0.5, 0.4, -0.3, 0.2]]), torch.tensor([[0.5, 0.4, 0.0, 0.2]])
    assert torch.equal(loss(impl, negative, target)[1], loss(impl, none, target)[1])
    # what pulls it back is L1 alone
    assert loss(impl, negative, target)[2][0, 2].item() == -3.0


@EVERY
def test_sixteen_bits_are_promoted(impl):
    for dtype in DTYPES[1:]:
        pred, target, valid = boxes(40, dtype)
        got, expected = loss(impl, pred, target, valid), loss(impl, pred.float(), target.float(), valid)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        assert torch.equal(got[2], expected[2].to(dtype))


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    device = device_of(impl)
    pred, target, valid = boxes(9)
    expected = loss("reference", pred, target, valid)
    by_columns = pred.T.contiguous().to(device).T
    wide = torch.zeros(9, 8, device=device)
    wide[:, 1::2] = target.to(device)
    flags = torch.zeros(18, dtype=torch.bool, device=device)
    flags[::2] = valid.to(device)
    by_columns.requires_grad_()
    l1, giou = kernels.box_loss(by_columns, wide[:, 1::2], flags[::2], impl=impl)
    (dpred,) = torch.autograd.grad(3 * l1 + 0.5 * giou, by_columns)
    for left, right in zip((l1, giou, dpred), expected):
        assert torch.allclose(left.detach().cpu(), right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_without_a_graph_break_and_has_one_derivative(impl):
    device = device_of(impl)
    pred, target, valid = (t.to(device) for t in boxes(8))
    assert not any(value.requires_grad for value in kernels.box_loss(pred, target, valid, impl=impl))
    pred.requires_grad_()

    def step(pred):
        l1, giou = kernels.box_loss(pred.sigmoid(), target, valid, impl=impl)
        return l1 + giou

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(step(pred), compiled(pred))
    assert torch.equal(*(torch.autograd.grad(function(pred), pred)[0] for function in (step, compiled)))
    (dpred,) = torch.autograd.grad(step(pred), pred, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        dpred.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_one_loss_alone_has_its_gradient(impl):
    pred, target, valid = (t.to(device_of(impl)) for t in boxes(8))

    def gradient(impl, which):
        leaf = pred.clone().requires_grad_()
        kernels.box_loss(leaf, target, valid, impl=impl)[which].backward()
        return leaf.grad

    for which in (0, 1):
        assert torch.allclose(gradient(impl, which), gradient("reference", which), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(INTERPRETED, reason="no kernel of Triton is called")
def test_operator_is_well_formed():
    pred, target, valid = boxes(5)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.sycoca_kernels.box_loss
    torch.library.opcheck(operator, (pred.requires_grad_(), target, valid, True, MIN_AREA, "cpu"), test_utils=tests)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"pred": torch.ones(3, 5)}, ValueError, r"pred must be \(E, 4\), got \(3, 5\)"),
        ({"pred": torch.ones(3, 4).int()}, TypeError, "pred must be floating, got torch.int32"),
        ({"target": torch.ones(2, 4)}, ValueError, r"target must be \(3, 4\), got \(2, 4\)"),
        ({"target": torch.ones(3, 4).long()}, TypeError, "target must be floating, got torch.int64"),
        ({"target": torch.ones(3, 4, requires_grad=True)}, ValueError, "target must not require a gradient"),
        ({"valid": torch.ones(3, 1, dtype=torch.bool)}, ValueError, r"valid must be \(3,\), got \(3, 1\)"),
        ({"valid": torch.ones(3)}, TypeError, "valid must be torch.bool, got torch.float32"),
        ({"reduction": "none"}, ValueError, "reduction must be mean or sum, got 'none'"),
        ({"impl": "fast"}, ValueError, "impl must be 'auto' or one of .*, got 'fast'"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"pred": torch.ones(3, 4), "target": torch.ones(3, 4), "valid": torch.ones(3, dtype=torch.bool)}
    arguments |= change
    with pytest.raises(error, match=f"box_loss: {message}"):
        kernels.box_loss(arguments.pop("pred"), arguments.pop("target"), arguments.pop("valid"), **arguments)


def test_values_are_checked_on_demand(monkeypatch):
    monkeypatch.setenv("KERNELS_CHECK", "1")
    pred, target, valid = boxes(3)
    valid[:] = torch.tensor([True, True, False])
    target[2] = float("nan")
    kernels.box_loss(pred, target, valid)
    target[1, 2] = 1.5
    with pytest.raises(ValueError, match=r"box_loss: valid rows of target must be in 0 .. 1, got \[\["):
        kernels.box_loss(pred, target, valid)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_prediction_that_is_no_number_is_not_hidden(impl):
    pred, target, valid = boxes(4)
    valid[0] = True
    pred[0, 2] = float("nan")
    l1, giou = kernels.box_loss(*(x.to(device_of(impl)) for x in (pred, target, valid)), impl=impl)
    assert (l1 + giou).isnan()
