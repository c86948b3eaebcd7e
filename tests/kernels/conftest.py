import pytest
import torch

import kernels


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory():
    """Whatever `torch.empty` returns is NaN until it is written."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(previous)


@pytest.fixture(scope="session")
def warm_operators():
    """Custom operators load the compiler's front end at their first call; forked ranks inherit it."""
    features = torch.ones(2, 2, requires_grad=True)
    kernels.fused_itc_loss(features, features, 1.0, impl="cpu").backward()
