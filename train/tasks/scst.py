"""Self-critical sequence training (Rennie et al. 2017) on CIDEr-D.

    L = -mean_k (r(y_k) - r(y_greedy)) log p(y_k | x),   y_k ~ p(. | x)

Per image and draw, log p summed over the caption's tokens. The reward needs no gradient; CIDEr-D's document
frequencies are those of the captions of the first training images.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sycoca.generate import generate_tokens
from train.tasks.cider import CiderD
from train.tasks.likelihood import text_labels
from train.tasks.objectives import Group, Objective, per_rank
from train.tasks.outcome import rows_of
from train.tasks.ptb import ptb_words
from train.tasks.rows import ReferenceRows


class SelfCritical(Objective):
    """The loss above.

    Args:
        model: with the objective `ic`.
        tokenizer: the model's.
        scorer: rewards.
        samples: captions drawn for each image.
        temperature: of the draws.
    """

    names = ("loss", "reward", "greedy")

    def __init__(self, model: Any, tokenizer: Any, scorer: CiderD, *, samples: int, temperature: float) -> None:
        super().__init__(model)
        self._tokenizer, self._scorer = tokenizer, scorer
        self._samples, self._temperature = samples, temperature

    @torch.no_grad()
    def inputs(self, images: Tensor, rows: Tensor, ids: Tensor | None, seed: int) -> tuple:
        """Images, drawn captions (B * samples, T) and their rewards beside those of the greedy caption."""
        self.model.eval()
        features = self.model.encode_image(images)
        drawn = generate_tokens(
            self.model, features, num_return=self._samples, temperature=self._temperature, seed=seed
        )
        greedy = generate_tokens(self.model, features)
        self.model.train()
        references = [[ptb_words(said) for said in captions] for captions in ReferenceRows.decode(rows)]
        tokens = drawn.tokens.flatten(0, 1)
        rewards = self._rewards(tokens, [refs for refs in references for _ in range(self._samples)])
        baseline = self._rewards(greedy.tokens[:, 0], references)
        return images, tokens, (rewards.view(len(images), -1), baseline)

    def forward(self, images: Tensor, tokens: Tensor, rewards: Any, group: Group, shares: Sequence[int]) -> tuple:
        drawn, baseline = (part.to(images.device) for part in rewards)
        advantage = (drawn - baseline[:, None]).flatten()
        row = torch.arange(len(images), device=images.device).repeat_interleave(self._samples)
        features = rows_of(self.model.encode_image(images), row)
        text = self.model.config.text
        labels = text_labels(tokens, torch.ones_like(tokens[:, 0]), text.eot_id)
        logits = self.model.caption_logits(features, tokens)[:, :-1].float()
        scored = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[:, :, None]).squeeze(2)
        log_p = scored.masked_fill(labels < 0, 0.0).sum(1)
        count = per_rank(torch.tensor(len(row), device=images.device), group)
        return -(advantage * log_p).sum() / count, drawn.mean(), baseline.mean()

    def _rewards(self, tokens: Tensor, references: list) -> Tensor:
        words = [ptb_words(text) for text in self._tokenizer.decode(tokens)]
        return torch.tensor([self._scorer.score(said, refs) for said, refs in zip(words, references, strict=True)])


def training_frequencies(captions: Iterable[tuple[str, ...]]) -> CiderD:
    """CIDEr-D with the document frequencies of training captions, one tuple for each image."""
    return CiderD([ptb_words(said) for said in of_image] for of_image in captions)
