"""Two linear maps with GELU between, in blocks of rows whose hidden values stay in a CPU's cache.

    h = x U^T + b,  y = gelu(h) W^T + c
    dh = gelu'(h) (dy W),  dx = dh U,  dU = dh^T x,  dW = dy^T gelu(h)

Kept for backward: x and h; gelu(h) is formed again. Plain autograd keeps both and reads each from main memory.
"""

import torch
from torch import Tensor

# Rows of a block: its products are still as fast as those of all rows.
BLOCK_ROWS = 512


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `fused_mlp` may run: eager, on a CPU, without autocast, the weights whole (ZeRO 3 shards them)."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not hasattr(weight, "ds_id")
    )


def fused_mlp(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    """Output (..., D) for x (..., D), up (M, D), up_bias (M,), down (D, M), down_bias (D,), all of one dtype."""
    return _FusedMLP.apply(x.reshape(-1, x.shape[-1]), up, up_bias, down, down_bias).view(x.shape)


class _FusedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, U: Tensor, b: Tensor, W: Tensor, c: Tensor) -> Tensor:
        N, M = x.shape[0], U.shape[0]
        y = torch.empty_like(x)
        kept = any(ctx.needs_input_grad)
        h = x.new_empty(N if kept else min(N, BLOCK_ROWS), M)
        g = x.new_empty(min(N, BLOCK_ROWS), M)
        for rows in _blocks(N):
            count = rows.stop - rows.start
            hidden = torch.addmm(b, x[rows], U.T, out=h[rows] if kept else h[:count])
            active = torch.ops.aten.gelu.out(hidden, out=g[:count])
            torch.addmm(c, active, W.T, out=y[rows])
        ctx.save_for_backward(x, h, U, W)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, ...]:
        x, h, U, W = ctx.saved_tensors
        dy = dy.contiguous()
        N, M = h.shape
        dx, dU, dW = torch.empty_like(x), torch.zeros_like(U), torch.zeros_like(W)
        db = U.new_zeros(M)
        g, dh = (x.new_empty(min(N, BLOCK_ROWS), M) for _ in range(2))
        for rows in _blocks(N):
            hidden, part = h[rows], slice(0, rows.stop - rows.start)
            active = torch.ops.aten.gelu.out(hidden, out=g[part])
            dW.addmm_(dy[rows].T, active)
            dgelu = torch.mm(dy[rows], W, out=dh[part])
            dhidden = torch.ops.aten.gelu_backward.grad_input(dgelu, hidden, grad_input=g[part])
            dU.addmm_(dhidden.T, x[rows])
            db += dhidden.sum(0)
            torch.mm(dhidden, U, out=dx[rows])
        return dx, dU, db, dW, dy.sum(0)


def _blocks(N: int):
    # Even blocks: a short last one would run its products at a fraction of the rate.
    count = max(1, round(N / BLOCK_ROWS))
    step = min(BLOCK_ROWS, -(-N // count)) if N else 1
    return (slice(start, min(start + step, N)) for start in range(0, N, step))
