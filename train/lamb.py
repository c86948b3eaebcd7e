"""LAMB (You et al. 2020, algorithm 2), whose steps are scaled tensor by tensor.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
    u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + wd p
    p <- p - lr |p| / |u| u        the factor is 1 where either norm is 0, and where wd is 0

The last rule is that of NVIDIA apex's FusedLAMB, whose trajectory this is.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


class Lamb(torch.optim.Optimizer):
    """LAMB in plain torch, many tensors at a time.

    Args:
        groups: parameters or parameter groups.
        lr: learning rate.
        betas: decay of both averages, each in 0..1.
        eps: added to the root, above 0.
        weight_decay: decoupled, of groups that set none.
    """

    def __init__(
        self, groups, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.0
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step(group, params)
        return loss

    def _step(self, group: dict, params: list[Tensor]) -> None:
        (first, second), wd = group["betas"], group["weight_decay"]
        for p in params:
            if not self.state[p]:
                self.state[p] = {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.state[p]["step"] += 1
        grads = [p.grad for p in params]
        m, v = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
        steps = [self.state[p]["step"] for p in params]
        torch._foreach_lerp_(m, grads, 1 - first)
        torch._foreach_mul_(v, second)
        torch._foreach_addcmul_(v, grads, grads, 1 - second)
        root = torch._foreach_sqrt(v)
        torch._foreach_div_(root, [(1 - second**t) ** 0.5 for t in steps])
        torch._foreach_add_(root, group["eps"])
        u = torch._foreach_div(m, [1 - first**t for t in steps])
        torch._foreach_div_(u, root)
        if wd:
            torch._foreach_add_(u, params, alpha=wd)
            norms = zip(torch._foreach_norm(params), torch._foreach_norm(u))
            # On the device: a number for the host would make it wait.
            torch._foreach_mul_(u, [torch.where((a > 0) & (b > 0), a / b, 1.0) for a, b in norms])
        torch._foreach_add_(params, u, alpha=-group["lr"])


def lamb_class(on_cuda: bool) -> Callable[..., torch.optim.Optimizer]:
    """NVIDIA apex's where importable on CUDA, else the plain one; DeepSpeed's bounds the factor, another trajectory."""
    if on_cuda:
        try:
            # amp_C is NVIDIA's compiled part; the package that PyPI calls apex is another one.
            import amp_C  # noqa: F401
            from apex.optimizers import FusedLAMB
        except ImportError:
            return Lamb
        # The run clips gradients itself.
        return partial(FusedLAMB, max_grad_norm=float("inf"))
    return Lamb
