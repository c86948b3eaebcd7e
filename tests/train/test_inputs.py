"""What is taken off the tokens of a batch before they travel to the device."""

import pytest
import torch

from train.inputs import trim


@pytest.mark.parametrize(
    ("longest", "room", "width"), [(3, 32, 8), (8, 32, 8), (9, 32, 16), (30, 30, 30), (0, 32, 8), (2, 5, 5)]
)
def test_only_shared_padding_goes(longest, room, width):
    tokens = torch.zeros(3, room, dtype=torch.int64)
    tokens[1, :longest] = 7
    trimmed = trim(tokens, 0)
    assert trimmed.shape == (3, width) and trimmed.is_contiguous()
    assert torch.equal(trimmed, tokens[:, :width]) and not tokens[:, width:].any()
