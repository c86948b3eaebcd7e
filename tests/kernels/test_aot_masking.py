"""What the masking and region kernels compile to for architectures that need not be here, under every Triton."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).parents[2]
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
REGISTERS = 64 * 1024
REGION_KERNELS = {
    "_pool_kernel",
    "_pool_backward_kernel",
    "_sums_kernel",
    "_draw_kernel",
    "_boxes_kernel",
    "_boxes_backward_kernel",
}


def tritons():
    """Folders to put in front of the path: none for the installed Triton, and that of the second one."""
    second = os.environ.get("TRITON_ALT")
    return [None, *([second] if second and pathlib.Path(second).is_dir() else [])]


def compile_all(folder, extent):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [folder and str(pathlib.Path(folder).resolve()), str(ROOT)])
    )
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot_masking", extent],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def assert_legal(row):
    what = f"{row['kernel']} {row['options']} on sm_{row['architecture']}"
    options, instructions = row["options"], row["instructions"]
    assert row["shared"] <= SHARED_BYTES[row["architecture"]], what
    assert row["stack"] == instructions["LDL"] == instructions["STL"] == 0, f"{what} spills"
    if row["kernel"] in REGION_KERNELS:
        # at least two programs, and twelve warps, on a multiprocessor
        assert 2 * row["shared"] <= SHARED_BYTES[row["architecture"]], what
        assert 12 * 32 * row["registers"] <= REGISTERS, f"{what}: {row['registers']} registers"
        if row["half"] and row["kernel"] in ("_pool_kernel", "_sums_kernel"):
            # sixteen rectangles are fewer rows than a warp group multiplies
            wide = row["architecture"] == 90 and row["kernel"] == "_sums_kernel"
            assert instructions["HGMMA" if wide else "HMMA"] > 0, f"{what} misses the tensor cores"
    elif row["kernel"] == "_select_kernel":
        threads = 32 * options["num_warps"]
        assert 2 * threads * row["registers"] <= REGISTERS, f"{what}: one program per multiprocessor"
        assert 2 * row["shared"] <= SHARED_BYTES[row["architecture"]], what
        assert instructions["LDGSTS"] > 0, f"{what} does not load ahead"
        if row["half"]:
            wide = row["architecture"] == 90 and options["BLOCK_P"] >= 64
            assert instructions["HGMMA" if wide else "HMMA"] > 0, f"{what} misses the tensor cores"
    elif options.get("BLOCK_D", 0) >= 256 or (options.get("BLOCK_N", 0) >= 1024 and aligned(options)):
        assert instructions["wide"] > 0, f"{what} has no 16-byte access"


def aligned(options):
    """Whether every patch of a contiguous prediction starts at a multiple of 16 values; of 14 x 14 x 3 none does."""
    return options["SIDE"] ** 2 * options["CHANNELS"] % 16 == 0


@pytest.mark.parametrize("folder", tritons(), ids=lambda folder: "second" if folder else "installed")
def test_shipped_shapes_compile(folder):
    rows = compile_all(folder, "few")
    for row in rows:
        assert_legal(row)
    assert {row["kernel"] for row in rows} == {
        "_select_kernel",
        "_gather_kernel",
        "_scatter_kernel",
        "_scatter_backward_kernel",
        "_loss_kernel",
        "_loss_backward_kernel",
    } | REGION_KERNELS
    assert {row["architecture"] for row in rows if row["kernel"] == "_pool_kernel"} == {80, 90}


@pytest.mark.full
@pytest.mark.parametrize("folder", tritons(), ids=lambda folder: "second" if folder else "installed")
def test_every_tile_compiles(folder):
    for row in compile_all(folder, "all"):
        assert_legal(row)
