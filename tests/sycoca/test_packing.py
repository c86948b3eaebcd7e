"""Packed rows and blocked MLPs against the plain forms: losses, gradients, and how many rows are worked on."""

import pytest
import torch
import torch.nn.functional as F

from sycoca import fused_mlp
from sycoca.layers import MLP
from sycoca.model import SyCoCa
from sycoca.packing import Packing
from tests.sycoca.micro import ATTENTIVE, RANDOM, batch, build, gradients, micro

LENGTHS = {
    "mixed": [3, 8, 0, 5, -1, 7, 2, 4],
    "one word": [1, 1, 1, 1],
    "nothing to say": [-1, -1, -1, -1],
    "no padding": [8, 8, 8, 8],
}


def _step(lengths: list[int], plan, **changes) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = build(micro(**changes)).double()
    losses = model(batch(lengths), plan)
    losses.total.backward()
    return [x.item() for x in losses], gradients(model)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("recompute", [{}, {"gradient_checkpointing": True}, {"selective_checkpointing": True}])
def test_losses_and_gradients_are_those_of_padded_captions(lengths, recompute, monkeypatch):
    losses, grads = _step(lengths, ATTENTIVE, **recompute)
    monkeypatch.setattr(Packing, "of", lambda keep: None)
    monkeypatch.setattr(fused_mlp, "fits", lambda x, weight: False)
    plain_losses, plain_grads = _step(lengths, ATTENTIVE)
    assert losses == pytest.approx(plain_losses, rel=1e-6)
    assert grads.keys() == plain_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad, plain_grads[name], rtol=1e-5, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_padding_is_not_worked_on():
    seen = []
    model: SyCoCa = build(micro())
    for blocks in (model.text.blocks, model.caption_decoder.blocks):
        for block in blocks:
            block.mlp.register_forward_hook(lambda module, args, y: seen.append(y.shape[:-1].numel()))
    model(batch([3, 8, 0, 5]), RANDOM)
    # [SOT], words, [EOT] and [CLS] for the encoder; a label for each word and [EOT] for the decoder.
    encoder, decoder = sum(n + 3 for n in (3, 8, 0, 5)), sum(n + 1 for n in (3, 8, 0, 5))
    assert seen == [encoder] * len(model.text.blocks) + [decoder] * len(model.caption_decoder.blocks)


def test_pack_and_unpack_are_inverse_and_differentiable():
    keep = torch.tensor([[True, True, False], [True, False, False], [True, True, True], [False, False, False]])
    packing = Packing(keep)
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    packed = packing.pack(x)
    assert packed.shape == (1, 6, 5)
    assert torch.equal(packing.unpack(packed), x * keep[:, :, None])
    assert torch.autograd.gradcheck(packing.pack, x)
    assert torch.autograd.gradcheck(packing.unpack, packed.detach().requires_grad_())


# One row, one past a block, a share of a block at the end, no row.
@pytest.mark.parametrize("rows", [1, fused_mlp.BLOCK_ROWS + 1, 2 * fused_mlp.BLOCK_ROWS + 77, 0])
def test_blocked_mlp_is_the_plain_one(rows):
    mlp = MLP(8, 2.5).double()
    for p in mlp.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    x = torch.randn(1, rows, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dy = torch.randn(1, rows, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y, plain = mlp(x), mlp.down(F.gelu(mlp.up(x)))
    torch.testing.assert_close(y, plain)
    inputs = [x, *mlp.parameters()]
    for got, expected in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(plain, inputs, dy), strict=True):
        torch.testing.assert_close(got, expected)


def test_blocked_mlp_keeps_one_hidden_array():
    mlp, held = MLP(16, 4.0), 0

    def pack(x: torch.Tensor) -> torch.Tensor:
        nonlocal held
        held += x.numel() if x.shape[-1] == 64 and x.shape[0] == 2048 else 0
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        mlp(torch.randn(2048, 16, requires_grad=True))
    assert held == 2048 * 64


def test_blocked_mlp_leaves_autocast_to_the_plain_one():
    mlp = MLP(16, 4.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert mlp(torch.randn(4, 16)).dtype == torch.bfloat16
