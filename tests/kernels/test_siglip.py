import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import kernels
from kernels import reference
from tests.kernels.contrastive import ADVERSARIAL, correlated, error, errors, with_gradients
from tests.ranks import run_ranks

SCALE, BIAS = torch.tensor([10.0]), torch.tensor([-10.0])
BAR = {torch.float32: 2e-6, torch.bfloat16: 1e-4}


def fused(*inputs, **options):
    return kernels.fused_siglip_loss(*inputs, impl="cpu", **options)


def truth(*inputs):
    return with_gradients(reference.siglip_loss, *(x.double() for x in inputs))


def test_reference_is_the_published_algorithm():
    image, text = (x.double() for x in correlated(9, 5, 0.4, 0.1))
    labels = 2 * torch.eye(9) - 1
    published = -F.logsigmoid(labels * (image @ text.T * 10.0 - 10.0)).sum() / 9
    assert reference.siglip_loss(image, text, SCALE, BIAS).item() == pytest.approx(published.item(), rel=1e-12)


# 1: alone; 7: one short block; 1025: one past a block of rows.
@pytest.mark.parametrize(("B", "D"), [(1, 1), (7, 3), (1025, 33)])
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, 3.0), (1.0, 0.0)])
def test_sizes(B, D, scale, bias):
    image, text = correlated(B, D, 0.3, 0.05) if D > 1 else (torch.randn(B, D), torch.randn(B, D))
    inputs = image, text, torch.tensor(scale), torch.tensor([bias])
    exact = truth(*inputs)
    budget = errors(with_gradients(reference.siglip_loss, *inputs), exact)
    for mine, theirs in zip(errors(with_gradients(fused, *inputs), exact), budget):
        assert mine <= max(theirs, BAR[torch.float32])


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_inputs(name):
    inputs = *ADVERSARIAL[name](300, 24), torch.tensor(100.0), BIAS
    exact = truth(*inputs)
    got = with_gradients(fused, *inputs)
    assert all(x.isfinite().all() for x in got)
    budget = errors(with_gradients(reference.siglip_loss, *inputs), exact)
    for mine, theirs in zip(errors(got, exact), budget):
        assert mine <= max(2 * theirs, BAR[torch.float32])


def test_bf16_under_autocast():
    inputs = *(x.bfloat16().float() for x in correlated(700, 48, 0.4, 0.1)), SCALE, BIAS
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(fused, *inputs)
    assert max(errors(got, truth(*inputs))) <= BAR[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_leaves_lose_only_the_rounding_of_the_gradient(dtype):
    inputs = *(x.to(dtype) for x in correlated(300, 48, 0.4, 0.1)), SCALE, BIAS
    got, exact = with_gradients(fused, *inputs), truth(*inputs)
    for mine, gradient in zip(got[1:3], exact[1:3]):
        assert mine.dtype == dtype
        assert error(mine, gradient) <= math.hypot(error(gradient.to(dtype), gradient), BAR[torch.bfloat16])


@pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=4))[:-1])
def test_frozen_inputs(frozen):
    inputs = *correlated(50, 8, 0.4, 0.1), SCALE, BIAS
    exact = truth(*inputs)[1:]
    leaves = [x.clone().requires_grad_(not f) for x, f in zip(inputs, frozen)]
    fused(*leaves).backward()
    for leaf, gradient, still in zip(leaves, exact, frozen):
        assert (leaf.grad is None) == still
        assert still or error(leaf.grad, gradient) <= BAR[torch.float32]


def test_nothing_to_learn_forms_one_product(monkeypatch):
    products = []
    original = torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *args, **kw: products.append(1) or original(*args, **kw))
    image, text = correlated(50, 8, 0.4, 0.1)
    with torch.no_grad():
        fused(image.clone().requires_grad_(), text, 10.0, -10.0)
    assert not products
    fused(image.clone().requires_grad_(), text.clone().requires_grad_(), 10.0, -10.0).backward()
    assert len(products) == 2


