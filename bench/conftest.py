import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def full_size(device) -> bool:
    """Whether the sizes are those of the documented bars, or such as a CPU finishes in seconds."""
    return device.type == "cuda"
