"""Which token may come next, and a draw among them.

    penalised   theta log p(v) for tokens v that the caption holds already
    forbidden   [SOT]; [EOT] before the least length; what would complete an n-gram for the second time
    drawn       by inverse distribution: the first v with  sum_(w <= v) p(w) > u sum_w p(w),  u uniform in [0, 1)

The repetition penalty is CTRL's (arXiv 1909.05858), taken on log-probabilities, which unlike logits have no free
offset. Nucleus: arXiv 1904.09751. Forbidding does not renormalise: a caption's score stays that of the model.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Constraints:
    """What a caption may not say.

    Attributes:
        sot_id, eot_id: tokens of start and end.
        min_length: least tokens of a caption, start and end included.
        repetition_penalty: theta, above 0; 1 is none.
        no_repeat_ngram: n of the n-grams that may occur once; 0 forbids none.
    """

    sot_id: int
    eot_id: int
    min_length: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0

    @property
    def penalises(self) -> bool:
        """Whether the log-probability of a token that may be said can change."""
        return self.repetition_penalty != 1.0

    def apply(self, log_probs: Tensor, written: Tensor) -> Tensor:
        """Log-probabilities (N, V) fp32 of the token behind `written` (N, t) int64, constrained; -inf is forbidden.

        Where nothing would be left, the caption may end.
        """
        never = (self.sot_id, self.eot_id) if written.shape[1] + 1 < self.min_length else (self.sot_id,)
        out = log_probs.index_fill(1, _ids(never, log_probs.device), -torch.inf)
        if self.penalises:
            penalised = self.repetition_penalty * out.gather(1, written)
            out.scatter_(1, written, penalised)
        if 0 < self.no_repeat_ngram <= written.shape[1]:
            self._forbid_repeated(out, written)
            stuck = out.amax(1).isneginf()
            out[:, self.eot_id] = torch.where(stuck, log_probs[:, self.eot_id], out[:, self.eot_id])
        return out

    def _forbid_repeated(self, out: Tensor, written: Tensor) -> None:
        n = self.no_repeat_ngram
        grams = written.unfold(1, n, 1)
        # What the last n - 1 tokens begin; for n = 1 everything written.
        begun = (grams[:, :, :-1] == written[:, None, written.shape[1] - n + 1 :]).all(-1)
        bound = torch.where(begun, -torch.inf, torch.inf)
        out.scatter_reduce_(1, grams[:, :, -1], bound, "amin")


@functools.cache
def _ids(ids: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(ids, device=device)


def draw(log_probs: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """One token per row.

    Args:
        log_probs: (N, V) fp32, not necessarily normalised, at least one finite per row.
        uniform: (N,) fp32 in [0, 1).
        temperature: above 0; divides the log-probabilities first.
        top_k: only so many of the likeliest.
        top_p: then only the likeliest whose probabilities reach this sum, at least one.

    Returns:
        (N,) int64.
    """
    # Against the largest, so that no temperature is too small.
    scaled, ids = (log_probs - log_probs.amax(1, keepdim=True)) / temperature, None
    if top_k is not None:
        scaled, ids = scaled.topk(min(top_k, scaled.shape[1]))
    elif top_p is not None:
        scaled, ids = scaled.sort(dim=1, descending=True)
    p = scaled.softmax(1)
    if top_p is not None:
        p = p.masked_fill(p.cumsum(1) - p >= top_p, 0.0)
    heaped = p.cumsum(1)
    whole = heaped[:, -1:]
    # Rounded up, u times the whole would be the whole, and no token would hold it.
    below = whole.nextafter(torch.zeros_like(whole))
    chosen = (heaped > torch.minimum(uniform[:, None] * whole, below)).int().argmax(1, keepdim=True)
    return (chosen if ids is None else ids.gather(1, chosen)).squeeze(1)
