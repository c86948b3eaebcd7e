"""Packed rows and blocked MLPs against the plain forms: losses, gradients, and how many rows are worked on."""

import pytest
import torch
import torch.nn.functional as F

from sycoca import cpu_attention, fused_mlp
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
    monkeypatch.setattr(cpu_attention, "fits", lambda x: False)
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


def _attended(forms, inputs, dy):
    y = forms(*inputs)
    return [y, *torch.autograd.grad(y, inputs, dy)]


# One sample, and more than a block holds.
@pytest.mark.parametrize("B", [1, 7])
@pytest.mark.parametrize("form", ["self", "causal", "cross", "cross with padding"])
def test_blocked_attention_is_the_plain_one(B, form, monkeypatch):
    monkeypatch.setattr(cpu_attention, "_BLOCK_VALUES", 2 * 5 * 6)
    generator = torch.Generator().manual_seed(0)
    heads, N, D, M = 2, 5, 6, 4 if form.startswith("cross") else 5

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    def split(x, parts):
        return x.view(*x.shape[:2], parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    dy, valid = random(B, N, D).detach(), None
    if form.startswith("cross"):
        inputs = [random(B, N, D), random(B, M, 2 * D)]
        if "padding" in form:
            valid = torch.arange(M) < torch.randint(1, M + 1, (B, 1), generator=generator)

        def blocked(q, kv):
            return cpu_attention.cross_attention(q, kv, heads, valid)

        def plain(q, kv):
            keep = None if valid is None else valid[:, None, None]
            return F.scaled_dot_product_attention(*split(q, 1), *split(kv, 2), attn_mask=keep)
    else:
        inputs = [random(B, N, 3 * D)]

        def blocked(qkv):
            return cpu_attention.self_attention(qkv, heads, form == "causal")

        def plain(qkv):
            return F.scaled_dot_product_attention(*split(qkv, 3), is_causal=form == "causal")

    expected = _attended(lambda *x: plain(*x).transpose(1, 2).flatten(2), inputs, dy)
    for got, want in zip(_attended(blocked, inputs, dy), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_blocked_mlp_leaves_autocast_to_the_plain_one():
    mlp = MLP(16, 4.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert mlp(torch.randn(4, 16)).dtype == torch.bfloat16
