import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import itc, reference, tuning
from tests.kernels.contrastive import ADVERSARIAL, BARS, REGIMES, correlated, error, errors, with_gradients, within

SCALE = 14.3


@pytest.fixture(autouse=True)
def blocks_at_every_size(monkeypatch):
    """`test_itc_small.py` holds the form that small batches get."""
    monkeypatch.setattr(tuning, "WHOLE_MATRIX_PAIRS", 0)


def fused(**options):
    return lambda image, text, scale: kernels.fused_itc_loss(image, text, scale, impl="cpu", **options)


def plain(**options):
    return lambda image, text, scale: reference.itc_loss(image, text, scale, **options)


def truth(image, text, scale, **options):
    return with_gradients(plain(**options), image.double(), text.double(), torch.tensor(scale).double())


def test_reference_is_cross_entropy_in_both_directions():
    image, text = (x.double() for x in correlated(9, 5, 0.4, 0.1))
    scale = torch.tensor(SCALE).double()
    logits, labels = scale * image @ text.T, torch.arange(9)
    for eps in (0.0, 0.2):
        pair = [F.cross_entropy(x, labels, label_smoothing=eps) for x in (logits, logits.T)]
        value = reference.itc_loss(image, text, scale, label_smoothing=eps)
        assert value.item() == pytest.approx(sum(pair).item() / 2, rel=1e-12)


def test_reference_takes_distinct_ids_as_no_ids():
    image, text = correlated(9, 5, 0.4, 0.1)
    with_ids = reference.itc_loss(image, text, torch.tensor(SCALE), ids=torch.randperm(9))
    assert torch.equal(with_ids, reference.itc_loss(image, text, torch.tensor(SCALE)))


# 1: alone; 2 and 7: one short block; 1025: one past a block of rows.
@pytest.mark.parametrize(("B", "D"), [(1, 1), (2, 3), (7, 1), (1025, 33)])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_sizes(B, D, scale):
    image, text = correlated(B, D, 0.3, 0.05) if D > 1 else (torch.randn(B, D), torch.randn(B, D))
    exact = truth(image, text, scale)
    got = errors(with_gradients(fused(), image, text, torch.tensor(scale)), exact)
    budget = errors(with_gradients(plain(), image, text, torch.tensor(scale)), exact)
    assert within(got, budget, BARS[torch.float32, scale]), (got, budget)


@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_regimes_fp32(name, scale):
    image, text = REGIMES[name](1500, 64)
    exact = truth(image, text, scale)
    got = errors(with_gradients(fused(), image, text, torch.tensor(scale)), exact)
    budget = errors(with_gradients(plain(), image, text, torch.tensor(scale)), exact)
    assert within(got, budget, BARS[torch.float32, scale]), (got, budget)


@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_regimes_bf16_under_autocast(name, scale):
    image, text = (x.bfloat16().float() for x in REGIMES[name](1500, 64))
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(fused(), image, text, torch.tensor(scale))
    assert all(x.dtype == torch.float32 for x in got)
    assert max(errors(got, truth(image, text, scale))) <= BARS[torch.bfloat16, scale]


@pytest.mark.full
@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_regimes_at_the_documented_size(name, scale):
    image, text = (x.bfloat16().float() for x in REGIMES[name](4096, 512))
    exact = truth(image, text, scale)
    budget = errors(with_gradients(plain(), image, text, torch.tensor(scale)), exact)
    got = errors(with_gradients(fused(), image, text, torch.tensor(scale)), exact)
    assert within(got, budget, BARS[torch.float32, scale]), (got, budget)
    with torch.autocast("cpu", torch.bfloat16):
        got = errors(with_gradients(fused(), image, text, torch.tensor(scale)), exact)
    assert max(got) <= BARS[torch.bfloat16, scale]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_leaves_lose_only_the_rounding_of_the_gradient(dtype):
    image, text = (x.to(dtype) for x in correlated(700, 48, 0.4, 0.1))
    got = with_gradients(fused(), image, text, torch.tensor(SCALE))
    exact = truth(image, text, SCALE)
    assert got[0].dtype == torch.float32
    for mine, gradient in zip(got[1:3], exact[1:3]):
        assert mine.dtype == dtype
        rounding = error(gradient.to(dtype), gradient)
        assert error(mine, gradient) <= math.hypot(rounding, BARS[torch.bfloat16, SCALE])


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_adversarial_inputs(name, scale):
    image, text = ADVERSARIAL[name](300, 24)
    exact = truth(image, text, scale)
    got = with_gradients(fused(), image, text, torch.tensor(scale))
    assert all(x.isfinite().all() for x in got)
    budget = errors(with_gradients(plain(), image, text, torch.tensor(scale)), exact)
    assert within(errors(got, exact), budget, BARS[torch.float32, scale]), (errors(got, exact), budget)


