"""Blocks shared by every encoder and decoder: pre-norm attention and MLP.

    attend(q, k, v) = softmax(q k^T / sqrt(d) + bias) v
    x <- x + attention(LN(x));  x <- x + MLP(LN(x))

Each parameter is used only inside the forward of the module that owns it, as sharded training requires.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from sycoca import cpu_attention, fused_mlp
from sycoca.packing import Packing


class KeysValues(NamedTuple):
    """What attention looks up, each (B, H, M, d)."""

    keys: Tensor
    values: Tensor


class Past(Protocol):
    """Keys and values of the tokens that a causal block has seen."""

    def extend(self, new: KeysValues) -> KeysValues:
        """Appends those of further tokens; returns all. Several tokens at once only as the first."""


def _layer_norm() -> type[nn.Module]:
    try:
        # The compiled part is NVIDIA's alone; the package that PyPI calls apex is another one.
        import fused_layer_norm_cuda  # noqa: F401
        from apex.normalization import FusedLayerNorm
    except ImportError:
        return nn.LayerNorm
    return FusedLayerNorm if torch.cuda.is_available() else nn.LayerNorm


# NVIDIA apex's where importable; parameters and results are those of torch's.
LayerNorm = _layer_norm()


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, valid: Tensor | None = None) -> Tensor:
    """Softmax attention of q (B, H, N, d) over k and v (B, H, M, d).

    Args:
        q, k, v: queries, keys and values of one floating dtype.
        causal: query i sees the keys 0..i.
        valid: (B, M) bool, keys that may be seen; each row needs one. Not together with `causal`.

    Returns:
        (B, N, H * d).
    """
    B, H, N, d = q.shape
    if q.device.type == "cpu":
        out = _attend_products(q, k, v, causal, valid)
    else:
        keep = None if valid is None else valid[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, is_causal=causal)
    return out.transpose(1, 2).reshape(B, N, H * d)


def _attend_products(q: Tensor, k: Tensor, v: Tensor, causal: bool, valid: Tensor | None) -> Tensor:
    # At the lengths that a CPU trains, the fused kernel's backward is slower than these products.
    B, H, N, d = q.shape
    M = k.shape[2]
    q, k, v = (x.reshape(B * H, -1, d) for x in (q, k, v))
    bias = q.new_zeros(1, 1, 1)
    if causal:
        bias = q.new_full((N, M), -torch.inf).triu(1)[None]
    elif valid is not None:
        bias = q.new_zeros(B, M).masked_fill(~valid, -torch.inf).repeat_interleave(H, dim=0)[:, None]
    logits = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=d**-0.5)
    return torch.bmm(logits.softmax(-1), v).view(B, H, N, d)


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself; `causal` is a property of the encoder it stands in.

    Where it is not causal, `valid` (B, N) bool says which keys may be seen.
    """

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        past: Past | None = None,
        packing: Packing | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        return self._attended(x, self.causal, past, packing, valid)

    def causally(self, x: Tensor, past: Past | None = None, packing: Packing | None = None) -> Tensor:
        """As `forward`, but position i sees the positions 0..i in every encoder."""
        return self._attended(x, True, past, packing, None)

    def values(self, x: Tensor) -> Tensor:
        """Output of every position (B, N, D) as if it attended to itself alone."""
        return self.out(self.qkv(x).chunk(3, dim=-1)[2])

    def _attended(
        self, x: Tensor, causal: bool, past: Past | None, packing: Packing | None, valid: Tensor | None
    ) -> Tensor:
        qkv = self.qkv(x)
        if packing is not None:
            qkv = packing.unpack(qkv)
        if past is None and cpu_attention.fits(qkv):
            attended = cpu_attention.self_attention(qkv, self.heads, causal, valid)
        else:
            q, k, v = self._split(qkv)
            if past is not None:
                k, v = past.extend(KeysValues(k, v))
            # A single query is the last of its keys.
            attended = attend(q, k, v, causal=causal and q.shape[2] > 1, valid=valid)
        return self.out(attended if packing is None else packing.pack(attended))

    def _split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        B, N, width = qkv.shape
        return qkv.view(B, N, 3, self.heads, width // (3 * self.heads)).permute(2, 0, 3, 1, 4).unbind(0)


class CrossAttention(nn.Module):
    """Multi-head attention of a sequence (B, N, D) to a memory (B, M, D')."""

    def __init__(self, width: int, heads: int, memory_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(memory_width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | KeysValues,
        valid: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        q = self.q(x)
        if packing is not None:
            q = packing.unpack(q)
        if isinstance(memory, Tensor) and cpu_attention.fits(q):
            attended = cpu_attention.cross_attention(q, self.kv(memory), self.heads, valid)
        else:
            B, N, D = q.shape
            k, v = memory if isinstance(memory, KeysValues) else self.look_up(memory)
            attended = attend(q.view(B, N, self.heads, D // self.heads).transpose(1, 2), k, v, valid=valid)
        return self.out(attended if packing is None else packing.pack(attended))

    def look_up(self, memory: Tensor) -> KeysValues:
        """Keys and values of a memory, which `forward` takes in its place."""
        B, M, _ = memory.shape
        return KeysValues(*self.kv(memory).view(B, M, 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0))


class MLP(nn.Module):
    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, int(width * ratio))
        self.down = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        if fused_mlp.fits(x, self.up.weight):
            return fused_mlp.fused_mlp(x, self.up.weight, self.up.bias, self.down.weight, self.down.bias)
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Self-attention, then MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, causal: bool = False) -> None:
        super().__init__()
        self.ln_attn = LayerNorm(width)
        self.attn = SelfAttention(width, heads, causal)
        self.ln_mlp = LayerNorm(width)
        self.mlp = MLP(width, mlp_ratio)

    def forward(
        self,
        x: Tensor,
        past: Past | None = None,
        packing: Packing | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        x = x + self.attn(self.ln_attn(x), past, packing, valid)
        return x + self.mlp(self.ln_mlp(x))

    def causally(self, x: Tensor, past: Past | None = None, packing: Packing | None = None) -> Tensor:
        """As `forward`, but position i sees the positions 0..i in every encoder."""
        x = x + self.attn.causally(self.ln_attn(x), past, packing)
        return x + self.mlp(self.ln_mlp(x))


class CrossBlock(nn.Module):
    """Cross-attention to a memory, then MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, memory_width: int) -> None:
        super().__init__()
        self.ln_attn = LayerNorm(width)
        self.ln_memory = LayerNorm(memory_width)
        self.attn = CrossAttention(width, heads, memory_width)
        self.ln_mlp = LayerNorm(width)
        self.mlp = MLP(width, mlp_ratio)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | KeysValues,
        valid: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        if isinstance(memory, Tensor):
            memory = self.ln_memory(memory)
        x = x + self.attn(self.ln_attn(x), memory, valid, packing)
        return x + self.mlp(self.ln_mlp(x))

    def look_up(self, memory: Tensor) -> KeysValues:
        """Keys and values of a memory, which `forward` takes in its place."""
        return self.attn.look_up(self.ln_memory(memory))


class LogitScale(nn.Module):
    """Learnable positive scale, stored as its logarithm in shape (1,)."""

    def __init__(self, init: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), init).log())

    def forward(self) -> Tensor:
        return self.log_scale.float().exp()


def position_table(grid: tuple[int, ...], width: int) -> Tensor:
    """Initial positions (P, width) of a grid of patches, or of a row of words: sines and cosines of each coordinate.

    Wavelengths run from three steps to twice the longest side, so that every column tells places apart; fixed ones,
    made for long sequences, leave most columns of a small grid constant, and what lies where is learned late or never.
    """
    bands = -(-width // (2 * len(grid)))
    shortest, longest = 3.0, 2.0 * max(*grid, 2)
    rates = 2 * math.pi / shortest * (shortest / longest) ** (torch.arange(bands) / max(1, bands - 1))
    places = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * rates for axis in places]
    return torch.cat([wave(a) for a in angles for wave in (torch.sin, torch.cos)], dim=1)[:, :width]


def run_block(block: Callable[..., Tensor], *args: Tensor | Packing | None, recompute: str) -> Tensor:
    """Output of a block; `recompute` says what backward computes again, in the words of `ModelConfig.recompute`."""
    if recompute == "nothing" or not torch.is_grad_enabled():
        return block(*args)
    return checkpoint(block, *args, **recomputation(recompute))


def recomputation(recompute: str) -> dict:
    """Options of torch's checkpoint for what backward computes again."""
    contexts = {} if recompute == "blocks" else {"context_fn": _keeping_products}
    return {"use_reentrant": False, **contexts}


def _keeping_products():
    aten = torch.ops.aten
    return create_selective_checkpoint_contexts(
        [
            aten.mm.default,
            aten.addmm.default,
            aten.bmm.default,
            aten.baddbmm.default,
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
        ]
    )


def init_blocks(blocks: nn.Module, width: int, depth: int) -> None:
    """Initial weights of the blocks of one tower: CLIP's scheme, residual branches damped by the depth."""
    residual_std = (2 * depth * width) ** -0.5
    std = {"qkv": width**-0.5, "q": width**-0.5, "kv": width**-0.5, "up": (2 * width) ** -0.5}
    for name, module in blocks.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std.get(name.rsplit(".", 1)[-1], residual_std))
            nn.init.zeros_(module.bias)
