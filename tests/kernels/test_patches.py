import pytest
import torch

import kernels
from kernels import reference
from tests.kernels.masking import DTYPES, INTERPRETED, assert_within_budget, chosen, device_of, fused

GATHER, SCATTER = fused("gather_patches"), fused("scatter_patches")
# B, P, K, D: one of each; nothing and everything chosen; odd; one past a tile; 16-byte rows of a real width
SHAPES = ((1, 1, 1, 1), (2, 5, 0, 3), (3, 7, 7, 5), (2, 33, 17, 65), (3, 40, 20, 129), (2, 9, 5, 768))
SHAPES = SHAPES[1:4] if INTERPRETED else SHAPES


def gather_inputs(B, P, K, D, dtype, prefix_rows, seed=0):
    """x, index, pos, prefix and the incoming gradient; parameters are fp32, as under autocast."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, P, D, generator=generator).to(dtype)
    index = chosen(B, P, K, generator, ascending=False)
    pos = torch.randn(P, D, generator=generator)
    prefix = {0: None, 1: torch.randn(D, generator=generator), 2: torch.randn(B, D, generator=generator)}[prefix_rows]
    dy = torch.randn(B, K + bool(prefix_rows), D, generator=generator).to(dtype)
    return x, index, pos, prefix, dy


def differentiate(function, leaves, dy):
    """Output and gradients, on the CPU; leaves that are None are left out."""
    leaves = [leaf.detach().clone().requires_grad_() if leaf is not None else None for leaf in leaves]
    y = function(*leaves)
    given = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(y, given, dy.to(y), retain_graph=True)
    again = torch.autograd.grad(y, given, dy.to(y), retain_graph=True)
    assert all(torch.equal(first, second) for first, second in zip(gradients, again))
    assert all(gradient.dtype == leaf.dtype for gradient, leaf in zip(gradients, given))
    return [y.detach().cpu(), *(gradient.cpu() for gradient in gradients)]


def three_ways(function, plain, leaves, dy, device, names):
    """The implementation against fp64 truth, with plain torch in the same dtypes as the budget."""
    moved = [leaf.to(device) if leaf is not None else None for leaf in leaves]
    got = differentiate(function, moved, dy.to(device))
    budget = differentiate(plain, leaves, dy)
    truth = differentiate(plain, [leaf.double() if leaf is not None else None for leaf in leaves], dy.double())
    for name, left, middle, right in zip(names, got, budget, truth):
        assert_within_budget(left, middle, right, name)


@pytest.mark.parametrize("impl", GATHER)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("prefix_rows", [0, 1, 2])
@pytest.mark.parametrize("has_pos", [False, True])
def test_gather(impl, dtype, shape, prefix_rows, has_pos):
    x, index, pos, prefix, dy = gather_inputs(*shape, dtype, prefix_rows)
    pos = pos if has_pos else None
    device = device_of(impl)
    names = ["y", "dx", *(["dpos"] if has_pos else []), *(["dprefix"] if prefix_rows else [])]
    three_ways(
        lambda x, pos, prefix: kernels.gather_patches(x, index.to(device), pos=pos, prefix=prefix, impl=impl),
        lambda x, pos, prefix: reference.gather_patches(x, index, pos, prefix),
        (x, pos, prefix),
        dy,
        device,
        names,
    )


@pytest.mark.parametrize("impl", SCATTER)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_pos", [False, True])
def test_scatter(impl, dtype, shape, has_pos):
    B, P, K, D = shape
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, K, D, generator=generator).to(dtype)
    fill, pos = torch.randn(D, generator=generator), torch.randn(P, D, generator=generator) if has_pos else None
    dy = torch.randn(B, P, D, generator=generator).to(dtype)
    index = chosen(B, P, K, generator, ascending=False)
    device = device_of(impl)
    three_ways(
        lambda x, fill, pos: kernels.scatter_patches(x, index.to(device), fill, num_patches=P, pos=pos, impl=impl),
        lambda x, fill, pos: reference.scatter_patches(x, index, fill, P, pos),
        (x, fill, pos),
        dy,
        device,
        ["y", "dx", "dfill", *(["dpos"] if has_pos else [])],
    )


@pytest.mark.parametrize("impl", GATHER)
def test_many_samples_share_positions(impl):
    # more samples than one partial sum takes, in every implementation
    x, index, pos, prefix, dy = gather_inputs(70, 3, 2, 4, torch.float32, 1)
    device = device_of(impl)
    three_ways(
        lambda x, pos, prefix: kernels.gather_patches(x, index.to(device), pos=pos, prefix=prefix, impl=impl),
        lambda x, pos, prefix: reference.gather_patches(x, index, pos, prefix),
        (x, pos, prefix),
        dy,
        device,
        ["y", "dx", "dpos", "dprefix"],
    )
    fill = prefix
    three_ways(
        lambda x, fill, pos: kernels.scatter_patches(x, index.to(device), fill, num_patches=3, pos=pos, impl=impl),
        lambda x, fill, pos: reference.scatter_patches(x, index, fill, 3, pos),
        (x[:, :2], fill, pos),
        torch.randn(70, 3, 4),
        device,
        ["y", "dx", "dfill", "dpos"],
    )


@pytest.mark.parametrize("impl", GATHER)
def test_round_trip(impl):
    device = device_of(impl)
    x, index, *_ = (t.to(device) if t is not None else None for t in gather_inputs(3, 9, 4, 8, torch.float32, 0))
    rows = kernels.gather_patches(x, index, impl=impl)
    back = kernels.scatter_patches(rows, index, torch.zeros(8, device=device), num_patches=9, impl=impl)
    keep = torch.zeros(3, 9, 1, device=device).scatter_(1, index[:, :, None], 1.0)
    assert torch.equal(back, x * keep)


@pytest.mark.parametrize("impl", GATHER)
def test_frozen_inputs_get_no_gradient(impl):
    device = device_of(impl)
    x, index, pos, prefix, dy = (t.to(device) for t in gather_inputs(2, 6, 3, 8, torch.float32, 2))
    for leaf in (x, pos, prefix):
        leaf.requires_grad_()
        y = kernels.gather_patches(x, index, pos=pos, prefix=prefix, impl=impl)
        y.backward(dy)
        assert [other.grad is not None for other in (x, pos, prefix)] == [other is leaf for other in (x, pos, prefix)]
        leaf.requires_grad_(False)
        leaf.grad = None
    rows, fill = dy[:, 1:].contiguous(), prefix[0].detach().clone()
    for leaf in (rows, fill, pos):
        leaf.requires_grad_()
        kernels.scatter_patches(rows, index, fill, num_patches=6, pos=pos, impl=impl).sum().backward()
        assert [other.grad is not None for other in (rows, fill, pos)] == [other is leaf for other in (rows, fill, pos)]
        leaf.requires_grad_(False)
        leaf.grad = None


@pytest.mark.parametrize("impl", GATHER)
def test_no_samples(impl):
    device = device_of(impl)
    x = torch.ones(0, 6, 4, device=device, requires_grad=True)
    pos = torch.ones(6, 4, device=device, requires_grad=True)
    fill = torch.ones(4, device=device, requires_grad=True)
    index = torch.zeros(0, 3, dtype=torch.int64, device=device)
    y = kernels.gather_patches(x, index, pos=pos, prefix=fill, impl=impl)
    z = kernels.scatter_patches(y[:, 1:], index, fill, num_patches=6, pos=pos, impl=impl)
    assert y.shape == (0, 4, 4) and z.shape == (0, 6, 4)
    (y.sum() + z.sum()).backward()
    assert not pos.grad.any() and not fill.grad.any() and x.grad.shape == x.shape


@pytest.mark.parametrize("impl", GATHER)
def test_strides_do_not_matter(impl):
    device = device_of(impl)
    x, index, pos, prefix, dy = (t.to(device) for t in gather_inputs(3, 7, 4, 6, torch.float32, 2))

    def strange(t):
        return torch.empty([2 * n for n in t.shape[::-1]], dtype=t.dtype, device=device)[
            tuple(slice(None, None, 2) for _ in t.shape)
        ].permute(*range(t.ndim)[::-1])

    leaves = [x, pos, prefix]
    odd = [strange(leaf).copy_(leaf).requires_grad_() for leaf in leaves]
    even = [leaf.clone().requires_grad_() for leaf in leaves]
    y = kernels.gather_patches(odd[0], strange(index).copy_(index), pos=odd[1], prefix=odd[2], impl=impl)
    expected = reference.gather_patches(even[0], index, even[1], even[2])
    assert torch.equal(y, expected)
    for left, right in zip(torch.autograd.grad(y, odd, strange(dy).copy_(dy)), torch.autograd.grad(expected, even, dy)):
        assert torch.allclose(left, right, rtol=0, atol=1e-6)
    rows = strange(y.detach()[:, 1:]).copy_(y.detach()[:, 1:]).requires_grad_()
    z = kernels.scatter_patches(rows, strange(index).copy_(index), odd[2][0], num_patches=7, pos=odd[1], impl=impl)
    assert torch.equal(z, reference.scatter_patches(rows, index, odd[2][0], 7, odd[1]))
    # a gradient whose memory is one row
    (dx,) = torch.autograd.grad(z, rows, torch.ones(6, device=device).expand(3, 7, 6))
    assert torch.equal(dx, torch.ones_like(dx))


@pytest.mark.parametrize("impl", GATHER)
def test_second_derivatives_raise(impl):
    device = device_of(impl)
    x, index, pos, _, dy = (
        t.to(device) if t is not None else None for t in gather_inputs(2, 6, 3, 8, torch.float32, 0)
    )
    for leaf, function in (
        (x, lambda x: kernels.gather_patches(x, index, pos=pos, impl=impl)),
        (dy, lambda rows: kernels.scatter_patches(rows, index, pos[0], num_patches=6, impl=impl)),
    ):
        leaf = leaf.clone().requires_grad_()
        weight = torch.ones_like(function(leaf)).requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf), leaf, weight, create_graph=True)
        with pytest.raises((RuntimeError, NotImplementedError)):
            gradient.sum().backward()


@pytest.mark.parametrize("impl", GATHER)
def test_compiles_without_a_graph_break(impl):
    device = device_of(impl)
    x, index, pos, prefix, _ = (t.to(device) for t in gather_inputs(2, 6, 3, 8, torch.float32, 1))

    def step(x, pos, prefix):
        y = kernels.gather_patches(x, index, pos=pos, prefix=prefix, impl=impl)
        return kernels.scatter_patches(y[:, 1:], index, prefix, num_patches=6, pos=pos, impl=impl)

    leaves = [leaf.requires_grad_() for leaf in (x, pos, prefix)]
    weight = torch.randn(2, 6, 8, device=device)
    eager = step(*leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(eager, compiled)
    for left, right in zip(torch.autograd.grad(eager, leaves, weight), torch.autograd.grad(compiled, leaves, weight)):
        assert torch.equal(left, right)


def test_operators_are_well_formed():
    x, index, pos, prefix, _ = gather_inputs(2, 6, 3, 8, torch.float32, 1)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    leaves = [leaf.requires_grad_() for leaf in (x, pos, prefix)]
    gather, scatter = torch.ops.sycoca_kernels.gather_patches, torch.ops.sycoca_kernels.scatter_patches
    torch.library.opcheck(gather, (leaves[0], index, leaves[1], leaves[2], "cpu"), test_utils=tests)
    torch.library.opcheck(scatter, (leaves[0][:, :3], index, leaves[2], 6, leaves[1], "cpu"), test_utils=tests)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(6, 4)}, ValueError, r"x must have 3 dimensions, got \(6, 4\)"),
        ({"x": torch.ones(2, 6, 4).int()}, TypeError, r"x must be floating, got torch.int32"),
        ({"index": torch.zeros(3, 3).long()}, ValueError, r"index must be \(2, K\), got \(3, 3\)"),
        ({"index": torch.zeros(2, 3)}, TypeError, r"index must be torch.int64, got torch.float32"),
        ({"pos": torch.ones(5, 4)}, ValueError, r"pos must be \(6, 4\), got \(5, 4\)"),
        ({"prefix": torch.ones(3)}, ValueError, r"prefix must be \(4,\) or \(2, 4\), got \(3,\)"),
        ({"prefix": torch.ones(4).int()}, TypeError, r"prefix must be floating, got torch.int32"),
        ({"impl": "fast"}, ValueError, r"impl must be 'auto' or one of .*, got 'fast'"),
    ],
)
def test_bad_arguments_of_gather(change, error, message):
    arguments = {"x": torch.ones(2, 6, 4), "index": torch.zeros(2, 3, dtype=torch.int64)} | change
    with pytest.raises(error, match=f"gather_patches: {message}"):
        kernels.gather_patches(arguments.pop("x"), arguments.pop("index"), **arguments)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"index": torch.zeros(2, 4).long()}, ValueError, r"index must be \(2, 3\), got \(2, 4\)"),
        ({"fill": torch.ones(5)}, ValueError, r"fill must be \(4,\), got \(5,\)"),
        ({"num_patches": 2}, ValueError, r"num_patches must be at least K = 3, got 2"),
        ({"num_patches": 6.0}, TypeError, r"num_patches must be an int, got 6.0"),
        ({"pos": torch.ones(5, 4)}, ValueError, r"pos must be \(6, 4\), got \(5, 4\)"),
    ],
)
def test_bad_arguments_of_scatter(change, error, message):
    index = torch.arange(3).expand(2, 3)
    arguments = {"x": torch.ones(2, 3, 4), "index": index, "fill": torch.ones(4), "num_patches": 6} | change
    with pytest.raises(error, match=f"scatter_patches: {message}"):
        kernels.scatter_patches(arguments.pop("x"), arguments.pop("index"), arguments.pop("fill"), **arguments)


def test_values_are_checked_on_demand(monkeypatch):
    monkeypatch.setenv("KERNELS_CHECK", "1")
    x = torch.ones(1, 3, 2, requires_grad=True)
    with pytest.raises(ValueError, match=r"gather_patches: index must be in 0 .. 2, got \[3\]"):
        kernels.gather_patches(x, torch.tensor([[0, 3]]))
    with pytest.raises(ValueError, match=r"gather_patches: index must be unique per row, got \[1\]"):
        kernels.gather_patches(x, torch.tensor([[1, 1]]))
    # without a gradient a row may be taken twice
    assert kernels.gather_patches(x.detach(), torch.tensor([[1, 1]])).shape == (1, 2, 2)
    with pytest.raises(ValueError, match=r"scatter_patches: index must be unique per row, got \[1\]"):
        kernels.scatter_patches(x[:, :2], torch.tensor([[1, 1]]), torch.ones(2), num_patches=3)
