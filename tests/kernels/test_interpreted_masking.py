"""The tests of the masking and of the region operators once more, in processes where Triton interprets its kernels."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).parents[2]
FILES = (
    "test_select.py",
    "test_patches.py",
    "test_patch_loss.py",
    "test_region_pool.py",
    "test_hard_negatives.py",
    "test_box_loss.py",
)


def tritons():
    second = os.environ.get("TRITON_ALT")
    return [None, *([second] if second and pathlib.Path(second).is_dir() else [])]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process is the inner one")
@pytest.mark.parametrize("folder", tritons(), ids=lambda folder: "second" if folder else "installed")
def test_interpreted(folder):
    first = [str(pathlib.Path(folder).resolve())] if folder else []
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([*first, str(ROOT)])}
    # every test that takes an implementation, but for the compiler's; a selection of them under the second Triton
    chosen = (
        "triton and (order or squares or frozen or pixel_order or alike or cut_off or definition)"
        if folder
        else "triton and not compiles"
    )
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-k", chosen, "-m", "not full", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, *(str(ROOT / "tests" / "kernels" / name) for name in FILES)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout or "[100%]" in run.stdout