def test_unsafe_sums_take_the_online_form():
    image, text = correlated(64, 256, -0.8, -0.8)
    largest = 100.0 / math.log(2.0) * (image @ text.T).amax(1)
    assert largest.min() < itc.EXPONENT_MIN  # a common shift loses a whole row
    assert kernels.fused_itc_loss(image, text, 100.0, impl="cpu").isfinite()


@pytest.mark.parametrize(("classes", "eps"), [(None, 0.1), (40, 0.0), (40, 0.1), (1, 0.0), (10**9, 0.0)])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_ids_and_label_smoothing(classes, eps, scale):
    image, text = correlated(300, 24, 0.5, 0.1)
    options = {"label_smoothing": eps}
    if classes is not None:
        options["ids"] = torch.randint(-classes, classes, (300,), generator=torch.Generator().manual_seed(1))
    exact = truth(image, text, scale, **options)
    got = errors(with_gradients(fused(**options), image, text, torch.tensor(scale)), exact)
    budget = errors(with_gradients(plain(**options), image, text, torch.tensor(scale)), exact)
    assert within(got, budget, BARS[torch.float32, scale]), (got, budget)


@pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=3))[:-1])
def test_frozen_inputs(frozen):
    image, text = correlated(50, 8, 0.4, 0.1)
    exact = truth(image, text, SCALE)[1:]
    leaves = [x.clone().requires_grad_(not f) for x, f in zip((image, text, torch.tensor([SCALE])), frozen)]
    kernels.fused_itc_loss(*leaves, impl="cpu").backward()
    for leaf, gradient, still in zip(leaves, exact, frozen):
        assert (leaf.grad is None) == still
        if not still:
            assert leaf.grad.shape == leaf.shape
            assert error(leaf.grad.reshape(gradient.shape), gradient) <= BARS[torch.float32, SCALE]


def test_frozen_tower_skips_its_product(monkeypatch):
    products = []
    original = torch.Tensor.addmm_
    monkeypatch.setattr(
        torch.Tensor, "addmm_", lambda self, *args, **kw: products.append(1) or original(self, *args, **kw)
    )
    image, text = correlated(50, 8, 0.4, 0.1)
    for image_learns, text_learns in ((True, True), (True, False), (False, True)):
        products.clear()
        leaves = image.clone().requires_grad_(image_learns), text.clone().requires_grad_(text_learns)
        kernels.fused_itc_loss(*leaves, SCALE, impl="cpu").backward()
        assert len(products) == image_learns + text_learns


def test_strides():
    image, text = correlated(50, 8, 0.4, 0.1)
    expected = with_gradients(fused(), image, text, torch.tensor(SCALE))
    wide = torch.full((50, 24), math.nan)
    wide[:, ::3] = image
    columns = text.T.contiguous().T
    leaves = wide.requires_grad_(), columns.detach().requires_grad_(), torch.tensor(SCALE, requires_grad=True)
    value = kernels.fused_itc_loss(leaves[0][:, ::3], leaves[1], leaves[2], impl="cpu")
    gradients = torch.autograd.grad(value, leaves)
    assert error(gradients[0][:, ::3], expected[1]) <= BARS[torch.float32, SCALE]
    assert error(gradients[1], expected[2]) <= BARS[torch.float32, SCALE]


@pytest.mark.parametrize("scale", [torch.tensor(SCALE), torch.tensor([SCALE]), torch.tensor([[SCALE]]).double(), SCALE])
def test_forms_of_the_scale(scale):
    image, text = correlated(20, 8, 0.4, 0.1)
    assert kernels.fused_itc_loss(image, text, scale, impl="cpu").item() == pytest.approx(
        truth(image, text, SCALE)[0].item()
    )


def test_scratch_bound_changes_blocks_only():
    image, text = correlated(257, 8, 0.4, 0.1)
    small = with_gradients(fused(scratch_bytes=2000), image, text, torch.tensor(SCALE))
    assert max(errors(small, truth(image, text, SCALE))) <= BARS[torch.float32, SCALE]


