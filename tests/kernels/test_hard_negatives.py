import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import hard_negatives_cpu, reference
from tests.kernels.masking import DTYPES, INTERPRETED, device_of, fused
from tests.kernels.test_masking_memory import Allocations

IMPLS = fused("sample_hard_negatives")
EVERY = pytest.mark.parametrize("impl", [*IMPLS, "reference"])
MASK = 2**64 - 1
GROUPS = ("none", "pairs", "mixed", "one")
# B, D, ids: one pair; two; few; one past a tile, and past a depth; several tiles
BATCHES = [(B, D, ids) for B, D in ((1, 3), (2, 1), (9, 8), (65, 70), (150, 16)) for ids in GROUPS]
# the interpreter takes seconds for a hundred draws
BATCHES = [(2, 1, "none"), (7, 8, "pairs"), (5, 8, "one"), (20, 20, "mixed")] if INTERPRETED else BATCHES
SETTINGS = ((14.3, 1e-5, 1), (100.0, 0.0, -5), (3.0, 0.1, 2**62))


def features(B, D, dtype=torch.float32, seed=0):
    """Image and text features of length 1, of which a pair's resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(B, D, generator=generator)
    text = image + torch.randn(B, D, generator=generator)
    return F.normalize(image, dim=1).to(dtype), F.normalize(text, dim=1).to(dtype)


def groups(B, kind):
    if kind == "none":
        return None
    return {"pairs": torch.arange(B) // 2, "mixed": torch.arange(B) ** 2 % 7, "one": torch.zeros(B).long()}[kind]


def sample(impl, image, text, scale, seed=0, ids=None, **options):
    device = device_of(impl)
    ids = None if ids is None else ids.to(device)
    seed = torch.tensor([seed], device=device)
    drawn = kernels.sample_hard_negatives(
        image.to(device), text.to(device), scale, ids=ids, seed=seed, impl=impl, **options
    )
    for indices in drawn:
        assert indices.shape == (len(image),) and indices.dtype == torch.int64 and indices.is_contiguous()
    return [indices.cpu() for indices in drawn]


def splitmix(bits):
    """Finaliser of SplitMix64 on Python's integers."""
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & MASK
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & MASK
    return bits ^ bits >> 31


def numbers(seed, B):
    """The uniform numbers of the rows, and of the columns."""
    start = splitmix(seed & MASK)
    bits = [splitmix(start + k * 0x9E3779B97F4A7C15 & MASK) >> 11 for k in range(1, 2 * B + 1)]
    return torch.tensor(bits, dtype=torch.float64).view(B, 2).T * 2**-53


def weights_of(image, text, scale, ids, floor):
    """Weights of all candidates, fp64: (texts of each image, images of each text)."""
    ids = torch.arange(len(image)) if ids is None else ids
    logits = scale * image.double() @ text.double().T
    same = ids[:, None] == ids
    return [(x.softmax(1) + floor).masked_fill(same, 0) for x in (logits, logits.T)]


def assert_drawn(drawn, image, text, scale, seed, ids=None, floor=1e-5):
    """Every draw is where its number falls in the distribution, up to the rounding of fp32 logits."""
    tolerance = 2**-22 * (4 + scale)
    image_negative, text_negative = drawn
    weights = weights_of(image, text, scale, ids, floor)
    for indices, w, u in zip((text_negative, image_negative), weights, numbers(seed, len(image))):
        total = w.sum(1)
        exists = total > 0
        assert torch.equal(indices >= 0, exists)
        indices, w, u, total = indices[exists], w[exists], u[exists], total[exists]
        cdf = w.cumsum(1) / total[:, None]
        chosen = w.gather(1, indices[:, None])[:, 0]
        assert (chosen > 0).all()
        end = cdf.gather(1, indices[:, None])[:, 0]
        assert (u < end + tolerance).all() and (u > end - chosen / total - tolerance).all()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("B, D, kind", BATCHES)
