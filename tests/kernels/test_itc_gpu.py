"""The contrastive operators on a GPU."""

import pytest
import torch

import kernels
from kernels import reference
from tests.kernels.contrastive import ADVERSARIAL, BARS, REGIMES, correlated, errors, with_gradients, within

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SCALE = 14.3


IMPLEMENTATIONS = [name for name in kernels.implementations("fused_itc_loss") if name in ("triton", "gluon")]


def compare(features, scale, dtype=torch.float32, autocast=False, impl="triton", **options):
    """Errors of ours and of the plain composition."""
    inputs = [x.to("cuda", dtype) for x in features] + [torch.tensor([scale], device="cuda")]
    shared = {key: value for key, value in options.items() if key != "scratch_bytes"}
    exact = with_gradients(lambda *x: reference.itc_loss(*x, **shared), *(x.double() for x in inputs))
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        got = with_gradients(lambda *x: kernels.fused_itc_loss(*x, impl=impl, **options), *inputs)
        plain = with_gradients(lambda *x: reference.itc_loss(*x, **shared), *inputs)
    assert all(x.isfinite().all() for x in got)
    return errors(got, exact), errors(plain, exact)


# Widths that TMA describes, and one that it does not; past one tile, past one row of tiles, the limit.
@pytest.mark.parametrize(("B", "D"), [(1, 1), (129, 65), (1000, 256), (2500, 640), (4096, 768), (300, 4096)])
@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bf16_under_autocast(B, D, scale, impl):
    features = [x.bfloat16().float() for x in (correlated(B, D, 0.38, 0.07) if D > 1 else torch.randn(2, B, D))]
    got, plain = compare(features, scale, autocast=True, impl=impl)
    assert within(got, plain, BARS[torch.bfloat16, scale]), (got, plain)


@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_regimes_fp32(name, scale):
    got, plain = compare(REGIMES[name](1500, 64), scale)
    assert within(got, plain, BARS[torch.float32, scale]), (got, plain)


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adversarial_inputs(name, dtype):
    features = [x.bfloat16().float() for x in ADVERSARIAL[name](700, 64)]
    got, plain = compare(features, 100.0, autocast=dtype == torch.bfloat16)
    assert within(got, plain, BARS[dtype, 100.0]), (got, plain)


@pytest.mark.parametrize("options", [{"ids": 40}, {"label_smoothing": 0.1}, {"ids": 40, "label_smoothing": 0.1}])
def test_targets(options):
    if "ids" in options:
        options = options | {"ids": torch.randint(0, options["ids"], (700,), device="cuda")}
    got, plain = compare(correlated(700, 64, 0.5, 0.1), SCALE, **options)
    assert within(got, plain, BARS[torch.float32, SCALE]), (got, plain)


def test_blocks_of_scratch():
    got, _ = compare(correlated(1500, 64, 0.4, 0.1), SCALE, scratch_bytes=2**20)
    assert max(got) <= BARS[torch.float32, SCALE]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_runs_are_bitwise_equal(impl):
    inputs = [x.to("cuda", torch.bfloat16).requires_grad_() for x in correlated(4096, 256, 0.4, 0.1)]
    runs = [torch.autograd.grad(kernels.fused_itc_loss(*inputs, SCALE, impl=impl), inputs) for _ in range(100)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0]))


def test_captures_in_a_graph_and_follows_its_inputs():
    image, text = (x.to("cuda", torch.bfloat16).requires_grad_() for x in correlated(1024, 256, 0.4, 0.1))
    scale = torch.tensor([SCALE], device="cuda", requires_grad=True)

    def step():
        return torch.autograd.grad(kernels.fused_itc_loss(image, text, scale, impl="triton"), (image, text, scale))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        # A cone at scale 100: the graph holds the online form, too.
        for x, fresh in zip((image, text), correlated(1024, 256, -0.85, -0.85)):
            x.copy_(fresh)
        scale.fill_(100.0)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))


def test_no_host_synchronisation():
    image, text = (x.to("cuda", torch.bfloat16).requires_grad_() for x in correlated(512, 256, 0.4, 0.1))
    scale = torch.tensor([SCALE], device="cuda", requires_grad=True)
    kernels.fused_itc_loss(image, text, scale, impl="triton").backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.fused_itc_loss(image, text, scale, impl="triton").backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_siglip():
    inputs = [x.bfloat16().float().cuda() for x in correlated(1500, 256, 0.4, 0.1)]
    inputs += [torch.tensor([10.0], device="cuda"), torch.tensor([-10.0], device="cuda")]
    exact = with_gradients(reference.siglip_loss, *(x.double() for x in inputs))
    with torch.autocast("cuda", torch.bfloat16):
        got = with_gradients(lambda *x: kernels.fused_siglip_loss(*x, impl="triton"), *inputs)
    assert max(errors(got, exact)) <= BARS[torch.bfloat16, SCALE]
