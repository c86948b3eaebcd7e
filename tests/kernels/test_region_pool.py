import pytest
import torch

import kernels
from kernels import reference
from tests.kernels.masking import DTYPES, INTERPRETED, assert_within_budget, device_of, fused

IMPLS = fused("region_pool")
# N, R, C, D, E: one of each; more rectangles than a tile takes; more cells, and width, than a tile; one row of cells
SHAPES = ((1, 1, 1, 1, 1), (2, 7, 7, 20, 39), (3, 9, 8, 133, 5), (4, 1, 9, 16, 7))


def inputs(N, R, C, D, E, dtype=torch.float32, seed=0):
    """Features, rectangles of at least a cell, and images in any order; the last image has no rectangle."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, R, C, D, generator=generator).to(dtype)
    low = (torch.rand(E, 2, generator=generator) * torch.tensor([C, R])).int()
    room = torch.tensor([C, R]) - low
    high = low + 1 + (torch.rand(E, 2, generator=generator) * room).int().clamp_max(room - 1)
    image_index = torch.randint(0, max(1, N - 1), (E,), generator=generator)
    return x, torch.cat([low, high], 1).int(), image_index


def differentiate(function, x):
    x = x.detach().clone().requires_grad_()
    y = function(x)
    weight = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y).to(y)
    (dx,) = torch.autograd.grad(y, x, weight, retain_graph=True)
    (again,) = torch.autograd.grad(y, x, weight)
    assert torch.equal(dx, again) and dx.dtype == x.dtype
    return y.detach().cpu(), dx.cpu()


def assert_right(impl, x, rects, image_index):
    device = device_of(impl)

    def pool(impl, device):
        return lambda x: kernels.region_pool(x, rects.to(device), image_index.to(device), impl=impl)

    got = differentiate(pool(impl, device), x.to(device))
    plain = differentiate(pool("reference", "cpu"), x)
    truth = differentiate(pool("reference", "cpu"), x.double())
    for name, left, middle, right in zip(("y", "dx"), got, plain, truth):
        assert_within_budget(left, middle, right, name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mean_and_gradient(impl, dtype, shape):
    assert_right(impl, *inputs(*shape, dtype))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_whole_image_one_cell_and_borders(impl):
    device = device_of(impl)
    x, *_ = inputs(2, 3, 5, 6, 1)
    rects = torch.tensor([[0, 0, 5, 3], [4, 2, 5, 3], [0, 0, 1, 1], [1, 0, 3, 3]], dtype=torch.int32)
    image_index = torch.tensor([1, 0, 1, 0])
    y = kernels.region_pool(x.to(device), rects.to(device), image_index.to(device), impl=impl).cpu()
    expected = x[1].mean((0, 1)), x[0, 2, 4], x[1, 0, 0], x[0, :, 1:3].mean((0, 1))
    for got, mean in zip(y, expected):
        assert torch.allclose(got, mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_what_lies_outside_is_cut_off_and_nothing_has_no_gradient(impl):
    device = device_of(impl)
    x, *_ = inputs(2, 3, 4, 5, 1)
    rects = torch.tensor([[-3, 1, 2, 9], [2, 2, 2, 3], [3, 0, 1, 2], [4, 0, 9, 3]], dtype=torch.int32)
    leaf = x.to(device).requires_grad_()
    y = kernels.region_pool(leaf, rects.to(device), torch.tensor([0, 1, 1, 1], device=device), impl=impl)
    assert torch.allclose(y[0].cpu(), x[0, 1:, :2].mean((0, 1)), rtol=0, atol=1e-6)
    assert y[1:].eq(0).all()
    (dx,) = torch.autograd.grad(y.sum(), leaf)
    assert dx[1].eq(0).all()
    assert torch.allclose(dx[0, 1:, :2].cpu(), torch.full((2, 2, 5), 0.25)) and dx.count_nonzero() == 20


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_no_rectangle_and_no_image(impl):
    device = device_of(impl)
    for N, E in ((2, 0), (0, 0)):
        x = torch.ones(N, 2, 2, 3, device=device, requires_grad=True)
        rects = torch.zeros(E, 4, dtype=torch.int32, device=device)
        y = kernels.region_pool(x, rects, torch.zeros(E, dtype=torch.int64, device=device), impl=impl)
        assert y.shape == (E, 3)
        y.sum().backward()
        assert x.grad.shape == x.shape and not x.grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_order_of_the_rectangles_does_not_matter(impl):
    device = device_of(impl)
    x, rects, image_index = (t.to(device) for t in inputs(3, 4, 4, 8, 20))
    y = kernels.region_pool(x, rects, image_index, impl=impl)
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(1)).to(device)
    again = kernels.region_pool(x, rects[shuffled], image_index[shuffled], impl=impl)
    assert torch.allclose(again, y[shuffled], rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    device = device_of(impl)
    x, rects, image_index = inputs(3, 4, 5, 6, 7)
    expected = differentiate(lambda x: reference.region_pool(x, rects, image_index), x)
    # patches behind a class token, and channels first
    tokens = torch.zeros(3, 21, 6, device=device)
    tokens[:, 1:] = x.flatten(1, 2)
    views = tokens[:, 1:].unflatten(1, (4, 5)), x.to(device).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    columns = torch.zeros(7, 9, dtype=torch.int32, device=device)
    columns[:, 1::2] = rects.to(device)
    images = image_index.repeat_interleave(2).to(device)[::2]
    for view in views:
        got = kernels.region_pool(view, columns[:, 1::2], images, impl=impl)
        assert torch.allclose(got.cpu(), expected[0], rtol=0, atol=1e-6)
        leaf = view.detach().requires_grad_()
        y = kernels.region_pool(leaf, columns[:, 1::2], images, impl=impl)
        weight = torch.linspace(-1, 2, 42, dtype=torch.float64).view(7, 6).float().T.contiguous().T.to(device)
        (dx,) = torch.autograd.grad(y, leaf, weight)
        assert torch.allclose(dx.cpu(), expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_does_not_round(impl):
    device = device_of(impl)
    x, rects, image_index = (t.to(device) for t in inputs(2, 4, 4, 8, 5))
    expected = kernels.region_pool(x, rects, image_index, impl=impl)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(kernels.region_pool(x, rects, image_index, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_without_a_graph_break_and_has_one_derivative(impl):
    device = device_of(impl)
    x, rects, image_index = (t.to(device) for t in inputs(2, 3, 3, 4, 5))
    assert not kernels.region_pool(x, rects, image_index, impl=impl).requires_grad
    x.requires_grad_()

    def step(x):
        return kernels.region_pool(x * 2, rects, image_index, impl=impl).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(step(x), compiled(x))
    assert torch.equal(*(torch.autograd.grad(function(x), x)[0] for function in (step, compiled)))
    (dx,) = torch.autograd.grad(step(x), x, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        dx.sum().backward()


@pytest.mark.skipif(INTERPRETED, reason="no kernel of Triton is called")
def test_operator_is_well_formed():
    x, rects, image_index = inputs(2, 3, 3, 4, 5)
    image, order = image_index.sort(stable=True)
    starts = torch.searchsorted(image, torch.arange(3))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.sycoca_kernels.region_pool
    torch.library.opcheck(operator, (x.requires_grad_(), rects, order, starts, "cpu"), test_utils=tests)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(2, 9, 4)}, ValueError, r"x must be \(N, R, C, D\), got \(2, 9, 4\)"),
        ({"x": torch.ones(2, 3, 3, 4).int()}, TypeError, "x must be floating, got torch.int32"),
        ({"rects": torch.zeros(5, 3).int()}, ValueError, r"rects must be \(E, 4\), got \(5, 3\)"),
        ({"rects": torch.zeros(5, 4)}, TypeError, "rects must be torch.int32, got torch.float32"),
        ({"image_index": torch.zeros(4).long()}, ValueError, r"image_index must be \(5,\), got \(4,\)"),
        ({"image_index": torch.zeros(5).int()}, TypeError, "image_index must be torch.int64, got torch.int32"),
        ({"impl": "fast"}, ValueError, r"impl must be 'auto' or one of .*, got 'fast'"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {
        "x": torch.ones(2, 3, 3, 4),
        "rects": torch.tensor([[0, 0, 1, 1]] * 5, dtype=torch.int32),
        "image_index": torch.zeros(5, dtype=torch.int64),
    } | change
    with pytest.raises(error, match=f"region_pool: {message}"):
        kernels.region_pool(arguments.pop("x"), arguments.pop("rects"), arguments.pop("image_index"), **arguments)


def test_values_are_checked_on_demand(monkeypatch):
    monkeypatch.setenv("KERNELS_CHECK", "1")
    x, rect = torch.ones(2, 3, 4, 1), torch.tensor([[0, 0, 4, 3]], dtype=torch.int32)
    kernels.region_pool(x, rect, torch.tensor([1]))
    with pytest.raises(ValueError, match=r"image_index must be in 0 .. 1, got \[2\]"):
        kernels.region_pool(x, rect, torch.tensor([2]))
    for wrong in ([0, 0, 5, 3], [1, 1, 1, 2], [3, 0, 1, 2], [-1, 0, 1, 1]):
        with pytest.raises(ValueError, match="rects must hold cells of 3 rows and 4 columns, got"):
            kernels.region_pool(x, torch.tensor([wrong], dtype=torch.int32), torch.tensor([1]))
