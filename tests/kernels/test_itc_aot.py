import pytest

from tests.kernels.tritons import TRITONS, rows_of

# Of one program on an A100 and on an H200.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
SPECIALISED = {"_sums_specialised_kernel", "_gradient_specialised_kernel"}
PRODUCTS = {"_sums_kernel", "_gradient_kernel", "_sigmoid_kernel"}


def check(row):
    assert row["shared"] <= SHARED_BYTES[row["architecture"]], row
    spills = row["stack"], row["instructions"]["LDL"], row["instructions"]["STL"]
    assert spills == (0, 0, 0), row
    if row["kernel"] in SPECIALISED:
        # The producer gives registers away, the multiplying warps take them.
        assert row["instructions"]["HGMMA"] > 0 and row["instructions"]["UTMALDG"] > 0, row
        assert row["instructions"]["USETMAXREG"] > 0, row
    if row["kernel"] in PRODUCTS | {"_online_kernel"} and row["itemsize"] == 2:
        tensor_cores = "HGMMA" if row["architecture"] == 90 else "HMMA"
        assert row["instructions"][tensor_cores] > 0, row
        # Operands reach shared memory by TMA, or by asynchronous copies where their rows are aligned.
        loads = row["instructions"]["UTMALDG" if row["options"]["TMA"] else "LDGSTS"]
        assert loads > 0 or not row["aligned"], row


@pytest.mark.parametrize("triton", TRITONS)
def test_shipped_shape_compiles(triton):
    rows = rows_of("tests.kernels.aot_itc", "hopper" if triton else "few", triton=triton)
    architectures = (90,) if triton else (80, 90)
    assert {(row["kernel"], row["architecture"]) for row in rows} >= {(k, a) for k in PRODUCTS for a in architectures}
    assert {row["kernel"] for row in rows} >= SPECIALISED
    for row in rows:
        check(row)


@pytest.mark.full
@pytest.mark.parametrize("triton", TRITONS)
def test_every_tile_compiles(triton):
    rows = rows_of("tests.kernels.aot_itc", "all", triton=triton)
    assert {row["kernel"] for row in rows} >= PRODUCTS | {"_online_kernel", "_prologue_kernel", "_epilogue_kernel"}
    for row in rows:
        check(row)
