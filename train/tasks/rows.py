"""What the loader makes of a sample's text: rows of integers that an objective takes apart again.

Each has the method `encode(texts, context_length)` of a tokenizer, which is all that the loader knows.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from train.tasks.likelihood import prompted
from train.tasks.vqa_accuracy import accuracy_of_count, normalised

_HUMANS = 10
_MILLI = 1000


class LabelRows:
    """Labels in digits as (B, 1)."""

    def encode(self, texts: Sequence[str], context_length: int) -> Tensor:
        return torch.tensor([[int(text)] for text in texts], dtype=torch.int64)


class CaptionRows:
    """Captions of each image: (B, K, T) tokens. An image that has fewer than K says them again.

    Args:
        tokenizer: the model's.
        captions: K.
        prompt: what each begins with.
    """

    def __init__(self, tokenizer: Any, captions: int, prompt: str = "") -> None:
        self._tokenizer, self._captions, self._before = tokenizer, captions, f"{prompt} " if prompt else ""

    def encode(self, texts: Sequence[str], context_length: int) -> Tensor:
        said = [json.loads(text) for text in texts]
        chosen = [self._before + captions[i % len(captions)] for captions in said for i in range(self._captions)]
        return self._tokenizer.encode(chosen, context_length).view(len(said), self._captions, -1)


class ReferenceRows:
    """All captions of an image as UTF-8 (B, N), 0 behind the end; lossless, as CIDEr-D needs their words."""

    def encode(self, texts: Sequence[str], context_length: int) -> Tensor:
        coded = [text.encode("utf-8", "replace").replace(b"\0", b" ") for text in texts]
        rows = torch.zeros(len(coded), max(map(len, coded), default=0), dtype=torch.int64)
        for row, line in zip(rows, coded):
            row[: len(line)] = torch.tensor(list(line), dtype=torch.int64)
        return rows

    @staticmethod
    def decode(rows: Tensor) -> list[list[str]]:
        """The captions of each image."""
        lines = [bytes(filter(None, row)).decode("utf-8", "replace") for row in rows.tolist()]
        return [json.loads(line) for line in lines]


class AnswerRows:
    """Questions and soft answers for a classifier: (B, T + 20).

    T tokens of the question, up to ten places of known answers (-1: none), and their accuracies in thousandths.

    Args:
        tokenizer: the model's.
        names: the known answers.
    """

    def __init__(self, tokenizer: Any, names: Sequence[str]) -> None:
        self._tokenizer, self._places = tokenizer, {name: i for i, name in enumerate(names)}

    def encode(self, texts: Sequence[str], context_length: int) -> Tensor:
        asked = [json.loads(text) for text in texts]
        questions = self._tokenizer.encode([question for question, *_ in asked], context_length)
        places = torch.full((len(asked), _HUMANS), -1, dtype=torch.int64)
        worth = torch.zeros(len(asked), _HUMANS, dtype=torch.int64)
        for row, (_, answers, _) in enumerate(asked):
            given = [normalised(answer) for answer in answers]
            known = [answer for answer in dict.fromkeys(given) if answer in self._places][:_HUMANS]
            for column, answer in enumerate(known):
                places[row, column] = self._places[answer]
                worth[row, column] = round(_MILLI * accuracy_of_count(given.count(answer), len(given)))
        return torch.cat([questions, places, worth], dim=1)

    @staticmethod
    def decode(rows: Tensor, answers: int) -> tuple[Tensor, Tensor]:
        """Questions (B, T) int64 and targets (B, answers) fp32 that sum to one, or to zero without a known answer."""
        questions, places, worth = rows.split([rows.shape[1] - 2 * _HUMANS, _HUMANS, _HUMANS], dim=1)
        target = torch.zeros(len(rows), answers + 1, device=rows.device)
        target.scatter_add_(1, places.masked_fill(places < 0, answers), worth.float() / _MILLI)
        target = target[:, :answers]
        return questions, target / target.sum(1, keepdim=True).clamp(min=1e-6)


class WrittenRows:
    """Question and one human answer as one sequence, and where the answer begins: (B, T + 1).

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str], context_length: int) -> Tensor:
        asked = [json.loads(text) for text in texts]
        questions = [question for question, *_ in asked]
        said = [normalised(answers[pick % len(answers)]) or answers[0] for _, answers, pick in asked]
        tokens, starts = prompted(self._tokenizer, questions, said, context_length)
        return torch.cat([tokens, starts[:, None]], dim=1)
