"""Attention on a CPU straight from the projections, in blocks of samples: no head is copied out or in as a whole.

    P = softmax(q k^T / sqrt(d) + bias),  o = P v
    dv = P^T do,  dS = P (do v^T - <P, do v^T>) / sqrt(d),  dq = dS k,  dk = dS^T q

At the lengths that a CPU trains these products beat the fused kernel, whose backward is slow there. Gradients are
written where the projections want them, so that backward neither stacks nor transposes.
"""

import torch
from torch import Tensor

# Values of one operand in a block of samples: few enough for the cache, enough for the products.
_BLOCK_VALUES = 1 << 18


def fits(x: Tensor) -> bool:
    """Whether it may run: eager, on a CPU, in full precision."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def self_attention(qkv: Tensor, heads: int, causal: bool, valid: Tensor | None = None) -> Tensor:
    """Output (B, N, D) for qkv (B, N, 3 D), the parts one behind the other; `valid` as in `cross_attention`."""
    return _SelfAttention.apply(qkv, heads, causal, valid)


def cross_attention(q: Tensor, kv: Tensor, heads: int, valid: Tensor | None) -> Tensor:
    """Output (B, N, D) for q (B, N, D) and kv (B, M, 2 D); `valid` (B, M) bool, keys that may be seen."""
    return _CrossAttention.apply(q, kv, heads, valid)


def indexed_attention(q: Tensor, table: Tensor, index: Tensor, valid: Tensor, heads: int) -> Tensor:
    """Output (B, N, D) for q (B, N, D) that looks up rows of a table (R, 2 D): the keys and values of all samples.

    Args:
        q, table: of one dtype.
        index: (B, M) int64, rows of each sample; rows may be those of many.
        valid: (B, M) bool, which of them may be seen; one at least.
        heads: H.
    """
    return _IndexedAttention.apply(q, table, index, valid, heads)


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, heads: int, causal: bool, valid: Tensor | None) -> Tensor:
        q, k, v = _heads(qkv, 3, heads)
        N = q.shape[1]
        bias = q.new_full((N, N), -torch.inf).triu(1)[None] if causal else _key_bias(q, valid, heads)
        out, P = _attend(q, k, v, bias)
        ctx.save_for_backward(qkv, P)
        ctx.heads = heads
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor, None, None, None]:
        qkv, P = ctx.saved_tensors
        dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        _attend_backward(dout, P, *_heads(qkv, 3, ctx.heads), *_heads(dqkv, 3, ctx.heads))
        return dqkv, None, None, None


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, kv: Tensor, heads: int, valid: Tensor | None) -> Tensor:
        out, P = _attend(*_heads(q, 1, heads), *_heads(kv, 2, heads), _key_bias(q, valid, heads))
        ctx.save_for_backward(q, kv, P)
        ctx.heads = heads
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, kv, P = ctx.saved_tensors
        dq, dkv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, kv))
        (q,), (dq_heads,) = _heads(q, 1, ctx.heads), _heads(dq, 1, ctx.heads)
        _attend_backward(dout, P, q, *_heads(kv, 2, ctx.heads), dq_heads, *_heads(dkv, 2, ctx.heads))
        return dq, dkv, None, None


class _IndexedAttention(torch.autograd.Function):
    """Rows are fetched block by block, in both passes, so that no copy of them outlives its block."""

    @staticmethod
    def forward(ctx, q: Tensor, table: Tensor, index: Tensor, valid: Tensor, heads: int) -> Tensor:
        B, N, D = q.shape
        out, P = torch.empty_like(q), q.new_empty(B * heads, N, index.shape[1])
        bias = _key_bias(q, valid, heads)
        for samples in _blocks(q.view(B, N, heads, -1), index):
            rows = slice(samples.start * heads, samples.stop * heads)
            kv = table.index_select(0, index[samples].flatten()).view(-1, index.shape[1], 2 * D)
            out[samples], P[rows] = _attend(*_heads(q[samples], 1, heads), *_heads(kv, 2, heads), bias[rows])
        ctx.save_for_backward(q, table, index, P)
        ctx.heads = heads
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, table, index, P = ctx.saved_tensors
        heads, (B, N, D) = ctx.heads, q.shape
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dtable = torch.zeros_like(table)
        for samples in _blocks(q.view(B, N, heads, -1), index):
            places = index[samples].flatten()
            kv = table.index_select(0, places).view(-1, index.shape[1], 2 * D)
            dkv = torch.empty_like(kv)
            (here,), (dhere,) = _heads(q[samples], 1, heads), _heads(dq[samples], 1, heads)
            parts = P[samples.start * heads : samples.stop * heads]
            _attend_backward(dout[samples], parts, here, *_heads(kv, 2, heads), dhere, *_heads(dkv, 2, heads))
            dtable.index_add_(0, places, dkv.view(-1, 2 * D))
        return dq, dtable, None, None, None


def _key_bias(q: Tensor, valid: Tensor | None, heads: int) -> Tensor:
    """What is added to the logits, (1 or B H, 1, 1 or M)."""
    if valid is None:
        return q.new_zeros(1, 1, 1)
    return q.new_zeros(valid.shape).masked_fill(~valid, -torch.inf).repeat_interleave(heads, dim=0)[:, None]


def _heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    # (B, N, parts D) to parts views of (B, N, H, d)
    return x.view(*x.shape[:2], parts, heads, -1).unbind(2)


def _rows(x: Tensor) -> Tensor:
    # (b, N, H, d) to (b H, N, d)
    b, N, H, d = x.shape
    return x.transpose(1, 2).reshape(b * H, N, d)


def _blocks(q: Tensor, k: Tensor):
    B, N, H, d = q.shape
    step = max(1, _BLOCK_VALUES // max(1, max(N, k.shape[1]) * H * d))
    return (slice(start, min(start + step, B)) for start in range(0, B, step))


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, N, H d) and probabilities (B H, N, M)."""
    B, N, H, d = q.shape
    out, P = q.new_empty(B, N, H, d), q.new_empty(B * H, N, k.shape[1])
    for samples in _blocks(q, k):
        rows = slice(samples.start * H, samples.stop * H)
        here = bias if bias.shape[0] == 1 else bias[rows]
        logits = torch.baddbmm(here, _rows(q[samples]), _rows(k[samples]).mT, alpha=d**-0.5)
        torch.softmax(logits, -1, out=P[rows])
        out[samples] = torch.bmm(P[rows], _rows(v[samples])).view(-1, H, N, d).transpose(1, 2)
    return out.flatten(2), P


def _attend_backward(dout: Tensor, P: Tensor, q: Tensor, k: Tensor, v: Tensor, *gradients: Tensor) -> None:
    """Fills the gradients of q, k and v, each a view (B, N or M, H, d)."""
    B, N, H, d = q.shape
    dout = dout.view(B, N, H, d)
    for samples in _blocks(q, k):
        here, do = P[samples.start * H : samples.stop * H], _rows(dout[samples])
        dP = torch.bmm(do, _rows(v[samples]).mT)
        dS = torch._softmax_backward_data(dP, here, -1, dP.dtype).mul_(d**-0.5)
        found = torch.bmm(dS, _rows(k[samples])), torch.bmm(dS.mT, _rows(q[samples])), torch.bmm(here.mT, do)
        for gradient, rows in zip(gradients, found):
            gradient[samples] = rows.view(-1, H, rows.shape[1], d).transpose(1, 2)
