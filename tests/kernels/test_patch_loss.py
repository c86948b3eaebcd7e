import pytest
import torch

import kernels
from kernels import reference
from kernels.patch_loss import KINDS
from tests.kernels.masking import DTYPES, INTERPRETED, assert_within_budget, chosen, device_of, fused

IMPLS = fused("masked_patch_loss")
# B, C, patch, rows, columns, K: one pixel; grey; nothing chosen; everything; patches of 14 and 16; many channels
SHAPES = (
    (1, 1, 1, 1, 1, 1),
    (2, 1, 3, 2, 3, 4),
    (2, 3, 2, 2, 2, 0),
    (2, 3, 4, 3, 2, 6),
    (2, 3, 14, 2, 3, 5),
    (1, 3, 16, 2, 2, 3),
    (1, 5, 6, 2, 4, 3),
)
SHAPES = SHAPES[1:5] if INTERPRETED else SHAPES


def inputs(B, C, p, rows, columns, K, dtype=torch.float32, image_dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(B, C, rows * p, columns * p, generator=generator).to(image_dtype)
    pred = torch.randn(B, K, p * p * C, generator=generator).to(dtype)
    return pred, images, chosen(B, rows * columns, K, generator, ascending=False)


def differentiate(function, pred):
    pred = pred.detach().clone().requires_grad_()
    loss = function(pred)
    weight = torch.tensor(3.0, device=loss.device, dtype=loss.dtype)
    (dpred,) = torch.autograd.grad(loss, pred, weight, retain_graph=True)
    (again,) = torch.autograd.grad(loss, pred, weight, retain_graph=True)
    assert torch.equal(dpred, again) and dpred.dtype == pred.dtype
    return loss.detach().cpu(), dpred.cpu()


def assert_right(impl, pred, images, index, **options):
    device = device_of(impl)
    got = differentiate(
        lambda pred: kernels.masked_patch_loss(pred, images.to(device), index.to(device), impl=impl, **options),
        pred.to(device),
    )
    plain = differentiate(lambda pred: reference.masked_patch_loss(pred, images, index, **options), pred)
    truth = differentiate(
        lambda pred: reference.masked_patch_loss(pred, images.double(), index, **options), pred.double()
    )
    assert got[0].dtype == torch.float32
    for name, left, middle, right in zip(("loss", "dpred"), got, plain, truth):
        assert_within_budget(left, middle, right, name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient(impl, kind, dtype, shape):
    p = shape[2]
    assert_right(impl, *inputs(*shape, dtype), patch_size=p, kind=kind)
    assert_right(impl, *inputs(*shape, dtype, image_dtype=dtype), patch_size=p, kind=kind, reduction="sum")


@pytest.mark.parametrize("impl", IMPLS)
def test_more_samples_than_a_block(impl):
    B, p = (7, 4) if INTERPRETED else (37, 16)
    assert_right(impl, *inputs(B, 3, p, 3, 3, 9), patch_size=p)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_pixel_order(impl):
    device = device_of(impl)
    # pixel value = 100 row + 10 column + channel
    image = torch.arange(4.0)[:, None] * 100 + torch.arange(6.0) * 10
    images = torch.stack([image, image + 1])[None].to(device)
    index = torch.tensor([[4]], device=device)
    expected = torch.tensor([[[220.0, 221, 230, 231, 320, 321, 330, 331]]], device=device)
    assert kernels.masked_patch_loss(expected, images, index, patch_size=2, impl=impl).item() == 0
    one_off = expected.clone()
    one_off[0, 0, 3] += 8
    assert kernels.masked_patch_loss(one_off, images, index, patch_size=2, impl=impl).item() == 1.0
    total = kernels.masked_patch_loss(one_off, images, index, patch_size=2, kind="mse", reduction="sum", impl=impl)
    assert total.item() == 64.0


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_elements(impl, kind):
    device = device_of(impl)
    for B, K in ((2, 0), (0, 2)):
        pred = torch.ones(B, K, 12, device=device, requires_grad=True)
        index = torch.zeros(B, K, dtype=torch.int64, device=device)
        images = torch.ones(B, 3, 4, 4, device=device)
        loss = kernels.masked_patch_loss(pred, images, index, patch_size=2, kind=kind, impl=impl)
        loss.backward()
        assert loss.item() == 0 and pred.grad.shape == pred.shape


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_values_have_no_l1_gradient_and_flat_patches_are_finite(impl):
    device = device_of(impl)
    images, index = torch.ones(1, 3, 4, 4, device=device), torch.tensor([[0, 2]], device=device)
    pred = torch.ones(1, 2, 12, device=device, requires_grad=True)
    kernels.masked_patch_loss(pred, images, index, patch_size=2, impl=impl).backward()
    assert not pred.grad.any()
    # a flat patch has the normalised target 0
    loss = kernels.masked_patch_loss(pred, images * 1e4, index, patch_size=2, kind="mse_normalised", impl=impl)
    assert loss.item() == 1.0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(impl, kind):
    device = device_of(impl)
    pred, images, index = (t.to(device) for t in inputs(3, 3, 4, 2, 3, 4))
    expected = kernels.masked_patch_loss(pred, images, index, patch_size=4, kind=kind, impl="reference")
    wide = torch.zeros(3, 3, 11, 17, device=device)
    wide[:, :, 2:10, 3:15] = images
    odd = pred.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    columns = index.T.contiguous().T
    for view in (images.contiguous(memory_format=torch.channels_last), wide[:, :, 2:10, 3:15], images):
        loss = kernels.masked_patch_loss(odd, view, columns, patch_size=4, kind=kind, impl=impl)
        assert torch.allclose(loss, expected, rtol=1e-6, atol=0)
        (dpred,) = torch.autograd.grad(loss, odd)
        leaf = pred.clone().requires_grad_()
        plain = reference.masked_patch_loss(leaf, images, index, 4, kind)
        assert torch.allclose(dpred, torch.autograd.grad(plain, leaf)[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("impl", IMPLS)
def test_second_derivatives_raise_and_evaluation_keeps_nothing(impl):
    device = device_of(impl)
    pred, images, index = (t.to(device) for t in inputs(2, 3, 2, 2, 2, 2))
    assert not kernels.masked_patch_loss(pred, images, index, patch_size=2, impl=impl).requires_grad
    pred.requires_grad_()
    loss = kernels.masked_patch_loss(pred, images, index, patch_size=2, kind="mse", impl=impl)
    (dpred,) = torch.autograd.grad(loss, pred, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        dpred.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_without_a_graph_break(impl):
    device = device_of(impl)
    pred, images, index = (t.to(device) for t in inputs(2, 3, 2, 2, 2, 2))
    pred.requires_grad_()

    def step(pred):
        return kernels.masked_patch_loss(pred * 2, images, index, patch_size=2, impl=impl)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(step(pred), compiled(pred))
    assert torch.equal(*(torch.autograd.grad(function(pred), pred)[0] for function in (step, compiled)))


def test_operator_is_well_formed():
    pred, images, index = inputs(2, 3, 2, 2, 2, 2)
    operator = torch.ops.sycoca_kernels.masked_patch_loss
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, (pred.requires_grad_(), images, index, 2, "mse", 1.0, "cpu"), test_utils=tests)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"images": torch.ones(1, 3, 5, 4)}, ValueError, r"H and W of images must be multiples of .*2, got \(5, 4\)"),
        ({"images": torch.ones(3, 4, 4)}, ValueError, r"images must be \(B, C, H, W\), got \(3, 4, 4\)"),
        ({"images": torch.ones(1, 3, 4, 4).byte()}, TypeError, r"images must be floating, got torch.uint8"),
        ({"images": torch.ones(1, 3, 4, 4, requires_grad=True)}, ValueError, r"images must not require a gradient"),
        ({"pred": torch.ones(1, 2, 11)}, ValueError, r"pred must be \(1, 2, 12\), got \(1, 2, 11\)"),
        ({"pred": torch.ones(1, 2, 12).long()}, TypeError, r"pred must be floating, got torch.int64"),
        ({"index": torch.zeros(2, 2).long()}, ValueError, r"index must be \(1, K\), got \(2, 2\)"),
        ({"index": torch.zeros(1, 2)}, TypeError, r"index must be torch.int64, got torch.float32"),
        ({"patch_size": 0}, ValueError, r"patch_size must be at least 1, got 0"),
        ({"patch_size": 2.0}, TypeError, r"patch_size must be an int, got 2.0"),
        ({"kind": "l2"}, ValueError, r"kind must be one of l1, mse, mse_normalised, got 'l2'"),
        ({"reduction": "none"}, ValueError, r"reduction must be mean or sum, got 'none'"),
        ({"impl": "fast"}, ValueError, r"impl must be 'auto' or one of .*, got 'fast'"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {
        "pred": torch.ones(1, 2, 12),
        "images": torch.ones(1, 3, 4, 4),
        "index": torch.zeros(1, 2, dtype=torch.int64),
        "patch_size": 2,
    } | change
    with pytest.raises(error, match=f"masked_patch_loss: {message}"):
        kernels.masked_patch_loss(arguments.pop("pred"), arguments.pop("images"), arguments.pop("index"), **arguments)


def test_values_are_checked_on_demand(monkeypatch):
    monkeypatch.setenv("KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match=r"masked_patch_loss: index must be in 0 .. 3, got \[4\]"):
        kernels.masked_patch_loss(torch.ones(1, 1, 12), torch.ones(1, 3, 4, 4), torch.tensor([[4]]), patch_size=2)
