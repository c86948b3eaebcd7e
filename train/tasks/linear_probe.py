"""Logistic regression on frozen features, its regularisation chosen on a part of the training data.

min_W,b  mean_i CE(W z_i + b, y_i) + lambda / 2 ||W||^2          z standardised features
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_VAL_SHARE = 0.2
_ITERATIONS = 200


@dataclass(frozen=True)
class Probe:
    """A fitted classifier: weight (C, D) and bias (C,) on standardised features, and how it was chosen."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    strength: float
    tried: dict[str, float]

    def logits(self, features: Tensor) -> Tensor:
        """Logits (B, C) of features (B, D)."""
        return ((features - self.mean) / self.std) @ self.weight.T + self.bias


def fit_probe(features: Tensor, labels: Tensor, classes: int, *, seed: int = 0) -> Probe:
    """Fits with each strength on four fifths of the data, and with the best on all.

    Args:
        features: (N, D) fp32.
        labels: (N,) int64.
        classes: C.
        seed: of the split.

    Returns:
        The probe; of equally good strengths the greatest.
    """
    mean, std = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    z = (features - mean) / std
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed)).to(z.device)
    held = max(1, int(_VAL_SHARE * len(z)))
    val, train = order[:held], order[held:] if len(z) > 1 else order
    tried, best = {}, (-1.0, STRENGTHS[-1])
    start = None
    # From strong to weak: each solution is a good start for the next.
    for strength in reversed(STRENGTHS):
        start = _minimise(z[train], labels[train], classes, strength, start)
        accuracy = ((z[val] @ start[0].T + start[1]).argmax(1) == labels[val]).double().mean().item()
        tried[f"{strength:g}"] = accuracy
        best = max(best, (accuracy, strength))
    weight, bias = _minimise(z, labels, classes, best[1], start)
    return Probe(weight, bias, mean, std, best[1], tried)


def _minimise(z: Tensor, labels: Tensor, classes: int, strength: float, start) -> tuple[Tensor, Tensor]:
    if start is None:
        start = z.new_zeros(classes, z.shape[1]), z.new_zeros(classes)
    weight, bias = (part.clone().requires_grad_() for part in start)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_ITERATIONS, tolerance_grad=1e-6, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(z @ weight.T + bias, labels) + 0.5 * strength * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()
