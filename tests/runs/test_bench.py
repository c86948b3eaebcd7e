"""The benchmark commands, at the sizes of this machine."""

import json
import time

import pytest

pytestmark = pytest.mark.run


def test_benchmarks_run_within_three_minutes(command):
    started = time.monotonic()
    done = command("pytest bench/ --benchmark-only", timeout_s=600)
    assert done.code == 0, done.out[-3000:]
    for name in ("test_step", "test_itc"):
        assert name in done.out
    assert time.monotonic() - started < 180


def test_the_whole_step_is_measured_beside_open_clip(command, checkout, tmp_path):
    done = command(
        f"python -m bench.step --preset tiny --pairs 8 --rounds 1 --against {checkout}"
        " --only sycoca coca open_clip sycoca@before",
        env={"BENCH_RESULTS": str(tmp_path)},
    )
    assert done.code == 0, done.err[-3000:]
    rows = {row["case"]: row for row in map(json.loads, (tmp_path / "step.jsonl").read_text().splitlines())}
    assert rows.keys() == {"sycoca", "coca", "open_clip", "sycoca@before"}
    assert rows["sycoca"]["first_loss"] == pytest.approx(rows["sycoca@before"]["first_loss"], rel=1e-5)
    # A second pass and a second decoder cost something, but less than the first ones.
    assert rows["coca"]["tflops"] < rows["sycoca"]["tflops"] < 2.5 * rows["coca"]["tflops"]
    assert rows["open_clip"]["tflops"] == pytest.approx(rows["coca"]["tflops"], rel=0.25)
    assert all(row["pairs_per_s"] > 0 and row["peak_mib"] > 0 for row in rows.values())
    assert 0 < rows["sycoca"]["mfu"] < 1.2
    for name, parts in (("sycoca", {"vision", "vision, second pass", "image_decoder"}), ("open_clip", {"visual"})):
        assert parts <= rows[name]["parts"].keys()
        assert rows[name]["phases"].keys() == {"forward", "backward", "clipping", "optimizer"}
        for shares in (rows[name]["parts"], rows[name]["phases"]):
            assert sum(shares.values()) == pytest.approx(1, abs=2e-3) and min(shares.values()) >= 0
    assert "of open_clip's" in done.out and "times the FLOPs" in done.out


def test_a_step_refuses_what_is_no_checkout(command):
    done = command("python -m bench.step --against tests")
    assert done.code == 2 and done.err.strip().endswith("--against tests: no checkout of this project")


@pytest.mark.full
def test_memory_grows_with_the_micro_batch_and_not_with_the_batch(command, tmp_path):
    done = command(
        "python -m bench.two_pass --preset tiny --pairs 16 --times 1 16 --at-once 16 --rounds 1",
        env={"BENCH_RESULTS": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert done.code == 0, done.err[-3000:]
    one, parts, whole = map(json.loads, (tmp_path / "two_pass.jsonl").read_text().splitlines())
    assert (one["B"], parts["B"], whole["B"]) == (16, 256, 256) and (parts["parts"], whole["parts"]) == (16, 1)
    assert parts["peak_mib"] < 1.5 * one["peak_mib"] < 0.25 * whole["peak_mib"]
    # The encoders run once more; smaller products and the first step's memory cost the rest.
    assert parts["ms_per_pair"] < 2 * whole["ms_per_pair"]
