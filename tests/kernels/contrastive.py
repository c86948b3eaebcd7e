"""Feature regimes and the error rule of the contrastive losses."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Of the size where a gradient is too small for a relative error to mean anything.
SMALL_NORM = 1e-6
BARS = {
    (torch.float32, 14.3): 1e-6,
    (torch.float32, 100.0): 1e-5,
    (torch.bfloat16, 14.3): 1e-4,
    (torch.bfloat16, 100.0): 2e-3,
}


def correlated(B: int, D: int, positive: float, negative: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit features (B, D) whose pairs have mean cosine `positive`, and non-pairs `negative`."""
    generator = torch.Generator().manual_seed(seed)

    def noise(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, D, generator=generator), dim=1)

    cone, pair, sign = noise(1), noise(B), -1.0 if negative < 0 else 1.0
    own = positive - negative
    rest = (1 - abs(negative) - own) ** 0.5
    common, own = abs(negative) ** 0.5, own**0.5
    image = common * cone + own * pair + rest * noise(B)
    text = sign * common * cone + own * pair + rest * noise(B)
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


REGIMES: dict[str, Callable[[int, int], tuple[Tensor, Tensor]]] = {
    "random": lambda B, D: correlated(B, D, 0.0, 0.0),
    "clip-like": lambda B, D: correlated(B, D, 0.38, 0.07),
    "converged": lambda B, D: correlated(B, D, 0.94, 0.05),
    "anti-correlated": lambda B, D: correlated(B, D, -0.1, -0.1),
}


def _one_huge_norm(B: int, D: int) -> tuple[Tensor, Tensor]:
    image, text = correlated(B, D, 0.3, 0.0)
    image[B // 3] *= 300.0
    return image, text


def _zero_rows(B: int, D: int) -> tuple[Tensor, Tensor]:
    image, text = correlated(B, D, 0.3, 0.0)
    image[::3], text[1::4] = 0.0, 0.0
    return image, text


def _opposed(B: int, D: int) -> tuple[Tensor, Tensor]:
    image, _ = correlated(B, D, 0.3, 0.0)
    return image, -image


ADVERSARIAL: dict[str, Callable[[int, int], tuple[Tensor, Tensor]]] = {
    "negative cone": lambda B, D: correlated(B, D, -0.7, -0.7),
    "all rows equal": lambda B, D: tuple(x[:1].repeat(B, 1) for x in correlated(B, D, 0.3, 0.0)),
    "zero rows": _zero_rows,
    "all zero": lambda B, D: (torch.zeros(B, D), torch.zeros(B, D)),
    "one huge norm": _one_huge_norm,
    "text = -image": _opposed,
}


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Value and gradients with respect to all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def error(got: Tensor, truth: Tensor) -> float:
    """Norm of the difference, relative where the truth is not tiny."""
    norm = truth.norm().item()
    difference = (got.double() - truth.double()).norm().item()
    return difference / norm if norm > SMALL_NORM else difference


def within(got: Sequence[float], plain: Sequence[float], bar: float) -> bool:
    """Whether errors of (loss, image, text, ...) are at most the larger of the plain loss's and the bar.

    Image and text are alike: the larger of the plain loss's two errors is the budget of both.
    """
    towers = max(plain[1:3])
    budget = [plain[0], towers, towers, *plain[3:]]
    return all(mine <= max(theirs, bar) for mine, theirs in zip(got, budget, strict=True))


def errors(got: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    return [error(a, b) for a, b in zip(got, truth, strict=True)]
