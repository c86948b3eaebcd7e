"""One token of each of N captions through causal and cross-attending blocks on a CPU.

    x <- x + out(attend(qkv(LN x), past));  x <- x + down(gelu(up(LN x)))        x (N, D), in place

What `Block`, `CrossBlock` and `FusionBlock` compute, in the few calls that a single token needs: so little is
multiplied in a step that modules, views and copies would take most of its time. Weights are those of the blocks, not
copies.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sycoca import cpu_attention, fused_mlp
from sycoca.fusion import FusionBlock
from sycoca.layers import Block, CrossAttention, CrossBlock, KeysValues, SelfAttention


class Growth(NamedTuple):
    """Where a layer's token goes, (N, H, 1, d) each, and keys and values (N, H, M, d) up to and with it."""

    new_keys: Tensor
    new_values: Tensor
    keys: Tensor
    values: Tensor


def fits(block: Block | CrossBlock | FusionBlock) -> bool:
    """Whether steps of this block may run: eager, on a CPU, in full precision, with whole weights."""
    weight = block.mlp.up.weight
    return cpu_attention.fits(weight) and fused_mlp.fits(weight, weight) and type(block.ln_mlp) is nn.LayerNorm


def lay_out(model: nn.Module) -> None:
    """Lays the weights that decoding reads out for a CPU; shapes, values and what is saved stay the same.

    A product of few rows reads a weight (D', D) of more rows than columns up to twice as fast if its columns are
    contiguous. Not for a model that is trained: collectives want contiguous rows.

    Args:
        model: one that writes, on a CPU.
    """
    told, words = model.caption_decoder, model.text.sequence.tokens
    if told is None:
        told = model.fusion
    else:
        words = told.head
    blocks = (*model.text.blocks, *told.blocks)
    weights = [m.weight for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]
    for weight in (*weights, words.weight):
        if weight.shape[0] > weight.shape[1]:
            weight.data = weight.data.t().contiguous().t()


class SelfStep:
    """A causal block."""

    def __init__(self, block: Block) -> None:
        self._attend, self._mlp = _SelfAttend(block.ln_attn, block.attn), _MLPStep(block)

    def __call__(self, x: Tensor, growth: Growth, keep: Tensor | None = None) -> None:
        """Makes of x (N, D) the output; `keep` (N, 1, 1, M) bool, keys that are seen, or None for all."""
        self._attend(x, growth, keep)
        self._mlp(x)


class CrossStep:
    """A block that attends to a memory of B images, by `CrossBlock.look_up`."""

    def __init__(self, block: CrossBlock, memory: KeysValues) -> None:
        self._attend, self._mlp = _CrossAttend(block.ln_attn, block.attn, memory), _MLPStep(block)

    def __call__(self, x: Tensor) -> None:
        """Makes of x (N, D) the output, N / B neighbouring rows to each image."""
        self._attend(x)
        self._mlp(x)


class FusionStep:
    """A block of the fusion encoder over a memory of B images, each (B, H, S, d)."""

    def __init__(self, block: FusionBlock, memory: KeysValues) -> None:
        self._attend = _SelfAttend(block.ln_attn, block.attn)
        self._look = _CrossAttend(block.ln_cross, block.cross, memory)
        self._mlp = _MLPStep(block)

    def __call__(self, x: Tensor, growth: Growth) -> None:
        """Makes of x (N, D) the output, N / B neighbouring rows to each image."""
        self._attend(x, growth, None)
        self._look(x)
        self._mlp(x)


class _SelfAttend:
    """x <- x + out(attend(qkv(LN x), past))."""

    def __init__(self, norm: nn.LayerNorm, attn: SelfAttention) -> None:
        self._heads, self._norm = attn.heads, _norm(norm)
        self._qkv, self._out = _map(attn.qkv), _map(attn.out)

    def __call__(self, x: Tensor, growth: Growth, keep: Tensor | None) -> None:
        N, D = x.shape
        qkv = _linear(self._qkv, torch.layer_norm(x, *self._norm))
        q, k, v = qkv.view(N, 3, self._heads, 1, -1).unbind(1)
        growth.new_keys.copy_(k)
        growth.new_values.copy_(v)
        attended = F.scaled_dot_product_attention(q, growth.keys, growth.values, attn_mask=keep)
        _add_linear(x, self._out, attended.reshape(N, D))


class _CrossAttend:
    """x <- x + out(attend(q(LN x), memory))."""

    def __init__(self, norm: nn.LayerNorm, attn: CrossAttention, memory: KeysValues) -> None:
        self._heads, self._memory = attn.heads, memory
        self._norm, self._q, self._out = _norm(norm), _map(attn.q), _map(attn.out)

    def __call__(self, x: Tensor) -> None:
        N, D = x.shape
        q = _linear(self._q, torch.layer_norm(x, *self._norm))
        q = q.view(len(self._memory.keys), -1, self._heads, D // self._heads).transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, *self._memory)
        _add_linear(x, self._out, attended.transpose(1, 2).reshape(N, D))


class _MLPStep:
    """x <- x + down(gelu(u)),  u = up(LN(x)),  gelu(u) = (u + u erf(u / sqrt 2)) / 2."""

    def __init__(self, block: Block | CrossBlock | FusionBlock) -> None:
        self._norm, self._up, self._down = _norm(block.ln_mlp), _map(block.mlp.up), _map(block.mlp.down)

    def __call__(self, x: Tensor) -> None:
        u = _linear(self._up, torch.layer_norm(x, *self._norm))
        # The operator for GELU is prepared by oneDNN on every call, which takes longer than these.
        erf = u.mul(0.5**0.5).erf_()
        _add_linear(x, self._down, u.addcmul(u, erf), factor=0.5)


def _norm(norm: nn.LayerNorm) -> tuple[tuple[int, ...], Tensor, Tensor, float]:
    return norm.normalized_shape, norm.weight, norm.bias, norm.eps


def _map(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Bias (1, D') and transposed weight (D, D')."""
    return linear.bias[None], linear.weight.t()


def _linear(of: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    return torch.addmm(of[0], x, of[1])


def _add_linear(x: Tensor, of: tuple[Tensor, Tensor], y: Tensor, factor: float = 1.0) -> None:
    x.add_(of[0]).addmm_(y, of[1], alpha=factor)
