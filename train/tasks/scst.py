"""Self-critical sequence training (Rennie et al. 2017) on CIDEr-D.

    L = -mean_k (r(y_k) - b_k) log p(y_k | x),   y_k ~ p(. | x),  k = 1..K

    b_k = r(y_greedy)                            greedy, the paper's
    b_k = sum_(j != k) r(y_j) / (K - 1)          others (Luo 2020)

Per image and draw, log p summed over the caption's tokens. The reward needs no gradient; CIDEr-D's document
frequencies are those of the captions of the first training images.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sycoca.generate import generate_tokens, opening
from train.data.sample import BadSample
from train.tasks.cider import CiderD
from train.tasks.likelihood import text_labels
from train.tasks.objectives import Group, Objective, per_rank
from train.tasks.ptb import ptb_words
from train.tasks.rows import ReferenceRows

_FREQUENCY_IMAGES = 2_000


class SelfCritical(Objective):
    """The loss above.

    Args:
        model: one that writes captions.
        tokenizer: the model's.
        scorer: rewards.
        samples: captions drawn for each image; `others` needs two.
        temperature: of the draws.
        baseline: what a draw is held against.
    """

    names = ("loss", "reward", "baseline")

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        scorer: CiderD,
        *,
        samples: int,
        temperature: float,
        baseline: Literal["greedy", "others"],
    ) -> None:
        super().__init__(model)
        self._tokenizer, self._scorer = tokenizer, scorer
        self._samples, self._temperature, self._baseline = samples, temperature, baseline
        self._opening = opening(model, tokenizer)

    @torch.no_grad()
    def inputs(self, images: Tensor, rows: Tensor, ids: Tensor | None, seed: int) -> tuple:
        """Images, drawn captions (B * K, T), and their rewards (B, K) beside the baselines (B, K) or (B, 1)."""
        self.model.eval()
        features = self.model.encode_image(images)
        prompt = [self._opening] * len(images)
        draws = {"num_return": self._samples, "temperature": self._temperature, "seed": seed}
        drawn = generate_tokens(self.model, features, prompt=prompt, **draws)
        greedy = generate_tokens(self.model, features, prompt=prompt) if self._baseline == "greedy" else None
        self.model.train()
        references = [[ptb_words(said) for said in captions] for captions in ReferenceRows.decode(rows)]
        scores = [self._scorer.against(refs) for refs in references]
        rewards = self._rewards(drawn.tokens, scores)
        if greedy is not None:
            baseline = self._rewards(greedy.tokens, scores)
        else:
            baseline = (rewards.sum(1, keepdim=True) - rewards) / (self._samples - 1)
        return images, drawn.tokens.flatten(0, 1), (rewards, baseline)

    def forward(self, images: Tensor, tokens: Tensor, rewards: Any, group: Group, shares: Sequence[int]) -> tuple:
        drawn, baseline = (part.to(images.device) for part in rewards)
        advantage = (drawn - baseline).flatten()
        text = self.model.config.text
        labels = text_labels(tokens, torch.full_like(tokens[:, 0], 1 + len(self._opening)), text.eot_id)
        logits = self.model.caption_logits(self.model.encode_image(images), tokens)[:, :-1].float()
        scored = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[:, :, None]).squeeze(2)
        log_p = scored.masked_fill(labels < 0, 0.0).sum(1)
        count = per_rank(torch.tensor(len(tokens), device=images.device), group)
        return -(advantage * log_p).sum() / count, drawn.mean(), baseline.mean()

    def _rewards(self, tokens: Tensor, scores: list) -> Tensor:
        """Rewards (B, R) of captions (B, R, T)."""
        texts = iter(self._tokenizer.decode(tokens[:, :, 1 + len(self._opening) :].flatten(0, 1)))
        return torch.tensor([[score(ptb_words(next(texts))) for _ in range(tokens.shape[1])] for score in scores])


def training_frequencies(source: Any) -> CiderD:
    """CIDEr-D with the document frequencies of the captions of a source's first images."""
    return CiderD([ptb_words(said) for said in said_of] for said_of in _captions(source))


def _captions(source: Any) -> Iterator[tuple[str, ...]]:
    for index in range(min(len(source), _FREQUENCY_IMAGES)):
        try:
            yield source.captions(index)
        except BadSample:
            # Counted when training meets it.
            continue