def test_strides():
    image, text = correlated(50, 8, 0.4, 0.1)
    wide = torch.full((50, 24), math.nan)
    wide[:, ::3] = image
    wide.requires_grad_()
    fused(wide[:, ::3], text.T.contiguous().T, 10.0, -10.0).backward()
    assert error(wide.grad[:, ::3], truth(image, text, SCALE, BIAS)[1]) <= BAR[torch.float32]


def test_backward_twice_and_no_second_derivative():
    image, text = (x.requires_grad_() for x in correlated(20, 8, 0.4, 0.1))
    value = fused(image, text, 10.0, -10.0)
    first = torch.autograd.grad(value, image, retain_graph=True)[0]
    (second,) = torch.autograd.grad(2 * value, image, create_graph=True)
    assert torch.equal(2 * first, second)
    with pytest.raises(RuntimeError):
        second.sum().backward()


def test_compiles_without_a_graph_break():
    inputs = [x.requires_grad_() for x in (*correlated(20, 8, 0.4, 0.1), SCALE.clone(), BIAS.clone())]

    def loss(image, *rest):
        return fused(2 * image, *rest)

    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(step(*inputs), inputs)
    assert max(errors(got, torch.autograd.grad(loss(*inputs), inputs))) <= 1e-6


CUTS = {1: (0, 60), 2: (0, 23, 60), 3: (0, 23, 23, 60)}


def on_rank(rank, world_size, impl, *inputs):
    rows = slice(*CUTS[world_size][rank : rank + 2])
    leaves = [x.clone().requires_grad_() for x in (inputs[0][rows], inputs[1][rows], *inputs[2:])]
    loss = kernels.fused_siglip_loss(*leaves, group=dist.group.WORLD, impl=impl)
    loss.backward()
    return loss.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.usefixtures("warm_operators")
@pytest.mark.parametrize("world_size", CUTS)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_mean_over_ranks_is_the_gradient_of_the_batch(world_size, impl):
    inputs = *correlated(60, 16, 0.4, 0.1), SCALE, BIAS
    loss, image, text, *scalars = zip(*run_ranks(on_rank, world_size, impl, *inputs))
    whole = [sum(loss) / world_size, torch.cat(image) / world_size, torch.cat(text) / world_size]
    whole += [sum(x) / world_size for x in scalars]
    assert max(errors(whole, truth(*inputs))) <= BAR[torch.float32]


def test_module_has_open_clips_signature():
    image, text = correlated(20, 8, 0.4, 0.1)
    module = kernels.FusedSigLipLoss(cache_labels=True, rank=0, world_size=1, dist_impl="gather")
    value = module(image_features=image, text_features=text, logit_scale=SCALE, logit_bias=BIAS, output_dict=True)
    assert error(value["contrastive_loss"], truth(image, text, SCALE, BIAS)[0]) <= BAR[torch.float32]


WRONG = [
    ({"image": torch.ones(2, 3, 1)}, ValueError, r"image must be \(b, D\)"),
    ({"text": torch.ones(3, 3)}, ValueError, "one shape"),
    ({"logit_scale": -1.0}, ValueError, "logit_scale must be positive"),
    ({"logit_bias": math.nan}, ValueError, "logit_bias must be finite"),
    ({"logit_bias": torch.zeros(2)}, ValueError, "logit_bias must have one element"),
    ({"logit_bias": "0"}, TypeError, "logit_bias must be a float or a tensor"),
    ({"image": torch.ones(0, 3), "text": torch.ones(0, 3)}, ValueError, "at least one pair"),
]


@pytest.mark.parametrize(("change", "kind", "message"), WRONG)
def test_wrong_arguments(change, kind, message):
    arguments = {"image": torch.ones(2, 3), "text": torch.ones(2, 3), "logit_scale": 1.0, "logit_bias": 0.0, **change}
    with pytest.raises(kind, match=f"fused_siglip_loss: .*{message}"):
        kernels.fused_siglip_loss(**arguments)