def test_draws_where_the_number_falls(impl, B, D, kind):
    image, text = features(B, D)
    ids = groups(B, kind)
    for scale, floor, seed in SETTINGS[B % 3 :][:1] if INTERPRETED else SETTINGS:
        drawn = sample(impl, image, text, scale, seed, ids, floor=floor)
        assert_drawn(drawn, image, text, scale, seed, ids, floor)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_implementations_draw_alike(impl, dtype):
    B = 8 if INTERPRETED else 500
    image, text = features(B, 24, dtype)
    got, expected = (sample(name, image, text, 14.3, 3, groups(B, "pairs")) for name in (impl, "reference"))
    assert_drawn(got, image, text, 14.3, 3, groups(B, "pairs"))
    # a number within rounding of a border takes the neighbour: one in thousands
    assert sum(int((a != b).sum()) for a, b in zip(got, expected)) <= B // 100
    again = sample(impl, image, text, torch.tensor([14.3]), 3, groups(B, "pairs"))
    other = sample(impl, image, text, 14.3, 4, groups(B, "pairs"))
    assert all(torch.equal(a, b) for a, b in zip(got, again))
    assert not any(torch.equal(a, b) for a, b in zip(got, other))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("floor", [0.0, 1e-5])
def test_logits_far_apart(impl, floor):
    """Weights of a row and of its column cannot share one scale, nor those of two tiles."""
    B = 17 if INTERPRETED else 200
    image, text = features(B, 6)
    ids = groups(B, "mixed")
    image *= torch.linspace(0.1, 30, B)[:, None]
    text *= torch.linspace(20, 0.1, B)[:, None].roll(B // 3, 0)
    drawn = sample(impl, image, text, 2.0, 9, ids, floor=floor)
    weights = weights_of(image, text, 2.0, ids, floor)
    for indices, w, u in zip(drawn[::-1], weights, numbers(9, B)):
        assert (w.gather(1, indices[:, None]) > 0).all()
        cdf = w.cumsum(1) / w.sum(1, keepdim=True)
        place = (cdf <= u[:, None]).sum(1)
        # logits of a thousand carry an error of 1e-4
        near = (cdf - u[:, None]).abs().amin(1) < 2e-3
        assert torch.equal(indices[~near], place[~near]) and near.float().mean() < 0.2


def test_numbers_are_those_of_splitmix():
    # the first outputs of the published generator at seed 0
    assert [splitmix(k * 0x9E3779B97F4A7C15 & MASK) for k in (1, 2, 3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]
    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 123456789123):
        expected, given = numbers(seed, 50), torch.tensor([seed])
        assert torch.equal(hard_negatives_cpu._uniform(given, 50), expected)
        rows = torch.arange(50)
        for direction in (0, 1):
            assert torch.equal(reference._uniform(given, 2 * rows + direction), expected[direction])


def chi_square(counts, weights):
    """(statistic - degrees) / its deviation, over candidates that are expected five times at least."""
    expected = weights / weights.sum(1, keepdim=True) * counts.sum(1, keepdim=True)
    counted = expected >= 5
    statistic = ((counts - expected)[counted] ** 2 / expected[counted]).sum()
    degrees = int(counted.sum()) - len(counts)
    return float((statistic - degrees) / (2 * degrees) ** 0.5)


@pytest.mark.skipif(INTERPRETED, reason="thousands of draws")
@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("scale, floor", [(5.0, 1e-5), (2.0, 0.05)])
def test_frequencies(impl, scale, floor):
    B, runs = 12, 300
    image, text = features(B, 6)
    ids = groups(B, "pairs")
    weights = weights_of(image, text, scale, ids, floor)
    counts = torch.zeros(2, B, B, dtype=torch.float64)
    for seed in range(runs):
        image_negative, text_negative = sample(impl, image, text, scale, seed, ids, floor=floor)
        for count, indices in zip(counts, (text_negative, image_negative)):
            count[torch.arange(B), indices] += 1
    for count, w in zip(counts, weights):
        assert not count[w == 0].any()
        assert abs(chi_square(count, w)) < 4
        # and not those of the softmax without a floor, where the floor is large
        if floor == 0.05:
            assert chi_square(count, torch.where(w > 0, w - floor, 0)) > 10


@EVERY
def test_the_floor_alone_is_uniform(impl):
    """Features that have converged: a negative's probability is e^-100 beside the floor's 1e-5."""
    B, runs = (10, 1) if INTERPRETED else (10, 200)
    eye = torch.eye(B)
    counts = torch.zeros(2, B, B, dtype=torch.float64)
    for seed in range(runs):
        for count, indices in zip(counts, sample(impl, eye, eye, 100.0, seed)):
            count[torch.arange(B), indices] += 1
    uniform = 1 - torch.eye(B, dtype=torch.float64)
    assert not counts.diagonal(dim1=1, dim2=2).any()
    if not INTERPRETED:
        assert all(abs(chi_square(count, uniform)) < 4 for count in counts)
    # without the floor the logits decide, however far below the positive they lie
    eye[0, 1] = eye[1, 0] = 0.5
    image_negative, text_negative = sample(impl, eye, eye, 100.0, 1, floor=0.0)
    assert image_negative[:2].tolist() == text_negative[:2].tolist() == [1, 0]


@EVERY
def test_rows_without_a_negative(impl):
    image, text = features(6, 4)
    for drawn in (sample(impl, image, text, 9.0, 1, groups(6, "one")), sample(impl, image[:1], text[:1], 9.0, 1)):
        assert all(indices.eq(-1).all() for indices in drawn)
    assert [indices.shape for indices in sample(impl, image[:0], text[:0], 9.0, 1)] == [(0,), (0,)]
    two = sample(impl, image[:2], text[:2], 9.0, 1)
    assert [indices.tolist() for indices in two] == [[1, 0], [1, 0]]


@EVERY
@pytest.mark.parametrize("floor", [0.0, 1e-5])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_draws_nothing(impl, floor, value):
    B = 10 if INTERPRETED else 70
    image, text = features(B, 4)
    image[3, 1] = value
    image_negative, text_negative = sample(impl, image, text, 9.0, 1, floor=floor)
    assert text_negative[3] == -1 and (text_negative >= 0).sum() == B - 1
    # without a floor the text of row 3 does not ask what its own image weighs
    spared = torch.arange(B) == 3 if floor == 0 else torch.zeros(B, dtype=torch.bool)
    finite = image_negative >= 0
    # an infinite logit below all others weighs nothing
    assert torch.equal(finite, spared) if value != value else not finite[text[:, 1] * (~spared) > 0].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    B, device = 8, device_of(impl)
    image, text = features(B, 6)
    expected = sample(impl, image, text, 8.0, 2, groups(B, "pairs"))
    wide = torch.zeros(B, 13, device=device)
    wide[:, 1::2] = image.to(device)
    ids = torch.zeros(B, 2, dtype=torch.int64, device=device)
    ids[:, 1] = groups(B, "pairs").to(device)
    columns = text.to(device).T.contiguous().T
    seed = torch.tensor([2], device=device)
    got = kernels.sample_hard_negatives(wide[:, 1::2], columns, 8.0, ids=ids[:, 1], seed=seed, impl=impl)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected))


