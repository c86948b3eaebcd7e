"""Muon (Jordan et al. 2024): matrices take orthogonalised steps, all other parameters those of AdamW.

    m <- mu m + (1 - mu) g,   u = (1 - mu) g + mu m                        Nesterov's form of momentum
    X <- u / |u|;  five times  A = X X^T,  X <- a X + (b A + c A A) X      singular values close to 1
    p <- (1 - lr wd) p - lr sqrt(max(1, rows / columns)) X

Gradients come as ZeRO leaves them, averaged, clipped and cut into flat pieces. The pieces of the momentum are gathered
for as long as the step is formed, 4 bytes per value of these matrices on every rank, and a rank orthogonalises the
matrices that its own piece touches (under ZeRO 3 it touches all), so that every stage takes the step of a single
process. What is kept is one value per parameter, cut as ZeRO cuts AdamW's moments.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Matrix(NamedTuple):
    """A parameter (rows, columns) that holds `parts` matrices of equally many rows, one above the other."""

    parts: int
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns


class Muon(torch.optim.Optimizer):
    """Muon for the parameter groups with the key `matrices`, another optimizer for the rest.

    Args:
        groups: parameter groups; `matrices` is a list of plain tuples, the fields of a `Matrix` for
            each of the group's parameters.
        rest: makes the optimizer of the groups without it.
        momentum: decay mu of the average of the gradients, in 0..1.
        sharded: whether each rank holds a piece of every parameter (ZeRO 3), not of all of them in a row.
    """

    def __init__(
        self,
        groups: list[dict],
        rest: Callable[[list[dict]], torch.optim.Optimizer],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        sharded: bool = False,
    ) -> None:
        for group in groups:
            group.setdefault("matrices", None)
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        others = [group for group in self.param_groups if group["matrices"] is None]
        self._rest = rest(others) if others else None
        self._sharded = sharded

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        others = []
        for group in self.param_groups:
            if group["matrices"] is None:
                others.append(group)
            else:
                self._step(group)
        if others:
            # The state of all parameters is saved and loaded as one.
            self._rest.param_groups, self._rest.state = others, self.state
            self._rest.step()
        return loss

    def _step(self, group: dict) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        moved = [self._moved(p, group["momentum"]) for p in params]
        matrices = [Matrix(*matrix) for matrix in group["matrices"]]
        if all(p.ndim == 2 for p in params):
            given = zip(group["params"], matrices, strict=True)
            steps = _orthogonal(moved, [matrix for p, matrix in given if p.grad is not None])
        else:
            steps = [self._piece(u, matrices) for u in moved]
        for p, u in zip(params, steps):
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(u, alpha=group["lr"])

    def _moved(self, p: Tensor, momentum: float) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
            # As AdamW counts, for what averages weights over the steps.
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        state["step"] += 1
        m = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(m, momentum)

    def _piece(self, u: Tensor, matrices: list[Matrix]) -> Tensor:
        """This rank's piece (n,) of the steps, of its piece of the moved momentum."""
        whole = not self._sharded and u.numel() >= sum(matrix.numel for matrix in matrices)
        world, rank = (1, 0) if whole or not dist.is_initialized() else (dist.get_world_size(), dist.get_rank())
        flat = u
        if world > 1:
            flat = u.new_empty(world * u.numel())
            dist.all_gather_into_tensor(flat, u.contiguous())
        return (_of_shards if self._sharded else _of_row)(flat.view(world, -1), rank, matrices)


def _of_row(rows: Tensor, rank: int, matrices: list[Matrix]) -> Tensor:
    """Piece `rank` of matrices that lie one behind the other in the pieces (world, n), padding at the end."""
    n, flat = rows.shape[1], rows.flatten()
    found, first, start = torch.zeros_like(rows[rank]), rank * n, 0
    touched = []
    for matrix in matrices:
        if start < first + n and start + matrix.numel > first:
            touched.append((start, matrix))
        start += matrix.numel
    given = [flat[start : start + matrix.numel].view(matrix.rows, matrix.columns) for start, matrix in touched]
    for (start, matrix), step in zip(touched, _orthogonal(given, [matrix for _, matrix in touched])):
        low, high = max(start, first), min(start + matrix.numel, first + n)
        found[low - first : high - first] = step.flatten()[low - start : high - start]
    return found


def _of_shards(rows: Tensor, rank: int, matrices: list[Matrix]) -> Tensor:
    """Piece `rank` of matrices each of which is cut into the pieces (world, n), each cut padded at its end."""
    world, found = len(rows), torch.zeros_like(rows[rank])
    places, given, start = [], [], 0
    for matrix in matrices:
        size = -(-matrix.numel // world)
        places.append(slice(start, start + size))
        flat = rows[:, places[-1]].flatten()[: matrix.numel]
        given.append(flat.view(matrix.rows, matrix.columns))
        start += size
    for place, step in zip(places, _orthogonal(given, matrices)):
        size = place.stop - place.start
        own = step.flatten()[rank * size : (rank + 1) * size]
        found[place.start : place.start + len(own)] = own
    return found


def _orthogonal(given: list[Tensor], matrices: list[Matrix]) -> list[Tensor]:
    """The orthogonalised steps of matrices, those of one shape at once."""
    alike: dict[tuple[int, int], list[int]] = {}
    for number, matrix in enumerate(matrices):
        alike.setdefault((matrix.rows // matrix.parts, matrix.columns), []).append(number)
    found: list[Tensor] = [None] * len(given)
    for shape, numbers in alike.items():
        stack = torch.cat([given[number].reshape(-1, *shape) for number in numbers])
        steps = orthogonalise(stack).mul_(max(1.0, shape[0] / shape[1]) ** 0.5)
        for number, step in zip(numbers, steps.split([matrices[number].parts for number in numbers])):
            found[number] = step.flatten(0, 1)
    return found


def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices (N, R, C) fp32 with their singular values moved into about 0.7..1.2; those of zeros stay zero.

    On CUDA the iteration runs in bf16, whose range it needs and whose precision it can do with.
    """
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    X = matrices.mT if tall else matrices
    X = X / X.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    X = X.to(torch.bfloat16 if X.is_cuda else X.dtype)
    for _ in range(_ITERATIONS):
        A = torch.bmm(X, X.mT)
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    X = X.mT if tall else X
    return X.to(matrices.dtype).contiguous()
