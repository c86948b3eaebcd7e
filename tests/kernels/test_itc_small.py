import math

import pytest
import torch

import kernels
from kernels import itc_small, reference, tuning
from tests.kernels.contrastive import ADVERSARIAL, BARS, REGIMES, correlated, error, errors, with_gradients, within

SCALE = 14.3


def small(image, text, scale):
    return kernels.fused_itc_loss(image, text, scale, impl="cpu")


def truth(image, text, scale):
    return with_gradients(reference.itc_loss, image.double(), text.double(), torch.tensor(scale).double())


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """How often the form ran, so that no test passes by another one."""
    found, loss = [], itc_small.loss
    monkeypatch.setattr(itc_small, "loss", lambda *args: (found.append(1), loss(*args))[1])
    return found


# 1: alone, no other to tell from; 2: one other; 7: odd.
@pytest.mark.parametrize(("B", "D"), [(1, 1), (2, 3), (7, 1), (65, 33)])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_sizes(B, D, scale, calls):
    image, text = correlated(B, D, 0.3, 0.05) if D > 1 else (torch.randn(B, D), torch.randn(B, D))
    exact = truth(image, text, scale)
    got = errors(with_gradients(small, image, text, torch.tensor(scale)), exact)
    budget = errors(with_gradients(reference.itc_loss, image, text, torch.tensor(scale)), exact)
    assert calls
    assert within(got, budget, BARS[torch.float32, scale]), (got, budget)


@pytest.mark.parametrize("inputs", [*REGIMES.values(), *ADVERSARIAL.values()], ids=[*REGIMES, *ADVERSARIAL])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_regimes(inputs, scale, calls):
    image, text = inputs(300, 24)
    exact = truth(image, text, scale)
    got = with_gradients(small, image, text, torch.tensor(scale))
    assert calls and all(x.isfinite().all() for x in got)
    budget = errors(with_gradients(reference.itc_loss, image, text, torch.tensor(scale)), exact)
    assert within(errors(got, exact), budget, BARS[torch.float32, scale]), (errors(got, exact), budget)


@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_bf16_under_autocast(name, scale, calls):
    image, text = (x.bfloat16().float() for x in REGIMES[name](300, 64))
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(small, image, text, torch.tensor(scale))
    assert calls and all(x.dtype == torch.float32 for x in got)
    assert max(errors(got, truth(image, text, scale))) <= BARS[torch.bfloat16, scale]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_leaves(dtype, calls):
    image, text = (x.to(dtype) for x in correlated(200, 48, 0.4, 0.1))
    got = with_gradients(small, image, text, torch.tensor(SCALE))
    assert calls
    for mine, gradient in zip(got[1:3], truth(image, text, SCALE)[1:3]):
        assert mine.dtype == dtype
        rounding = error(gradient.to(dtype), gradient)
        assert error(mine, gradient) <= math.hypot(rounding, BARS[torch.bfloat16, SCALE])


@pytest.mark.parametrize("frozen", range(3))
def test_frozen_inputs_and_two_backwards(frozen):
    inputs = [*correlated(20, 8, 0.4, 0.1), torch.tensor([SCALE])]
    expected = truth(*inputs[:2], SCALE)[1:]
    leaves = [x.clone().requires_grad_(number != frozen) for number, x in enumerate(inputs)]
    value = small(*leaves)
    learning = [x for x in leaves if x.requires_grad]
    first = torch.autograd.grad(value, learning, retain_graph=True)
    second = torch.autograd.grad(value, learning)
    del expected[frozen]
    for one, other, exact in zip(first, second, expected, strict=True):
        assert torch.equal(one, other)
        assert error(one.reshape(exact.shape), exact) < 1e-6


def test_compiled_without_a_graph_break():
    leaves = [x.requires_grad_() for x in (*correlated(20, 8, 0.4, 0.1), torch.tensor([SCALE]))]
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    eager = torch.autograd.grad(small(*leaves), leaves)
    for one, other in zip(torch.autograd.grad(compiled(*leaves), leaves), eager):
        assert torch.equal(one, other)


def test_bound_of_the_form(calls):
    side = math.isqrt(tuning.WHOLE_MATRIX_PAIRS)
    small(*correlated(side + 1, 4, 0.3, 0.0), 1.0)
    assert not calls
    small(*correlated(side, 4, 0.3, 0.0), 1.0)
    assert calls
