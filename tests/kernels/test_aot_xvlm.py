"""What the region kernels compile to, for architectures that need not be here, under every Triton at hand."""

import pytest

pytest.importorskip("triton")

from tests.kernels.tritons import TRITONS, rows_of

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
REGISTERS = 64 * 1024
KERNELS = {
    "_pool_kernel",
    "_pool_backward_kernel",
    "_sums_kernel",
    "_draw_kernel",
    "_loss_kernel",
    "_loss_backward_kernel",
}


def assert_legal(row):
    what = f"{row['kernel']} {row['options']} on sm_{row['architecture']}"
    instructions = row["instructions"]
    assert row["stack"] == instructions["LDL"] == instructions["STL"] == 0, f"{what} spills"
    # at least two programs, and twelve warps, on a multiprocessor
    assert 2 * row["shared"] <= SHARED_BYTES[row["architecture"]], what
    assert 12 * 32 * row["registers"] <= REGISTERS, f"{what}: {row['registers']} registers"
    if row["half"] and row["kernel"] == "_sums_kernel":
        assert instructions["HGMMA" if row["architecture"] == 90 else "HMMA"] > 0, f"{what} misses the tensor cores"
    if row["half"] and row["kernel"] == "_pool_kernel":
        # sixteen rectangles: fewer rows than a warp group multiplies
        assert instructions["HMMA"] > 0, f"{what} misses the tensor cores"


@pytest.mark.parametrize("triton", TRITONS)
def test_shipped_shapes_compile(triton):
    rows = rows_of("tests.kernels.aot_xvlm", "few", triton=triton)
    for row in rows:
        assert_legal(row)
    assert {row["kernel"] for row in rows} == KERNELS
    assert {row["architecture"] for row in rows if row["kernel"] == "_pool_kernel"} == {80, 90}


@pytest.mark.full
@pytest.mark.parametrize("triton", TRITONS)
def test_every_tile_compiles(triton):
    for row in rows_of("tests.kernels.aot_xvlm", "all", triton=triton):
        assert_legal(row)