@pytest.mark.parametrize("impl", IMPLS)
def test_carries_no_gradient_and_compiles(impl):
    device = device_of(impl)
    image, text = (x.to(device).requires_grad_() for x in features(12, 4))
    scale = torch.tensor([7.0], device=device, requires_grad=True)

    def draw(image, text, scale, seed):
        return kernels.sample_hard_negatives(image * 2, text, scale.exp(), seed=seed, impl=impl)

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for number in (1, 2):
        seed = torch.tensor([number], device=device)
        eager = draw(image, text, scale / 4, seed)
        assert not any(indices.requires_grad for indices in eager)
        assert all(torch.equal(a, b) for a, b in zip(eager, compiled(image, text, scale / 4, seed)))


@EVERY
def test_autocast_rounds_the_features(impl):
    if INTERPRETED:
        pytest.skip("the interpreter multiplies the bits of bf16 operands")
    image, text = features(40, 6)
    with torch.autocast(device_of(impl), dtype=torch.bfloat16):
        got = sample(impl, image, text, 20.0, 1)
    expected = sample(impl, image.bfloat16(), text.bfloat16(), 20.0, 1)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.skipif(INTERPRETED, reason="no kernel of Triton takes fp64")
def test_double_precision_stays():
    image, text = features(130, 6, torch.float64)
    got, expected = (sample(name, image, text, 50.0, 1) for name in ("cpu", "reference"))
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.skipif(INTERPRETED, reason="no kernel of Triton is called")
def test_the_matrix_is_not_stored():
    B = 2048
    image, text = features(B, 8)
    with Allocations() as allocations:
        hard_negatives_cpu.sample(image, text, torch.tensor(9.0), torch.arange(B) // 2, 1e-5, torch.tensor([1]))
    limit = 8 * B * hard_negatives_cpu.SIDE
    assert max(size for _, size in allocations.found) <= limit == 4 * hard_negatives_cpu.BLOCK_VALUES < B * B


@pytest.mark.skipif(INTERPRETED, reason="no kernel of Triton is called")
def test_operator_is_well_formed():
    image, text = features(5, 3)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.sycoca_kernels.sample_hard_negatives
    arguments = image, text, torch.tensor(9.0), groups(5, "pairs"), 1e-5, torch.tensor([1]), "cpu"
    torch.library.opcheck(operator, arguments, test_utils=tests)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"image": torch.ones(4)}, ValueError, r"image must be \(B, D\) with D >= 1, got \(4,\)"),
        ({"image": torch.ones(4, 3).int()}, TypeError, "image must be floating, got torch.int32"),
        ({"text": torch.ones(5, 3)}, ValueError, r"text must be \(4, 3\), got \(5, 3\)"),
        ({"text": torch.ones(4, 3).half()}, TypeError, "text must be torch.float32, got torch.float16"),
        ({"ids": torch.zeros(3).long()}, ValueError, r"ids must be \(4,\), got \(3,\)"),
        ({"ids": torch.zeros(4)}, TypeError, "ids must be torch.int64, got torch.float32"),
        ({"floor": -1e-5}, ValueError, "floor must be finite and at least 0, got -1e-05"),
        ({"floor": float("nan")}, ValueError, "floor must be finite and at least 0, got nan"),
        ({"floor": "0"}, TypeError, "floor must be a float, got str"),
        ({"seed": 3}, TypeError, "seed must be a tensor, got int"),
        ({"seed": torch.tensor(3)}, ValueError, r"seed must be \(1,\), got \(\)"),
        ({"seed": torch.tensor([3.0])}, TypeError, "seed must be torch.int64, got torch.float32"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be positive and finite, got 0.0"),
        ({"logit_scale": "1"}, TypeError, "logit_scale must be a float or a tensor, got str"),
        ({"logit_scale": torch.ones(2)}, ValueError, r"logit_scale must have one element, got \(2,\)"),
        ({"impl": "fast"}, ValueError, "impl must be 'auto' or one of .*, got 'fast'"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"image": torch.ones(4, 3), "text": torch.ones(4, 3), "logit_scale": 9.0, "seed": torch.tensor([1])}
    arguments |= change
    places = [arguments.pop(name) for name in ("image", "text", "logit_scale")]
    with pytest.raises(error, match=f"sample_hard_negatives: {message}"):
        kernels.sample_hard_negatives(*places, **arguments)


def test_values_are_checked_on_demand(monkeypatch):
    monkeypatch.setenv("KERNELS_CHECK", "1")
    image, text = features(3, 2)
    kernels.sample_hard_negatives(image, text, 9.0, seed=torch.tensor([1]))
    text[1, 0] = float("inf")
    with pytest.raises(ValueError, match="sample_hard_negatives: text must be finite, got inf or nan"):
        kernels.sample_hard_negatives(image, text, 9.0, seed=torch.tensor([1]))
