import pytest

from tests.kernels.tritons import TRITONS, rows_of

# Of the tensor's norm: a few roundings of fp32.
FLOOR = 1e-6


@pytest.mark.parametrize("triton", TRITONS)
def test_kernels_in_the_interpreter(triton):
    check(rows_of("tests.kernels.interpreted_itc", "few" if triton else "all", triton=triton, interpret=True), 4)


@pytest.mark.full
@pytest.mark.parametrize("triton", TRITONS)
def test_all_cases_in_the_interpreter(triton):
    check(rows_of("tests.kernels.interpreted_itc", "all", triton=triton, interpret=True), 18)


def check(rows, at_least):
    assert len(rows) >= at_least
    for row in rows:
        for error, budget, rounding in zip(row["errors"], row["budget"], row["rounding"]):
            # fp16: G is rounded once to 11 bits, before a sum with fp32 accumulation.
            product = 2.0**-11 if row.get("dtype") == "torch.float16" else 0.0
            # At a scale of 100 the loss's own bar is ten times that of 14.3.
            bar = 10 * FLOOR if row["largest_logit"] > 50 else FLOOR
            assert error <= max(budget, rounding + product, bar), row
