"""What the `cpu` forms of the masking operators allocate beside their outputs: blocks, whatever the batch."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from kernels import patch_loss_cpu, select_cpu


class Allocations(TorchDispatchMode):
    """(address, bytes) of the memory behind every result."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.found |= memory_of(result)
        return result


def memory_of(tensors):
    storages = [t.untyped_storage() for t in tree_iter(tensors) if isinstance(t, torch.Tensor)]
    return {(storage.data_ptr(), storage.nbytes()) for storage in storages}


def largest_scratch(function, *args):
    """The largest memory, bytes, that is neither an input nor an output."""
    with Allocations() as allocations:
        outputs = function(*args)
    return max(size for _, size in allocations.found - memory_of(args) - memory_of(outputs))


def test_selection_stores_a_block_of_similarities():
    B, P, T, D = 300, 100, 64, 16
    patches, tokens, valid = torch.randn(B, P, D), torch.randn(B, T, D), torch.rand(B, T) < 0.5
    scratch = largest_scratch(select_cpu.select, patches, tokens, valid, 50, 50, 1, P, 1e-8)
    assert scratch <= 4 * select_cpu.BLOCK_VALUES < 4 * B * P * T


def test_patch_loss_stores_a_block_of_pixels():
    B, p, K = 48, 16, 50
    images, pred = torch.randn(B, 3, 160, 160), torch.randn(B, K, p * p * 3)
    index = torch.rand(B, 100).argsort(1)[:, :K]
    for kind in ("l1", "mse", "mse_normalised"):
        options = pred, images, index, p, kind, 1.0, 1e-6
        limit = 4 * patch_loss_cpu.BLOCK_VALUES
        assert largest_scratch(patch_loss_cpu.loss, *options) <= limit < pred.nbytes / 2
        assert largest_scratch(patch_loss_cpu.loss_backward, torch.tensor(1.0), *options) <= limit
