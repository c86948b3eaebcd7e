import math

import pytest
import torch

import kernels
from kernels import reference
from tests.kernels.masking import DTYPES, INTERPRETED, assert_within_budget, device_of, fused

IMPLS = fused("attentive_select")


def features(B, P, T, D, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(B, P, D, generator=generator).to(dtype)
    tokens = torch.randn(B, T, D, generator=generator).to(dtype)
    return patches, tokens, torch.rand(B, T, generator=generator) < 0.6


def run(impl, patches, tokens, valid, **sizes):
    device = device_of(impl)
    selection = kernels.attentive_select(patches.to(device), tokens.to(device), valid.to(device), impl=impl, **sizes)
    return kernels.PatchSelection(*(part.cpu() for part in selection))


def assert_ordered(selection, num_masked, num_dropped, block=1, grid=None):
    """The lists are those of a stable sort of the scores returned (of their sums over squares)."""
    scores = selection.scores
    B, P = scores.shape
    rows, columns = grid or (1, P)
    total = torch.zeros(B, rows // block, columns // block)
    for dy in range(block):
        for dx in range(block):
            total += scores.view(B, rows, columns)[:, dy::block, dx::block]
    order = total.flatten(1).sort(dim=1, descending=True, stable=True).indices
    place = torch.arange(P).view(rows, columns)
    unit = place // columns // block * (columns // block) + place % columns // block
    rank = order.argsort(1)[:, unit.flatten()] * block**2
    for name, expected, length in (
        ("masked", rank < num_masked, num_masked),
        ("visible", rank >= num_masked, P - num_masked),
        ("dropped", rank >= P - num_dropped, num_dropped),
        ("kept", rank < P - num_dropped, P - num_dropped),
    ):
        got = getattr(selection, name)
        assert got.shape == (B, length) and got.dtype == torch.int64 and got.is_contiguous(), name
        assert torch.equal(got, expected.nonzero()[:, 1].view(B, length)), name


# one of each; tiles of 16 to 128 exactly and one past; base_16 in width only (the interpreter is slow)
SHAPES = ((1, 1, 1, 1), (3, 5, 7, 9), (2, 16, 16, 32), (2, 33, 17, 65), (2, 196, 20, 64), (1, 130, 129, 40))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_and_order(impl, dtype, shape):
    patches, tokens, valid = features(*shape, dtype)
    P = shape[1]
    got = run(impl, patches, tokens, valid, num_masked=P // 2, num_dropped=P // 3)
    plain, *_ = reference.attentive_select(patches, tokens, valid, 0, 0)
    truth, *_ = reference.attentive_select(patches.double(), tokens.double(), valid, 0, 0)
    assert got.scores.dtype == torch.float32
    assert_within_budget(got.scores, plain, truth, "scores")
    assert_ordered(got, P // 2, P // 3)


# every small count; around the powers of 2, the shipped patch counts and the limit
COUNTS = (*range(1, 66), 195, 196, 197, 255, 256, 257, 576, 577, 578, 1023, 1024)


# the interpreter takes seconds where P is large: one past a power of 2, a shipped count, the limit
FEW_COUNTS = (1, 2, 17, 64, 65, 196)


def assert_selects(impl, P, rows, **squares):
    generator = torch.Generator().manual_seed(P)
    # two small integers make a handful of different scores: most are ties
    patches = torch.randint(-2, 3, (rows, P, 2), generator=generator).float()
    patches[: rows // 2] = torch.randn(rows // 2, P, 2, generator=generator)
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]).expand(rows, 2, 2)
    valid = torch.rand(rows, 2, generator=generator) < 0.8
    unit = squares.get("block", 1) ** 2
    num_masked = int(torch.randint(0, P // unit + 1, (), generator=generator)) * unit
    for num_dropped in {P // 3 // unit * unit} if INTERPRETED else {P - num_masked, P // 3 // unit * unit}:
        selection = run(impl, patches, tokens, valid, num_masked=num_masked, num_dropped=num_dropped, **squares)
        assert_ordered(selection, num_masked, num_dropped, **squares)
    truth, *_ = reference.attentive_select(patches.double(), tokens.double(), valid, 0, 0)
    assert (selection.scores - truth).abs().max() <= 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_at_every_length(impl):
    for P in FEW_COUNTS if INTERPRETED else COUNTS:
        assert_selects(impl, P, 2 if INTERPRETED else 4)
    if INTERPRETED:
        assert_selects(impl, 1024, 1)


@pytest.mark.full
@pytest.mark.parametrize("impl", IMPLS)
def test_ten_thousand_rows(impl):
    if INTERPRETED:
        pytest.skip("hours in the interpreter")
    for P in COUNTS:
        assert_selects(impl, P, 10_000)
    for side in (2, 4, 14, 16, 24, 32):
        assert_selects(impl, side * side, 10_000, block=2, grid=(side, side))


@pytest.mark.parametrize("impl", IMPLS)
def test_planted_ties_go_by_index(impl):
    patches = torch.tensor([2.0, 1.0, 2.0, 1.0, 2.0, 3.0])[None, :, None] * torch.tensor([1.0, 0.0])
    patches[0, :, 1] = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    tokens, valid = torch.tensor([[[1.0, 0.0]]]), torch.ones(1, 1, dtype=torch.bool)
    selection = run(impl, patches, tokens, valid, num_masked=3, num_dropped=1)
    assert selection.scores[0].tolist() == pytest.approx([1, 0.5**0.5, 1, 0.5**0.5, 1, 1])
    assert selection.masked.tolist() == [[0, 2, 4]]
    assert selection.visible.tolist() == [[1, 3, 5]]
    assert selection.dropped.tolist() == [[3]]
    assert selection.kept.tolist() == [[0, 1, 2, 4, 5]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("block, grid", [(2, (2, 2)), (2, (6, 8)), (2, (14, 14)), (3, (6, 9)), (1, (5, 7))])
def test_squares(impl, block, grid):
    P = math.prod(grid)
    patches, tokens, valid = features(3, P, 5, 8)
    patches[0, : P // 2] = patches[0, 0]
    masked, dropped = P // 2 // block**2 * block**2, P // 3 // block**2 * block**2
    sizes = {"num_masked": masked, "num_dropped": dropped, "block": block, "grid": grid}
    assert_ordered(run(impl, patches, tokens, valid, **sizes), **sizes)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_captions_without_a_valid_token(impl):
    patches, tokens, valid = features(3, 6, 4, 8)
    valid[1] = False
    selection = run(impl, patches, tokens, valid, num_masked=2, num_dropped=3)
    assert selection.scores[1].tolist() == [0.0] * 6
    assert selection.masked[1].tolist() == [0, 1] and selection.dropped[1].tolist() == [3, 4, 5]
    none = run(impl, patches, tokens[:, :0], valid[:, :0], num_masked=2, num_dropped=3)
    assert torch.equal(none.scores, torch.zeros(3, 6))
    assert none.kept.tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_zero_vectors_score_zero_and_magnitude_does_not_count(impl):
    patches, tokens, valid = features(2, 9, 5, 16)
    valid[:] = True
    expected = run(impl, patches, tokens, valid, num_masked=1, num_dropped=1).scores
    scaled = run(impl, patches * 1e12, tokens * 1e-6, valid, num_masked=1, num_dropped=1).scores
    assert torch.allclose(scaled, expected, rtol=0, atol=1e-6)
    patches[:, 3] = 0
    tokens[:, 0] = 0
    valid[1, 1:] = False
    scores = run(impl, patches, tokens, valid, num_masked=1, num_dropped=1).scores
    assert scores[:, 3].tolist() == [0.0, 0.0] and not scores[1].any()
    # no negative zero: it would come after the positive one in an order of bits
    assert not torch.signbit(scores[1]).any()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("masked, dropped", [(0, 0), (6, 6), (0, 6), (6, 0)])
def test_nothing_and_everything(impl, masked, dropped):
    patches, tokens, valid = features(2, 6, 3, 4)
    selection = run(impl, patches, tokens, valid, num_masked=masked, num_dropped=dropped)
    assert_ordered(selection, masked, dropped)
    empty = run(impl, patches[:0], tokens[:0], valid[:0], num_masked=masked, num_dropped=dropped)
    assert [part.shape[0] for part in empty] == [0] * 5


@pytest.mark.parametrize("impl", IMPLS)
def test_halves_are_complementary(impl):
    selection = run(impl, *features(2, 12, 3, 4), num_masked=6, num_dropped=6)
    assert torch.equal(selection.masked, selection.kept) and torch.equal(selection.visible, selection.dropped)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    patches, tokens, valid = features(3, 10, 6, 8)
    expected = run(impl, patches, tokens, valid, num_masked=4, num_dropped=4)
    device = device_of(impl)
    strided = torch.empty(8, 10, 3, device=device).permute(2, 1, 0).copy_(patches)
    wide = torch.zeros(3, 13, 17, device=device)
    wide[:, 1:7, 3:11] = tokens.to(device)
    mask = torch.zeros(6, 3, dtype=torch.bool, device=device).T.copy_(valid)
    got = kernels.attentive_select(strided, wide[:, 1:7, 3:11], mask, num_masked=4, num_dropped=4, impl=impl)
    for name, left, right in zip(expected._fields, got, expected):
        assert torch.allclose(left.cpu().double(), right.double(), rtol=0, atol=1e-6), name


@pytest.mark.parametrize("impl", IMPLS)
def test_carries_no_gradient_and_compiles(impl):
    device = device_of(impl)
    patches, tokens, valid = (x.to(device) for x in features(2, 9, 4, 8))
    patches.requires_grad_()

    def select(patches, tokens, valid):
        return kernels.attentive_select(patches, tokens, valid, num_masked=3, num_dropped=4, impl=impl)

    eager = select(patches, tokens, valid)
    assert not any(part.requires_grad for part in eager)
    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")(patches, tokens, valid)
    assert all(torch.equal(left, right) for left, right in zip(eager, compiled))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_autocast_rounds_the_features(impl):
    if INTERPRETED:
        pytest.skip("the interpreter multiplies the bits of bf16 operands")
    patches, tokens, valid = features(2, 9, 4, 8)
    with torch.autocast(device_of(impl), dtype=torch.bfloat16):
        got = run(impl, patches, tokens, valid, num_masked=3, num_dropped=4)
    rounded = run(impl, patches.bfloat16(), tokens.bfloat16(), valid, num_masked=3, num_dropped=4)
    assert got.scores.dtype == torch.float32 and torch.equal(got.scores, rounded.scores)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"patches": torch.ones(2, 6)}, ValueError, r"patches must be \(B, P, D\), got \(2, 6\)"),
        ({"tokens": torch.ones(2, 3, 5)}, ValueError, r"tokens must be \(2, T, 4\), got \(2, 3, 5\)"),
        ({"valid": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"valid must be \(2, 3\), got \(2, 4\)"),
        ({"valid": torch.ones(2, 3)}, TypeError, r"valid must be torch.bool, got torch.float32"),
        ({"tokens": torch.ones(2, 3, 4).half()}, TypeError, r"tokens must be torch.float32, got torch.float16"),
        ({"patches": torch.ones(2, 6, 4).long()}, TypeError, r"patches must be floating, got torch.int64"),
        ({"num_masked": 7}, ValueError, r"num_masked must be in 0 .. 6, got 7"),
        ({"num_dropped": -1}, ValueError, r"num_dropped must be in 0 .. 6, got -1"),
        ({"num_masked": 2.0}, TypeError, r"num_masked must be an int, got 2.0"),
        ({"num_masked": True}, TypeError, r"num_masked must be an int, got True"),
        ({"block": 2}, ValueError, r"num_masked must be a multiple of block \* block = 4, got 2"),
        ({"block": 2, "num_masked": 4}, ValueError, r"grid must be given where block is not 1"),
        ({"block": 2, "num_masked": 4, "grid": (3, 2)}, ValueError, r"grid must be \(rows, columns\) of 6 patches"),
        ({"block": 0}, ValueError, r"block must be at least 1, got 0"),
        ({"impl": "fast"}, ValueError, r"impl must be 'auto' or one of .*, got 'fast'"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {
        "patches": torch.ones(2, 6, 4),
        "tokens": torch.ones(2, 3, 4),
        "valid": torch.ones(2, 3, dtype=torch.bool),
        "num_masked": 2,
        "num_dropped": 0,
    } | change
    with pytest.raises(error, match=f"attentive_select: .*{message}"):
        kernels.attentive_select(arguments.pop("patches"), arguments.pop("tokens"), arguments.pop("valid"), **arguments)
