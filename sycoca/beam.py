"""Beam search over captions.

    s(y) = sum_t log p'(y_t | y_<t)                     p' constrained, the tokens of a prompt left out
    r(y) = s(y) / n^length_penalty                      n the tokens behind the prompt, [EOT] included

Each image has K living captions. A step takes the 2K best continuations by s; those among the first K that end leave
for a list of the K best by r, and the first K that do not end live on. The search of an image is over once K captions
have ended and no living one ranks above the last of them; where the length runs out, living ones are ranked as they
stand. With K = 1 this is greedy decoding; with K as large as the number of continuations it misses nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sycoca.cache import Session
from sycoca.sampling import Constraints


class Beams(NamedTuple):
    """Captions with their scores.

    Attributes:
        tokens: (B, K, L) int64.
        searched: (B, K) fp32, s; -inf where there is no caption.
        scores: (B, K) fp32, the same under the model, unconstrained.
        ranks: (B, K) fp32, r.
    """

    tokens: Tensor
    searched: Tensor
    scores: Tensor
    ranks: Tensor

    def take(self, index: Tensor) -> "Beams":
        """The captions `index` (B, M) int64 of each image."""
        tokens = self.tokens.gather(1, index[:, :, None].expand(-1, -1, self.tokens.shape[2]))
        return Beams(tokens, *(part.gather(1, index) for part in self[1:]))

    def best(self, count: int) -> "Beams":
        """The `count` captions of each image that rank highest, best first."""
        return self.take(self.ranks.topk(count, dim=1).indices)

    def join(self, other: "Beams") -> "Beams":
        """Both lists, one behind the other."""
        return Beams(*(torch.cat(pair, dim=1) for pair in zip(self, other)))


def beam_search(
    session: Session,
    prompts: Tensor,
    prompt_lengths: Tensor,
    *,
    num_beams: int,
    max_length: int,
    length_penalty: float,
    constraints: Constraints,
    pad_id: int,
) -> Beams:
    """The captions that rank highest.

    Args:
        session: fresh, of B images.
        prompts: (B, n) int64, tokens before the caption, [SOT] first.
        prompt_lengths: (B,) int64 in 1..n, how many of them count.
        num_beams: K.
        max_length: L, most tokens of a caption, prompt and end included, above every prompt's.
        length_penalty: exponent of the length; above 0 it favours long captions, below 0 short ones.
        constraints: on the tokens behind the prompt.
        pad_id: the token behind the end.

    Returns:
        K captions per image, best first, -inf where there are fewer.
    """
    B, K, device = len(prompts), num_beams, prompts.device
    first = int(prompt_lengths.min())
    tokens = torch.full((B, K, max_length), pad_id, dtype=torch.int64, device=device)
    tokens[:, :, :first] = prompts[:, None, :first]
    none = torch.full((B, K), -torch.inf, device=device)
    # The captions of an image begin alike: only one may speak, or the search would find each K times.
    alone = none.clone()
    alone[:, 0] = 0.0
    living, ended = Beams(tokens, alone, alone, alone), Beams(tokens, none, none, none)
    over = torch.zeros(B, dtype=torch.bool, device=device)
    own = torch.arange(K, device=device).expand(B, K)
    first_row = torch.arange(B, device=device)[:, None] * K

    logits = session.advance(prompts[:, :first]).repeat_interleave(K, dim=0)
    session.select(first_row.div(K, rounding_mode="floor").expand(B, K).flatten())
    for t in range(first, max_length):
        count = (t + 1 - prompt_lengths).clamp(min=1)[:, None]
        forced = (t < prompt_lengths)[:, None]
        grown, parents = _continuations(living, logits, t, constraints)
        grown = grown._replace(ranks=grown.searched / count**length_penalty)
        ends = grown.tokens[:, :, t] == constraints.eot_id

        leaves = ends & (torch.arange(ends.shape[1], device=device) < K) & ~forced & ~over[:, None]
        ended = ended.join(grown._replace(ranks=grown.ranks.masked_fill(~leaves, -torch.inf))).best(K)
        # At most one continuation of a caption ends it, so K of the 2K do not; stable: in their order.
        onward = ends.int().sort(dim=1, stable=True).indices[:, :K]
        grown, parents = grown.take(onward), parents.gather(1, onward)
        if t < prompts.shape[1]:
            grown, parents = _prompted(forced, grown, living, prompts[:, t], t), torch.where(forced, own, parents)
        living = grown

        last, best = ended.ranks[:, -1], living.ranks[:, 0]
        over = over | (~forced[:, 0] & (best <= last))
        if t + 1 == max_length or bool(over.all()):
            break
        session.select((first_row + parents).flatten())
        logits = session.advance(living.tokens[:, :, t].reshape(-1, 1))

    full = living._replace(ranks=living.ranks.masked_fill(over[:, None], -torch.inf))
    found = ended.join(full).best(K)
    return found._replace(tokens=found.tokens.masked_fill(found.ranks.isneginf()[:, :, None], pad_id))


def _continuations(living: Beams, logits: Tensor, t: int, constraints: Constraints) -> tuple[Beams, Tensor]:
    """The 2K best continuations by s, best first, and which caption (B, 2K) each continues."""
    B, K, _ = living.tokens.shape
    V = logits.shape[1]
    log_probs = logits.log_softmax(dim=1)
    allowed = constraints.apply(log_probs, living.tokens[:, :, :t].flatten(0, 1))
    searched, index = (living.searched[:, :, None] + allowed.view(B, K, V)).flatten(1).topk(2 * K, dim=1)
    parents = index.div(V, rounding_mode="floor")
    grown = living.take(parents)
    grown.tokens[:, :, t] = index - parents * V
    scores = grown.scores + log_probs.view(B, K * V).gather(1, index)
    return grown._replace(searched=searched, scores=scores), parents


def _prompted(forced: Tensor, grown: Beams, living: Beams, given: Tensor, t: int) -> Beams:
    """Captions still inside their prompt, `forced` (B, 1), with its token (B,) instead of a chosen one."""
    tokens = living.tokens.clone()
    tokens[:, :, t] = given[:, None]
    kept = living._replace(tokens=tokens)
    return Beams(
        torch.where(forced[:, :, None], kept.tokens, grown.tokens),
        *(torch.where(forced, old, new) for old, new in zip(kept[1:], grown[1:])),
    )
