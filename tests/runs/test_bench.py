"""The benchmark command of the README, at the sizes of this machine."""

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
