"""NLVR2: whether a sentence is true of two images.

logits = W2 GELU(LN(W1 [z_left; z_right]))        z the fusion encoder's [CLS] of the sentence with one image each
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sycoca.images import normalise
from sycoca.locate import whole_image
from train.data.ahead import Fault, Loader, Maker, Tickets
from train.data.order import STAND_IN, mix
from train.data.sample import BadSample, DataError, Skipped
from train.tasks.heads import Head, StatementHead
from train.tasks.outcome import Example, Outcome, by_kind, require_any, share

_ATTEMPTS = 100


class Stated(NamedTuple):
    """A rank's share of a global batch of statements.

    `images` (2 B, 3, S, S) fp32, left and right in turn; `tokens` (B, T), `labels` (B,) int64.
    """

    images: Tensor
    tokens: Tensor
    labels: Tensor
    keys: tuple[str, ...]
    epoch: int
    index: int


class _Statements(Maker):
    """Makes batches of statements."""

    def __init__(self, source: Any, tokenizer: Any, seed: int, size: int, length: int, share: tuple[int, ...]) -> None:
        super().__init__(source, seed)
        self.tokenizer, self.size, self.length = tokenizer, size, length
        self.batch, self.first, self.local = share

    def make(self, epoch: int, index: int, faults: list[Fault]) -> Stated:
        positions = index * self.batch + self.first + np.arange(self.local)
        pictures, stated = [], []
        for position, number in zip(positions.tolist(), self.source.order(epoch, positions, self.seed).tolist()):
            for attempt in range(_ATTEMPTS):
                at = number + epoch * len(self.source) if self.source.fresh else number
                try:
                    pictures += [whole_image(image, self.size) for image in self.source.images(at)]
                    break
                except BadSample as bad:
                    faults.append((bad.key, bad.cause, number))
                    number = self.source.stand_in(number, mix(self.seed, epoch, position, STAND_IN, attempt), attempt)
            else:
                raise DataError(f"data source '{self.source.name}': {_ATTEMPTS} pairs of images in a row were bad")
            stated.append(self.source.statement(at))
        return Stated(
            normalise(torch.from_numpy(np.stack(pictures))),
            self.tokenizer.encode([statement.sentence for statement in stated], self.length),
            torch.tensor([int(statement.label) for statement in stated]),
            tuple(statement.key for statement in stated),
            epoch,
            index,
        )


def statement_batches(
    source: Any,
    tokenizer: Any,
    *,
    global_batch: int,
    image_size: int,
    context_length: int,
    seed: int,
    rank: int,
    world: int,
    first: int,
    workers: int,
) -> Loader:
    """This rank's batches of statements, from the global batch number `first` on; arguments as `train.data.batches`."""
    per_epoch, local = len(source) // global_batch, global_batch // world
    if not per_epoch:
        raise DataError(f"data source '{source.name}': {len(source)} statements do not fill a batch of {global_batch}")
    maker = _Statements(source, tokenizer, seed, image_size, context_length, (global_batch, rank * local, local))
    return Loader(maker, Tickets(*divmod(first, per_epoch), per_epoch, None), workers, None)


def statement_logits(model: Any, head: StatementHead, images: Tensor, tokens: Tensor) -> Tensor:
    """Logits (B, 2) of "false" and "true".

    Args:
        model: with a fusion encoder.
        head: on top of it.
        images: (2 B, 3, S, S) fp32, left and right in turn.
        tokens: (B, T) int64 of the sentences.
    """
    views, text = model.view_images(model.encode_image(images)), model.encode_text(tokens)
    twice = torch.arange(len(tokens), device=tokens.device).repeat_interleave(2)
    states = model.fused(text._make(field[twice] for field in text), views)
    return head(states.view(len(tokens), -1)).float()


@torch.no_grad()
def evaluate(
    model: Any, tokenizer: Any, source: Any, head: Head, *, options: Any, device: Any, skipped: Skipped
) -> Outcome:
    """Judges statements about two images.

    Args:
        model: in evaluation mode, with a fusion encoder.
        tokenizer: the model's.
        source: a `StatementSource`.
        head: of the fine-tuning.
        options: `TaskOptions`.
        device: of the model.
        skipped: account of what could not be used.

    Returns:
        Accuracy, beside the share of the commoner label; the examples are scored by the log-odds of the right label.

    Raises:
        ValueError: no statement can be used.
    """
    size, length = model.config.vision.image_size, model.config.text.context_length
    kinds, labels, right, examples = [], [], [], []
    waiting: list[tuple[int, Any]] = []
    pictures: list[np.ndarray] = []

    def judge() -> None:
        images = normalise(torch.from_numpy(np.stack(pictures)).to(device))
        tokens = tokenizer.encode([statement.sentence for _, statement in waiting], length).to(device)
        odds = statement_logits(model, head.module, images, tokens).diff(dim=1).squeeze(1).tolist()
        for (index, statement), value in zip(waiting, odds):
            kinds.append(statement.kind)
            labels.append(statement.label)
            right.append(float((value > 0) == statement.label))
            lines = (("sentence", statement.sentence), ("is", str(statement.label)), ("log-odds", f"{value:.2f}"))
            examples.append(Example(value if statement.label else -value, index, statement.key, lines))
        waiting.clear()
        pictures.clear()

    for index in range(len(source) if options.limit is None else min(options.limit, len(source))):
        statement = source.statement(index)
        try:
            seen = [whole_image(image, size) for image in source.images(index)]
        except BadSample as bad:
            skipped.sample(bad.key, bad.cause)
            continue
        pictures += seen
        waiting.append((index, statement))
        if len(waiting) == options.batch_size:
            judge()
    if waiting:
        judge()
    require_any(len(right), "nlvr", source, skipped)
    true = share([float(label) for label in labels])
    headline = {"accuracy": share(right), "commoner label": max(true, 1 - true)}
    rows = by_kind(kinds, right)
    figures = headline | {"statements": len(right), "by_kind": {kind: value for kind, _, value in rows}}
    return Outcome("nlvr", figures, headline, {"by kind": (("kind", "statements", "accuracy"), rows)}, examples)
