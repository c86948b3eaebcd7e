import subprocess
import sys

import pytest
import torch

import kernels
from kernels import dispatch, tuning

FEATURES = torch.ones(2, 3)


def test_torch_forms_run_everywhere():
    for operator in dispatch.OPERATORS:
        assert {"reference", "cpu"} <= set(kernels.implementations(operator))


def test_unknown_operator_is_named():
    with pytest.raises(ValueError, match="unknown operator 'fused_loss'"):
        kernels.implementations("fused_loss")


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match=r"fused_itc_loss: impl must be .* got 'magic'"):
        kernels.fused_itc_loss(FEATURES, FEATURES, 1.0, impl="magic")


@pytest.mark.skipif(dispatch.interpreting(), reason="the interpreter takes CPU tensors")
def test_explicit_choice_never_falls_back():
    with pytest.raises(ValueError, match="impl='triton' needs"):
        kernels.fused_itc_loss(FEATURES, FEATURES, 1.0, impl="triton")


def test_every_tuned_choice_is_declared_and_says_where_it_comes_from():
    for operator, choices in tuning.FUSED_FROM.items():
        for choice in choices.values():
            assert choice.impl in ("cpu", "triton")
            assert choice.row
            assert operator in dispatch.OPERATORS


def test_auto_takes_the_fused_form_from_its_size_on():
    cuda = torch.device("cuda")
    threshold = tuning.FUSED_FROM["fused_itc_loss"]["cuda"]
    runnable = ("reference", "triton")
    assert tuning.preferred("fused_itc_loss", cuda, runnable, size=threshold.size) == "triton"
    assert tuning.preferred("fused_itc_loss", cuda, runnable, size=threshold.size - 1) == "reference"
    assert tuning.preferred("fused_itc_loss", cuda, ("reference",), size=threshold.size) == "reference"


def test_explain_says_what_auto_takes_and_what_stands_in_the_way_of_the_others():
    for operator in dispatch.OPERATORS:
        cpu = kernels.explain(operator)
        assert cpu.taken == dispatch.select(operator, "auto", torch.device("cpu"), size=1 << 40)
        assert set(cpu.obstacles).isdisjoint(kernels.implementations(operator))
        assert tuning.FUSED_FROM[operator]["cpu"].row in cpu.reason
        cuda = kernels.explain(operator, "cuda")
        assert "needs CPU tensors" in cuda.obstacles["cpu"]
        assert set(cuda.obstacles) | {cuda.taken, "reference", "triton"} >= set(dispatch.OPERATORS[operator])
    assert "from size" in kernels.explain("fused_itc_loss", "cuda").reason
    assert kernels.explain("fused_itc_loss", "xpu").taken == "reference"
    with pytest.raises(ValueError, match="unknown operator"):
        kernels.explain("fused_loss")


def test_import_is_torch_only():
    program = "import sys, kernels; print([m for m in ('triton', 'sycoca', 'deepspeed') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"