def test_backward_twice_and_no_second_derivative():
    image, text = (x.requires_grad_() for x in correlated(20, 8, 0.4, 0.1))
    value = kernels.fused_itc_loss(image, text, SCALE, impl="cpu")
    first = torch.autograd.grad(value, image, retain_graph=True)[0]
    (second,) = torch.autograd.grad(value, image, create_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError):
        second.sum().backward()


def test_operators_pass_opcheck():
    image, text = (x.requires_grad_() for x in correlated(6, 4, 0.4, 0.1))
    scale = torch.tensor([SCALE])
    ops, product = torch.ops.sycoca_kernels, torch.float32
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.itc_prologue, (image, text, scale, product, "cpu"), test_utils=tests)
    shift, safe = torch.zeros(()), torch.tensor(False)
    sums = (image, text, scale, shift, None, None, None, 0.0, 0, product, 0, "cpu")
    torch.library.opcheck(ops.itc_sums, sums, test_utils=tests)
    torch.library.opcheck(ops.itc_online, (image, text, scale, safe, 0, product, 0, "cpu"), test_utils=tests)
    stats = torch.ones(2, 6), torch.ones(2, 6), torch.zeros(6), safe
    for need in itertools.product([False, True], repeat=3):
        grads = (torch.ones(()), image, text, scale, *stats, None, None, None, 0.0, 0, *need, product, 0, "cpu")
        torch.library.opcheck(ops.itc_grads, grads, test_utils=tests)


def test_compiles_without_a_graph_break():
    image, text = (x.requires_grad_() for x in correlated(20, 8, 0.4, 0.1))
    scale = torch.tensor([SCALE], requires_grad=True)

    def loss(image, text, scale):
        return kernels.fused_itc_loss(2 * image, text, scale, impl="cpu")

    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(step(image, text, scale), (image, text, scale))
    want = torch.autograd.grad(loss(image, text, scale), (image, text, scale))
    assert max(errors(got, want)) <= 1e-6


def test_float64_is_the_specification():
    image, text = (x.double() for x in correlated(20, 8, 0.4, 0.1))
    assert kernels.fused_itc_loss(image, text, SCALE).dtype == torch.float64
    with pytest.raises(TypeError, match="cpu takes no float64"):
        kernels.fused_itc_loss(image, text, SCALE, impl="cpu")


WRONG = [
    ({"image": torch.ones(2, 3, 1)}, ValueError, r"image must be \(b, D\)"),
    ({"image": torch.ones(2, 4)}, ValueError, "one shape"),
    ({"image": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "image must be fp64"),
    ({"text": torch.ones(2, 3, dtype=torch.bfloat16)}, TypeError, "one dtype"),
    ({"text": [[1.0]]}, TypeError, "text must be a tensor"),
    ({"text": torch.ones(2, 3, device="meta")}, ValueError, "one device"),
    ({"logit_scale": 0.0}, ValueError, "logit_scale must be positive"),
    ({"logit_scale": "1"}, TypeError, "logit_scale must be a float or a tensor"),
    ({"logit_scale": torch.ones(2)}, ValueError, "one element"),
    ({"ids": torch.zeros(2, dtype=torch.int32)}, TypeError, "ids must be torch.int64"),
    ({"ids": torch.zeros(3, dtype=torch.int64)}, ValueError, r"ids must be \(2,\)"),
    ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\)"),
    ({"label_smoothing": None}, TypeError, "label_smoothing must be a float"),
    ({"schedule": "tree"}, ValueError, "schedule must be one of gather, ring"),
    ({"scratch_bytes": 0}, ValueError, "scratch_bytes must be positive"),
    ({"counts": (2,)}, ValueError, "counts belong to a group"),
    ({"scratch_bytes": 1.5}, TypeError, "scratch_bytes must be an int"),
    ({"image": torch.ones(0, 3), "text": torch.ones(0, 3)}, ValueError, "at least one pair"),
]


@pytest.mark.parametrize(("change", "kind", "message"), WRONG)
def test_wrong_arguments(change, kind, message):
    arguments = {"image": torch.ones(2, 3), "text": torch.ones(2, 3), "logit_scale": 1.0, **change}
    with pytest.raises(kind, match=f"fused_itc_loss: .*{message}"):
        kernels.fused_itc_loss(**arguments)


def test_values_are_checked_on_request(monkeypatch):
    bad = torch.tensor([[1.0, math.nan]])
    assert kernels.fused_itc_loss(bad, bad, 1.0).isnan()
    monkeypatch.setenv("KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match="image must be finite"):
        kernels.fused_itc_loss(bad, bad, 1.0)
