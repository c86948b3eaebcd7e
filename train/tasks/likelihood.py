"""How likely a captioner finds a text behind a prompt.

log p(y | x, prompt) = sum_t log p(y_t | y_<t, prompt, x), the end of the text included
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.tasks.outcome import rows_of

_LOGITS_BYTES = 128 << 20


class Prompted(NamedTuple):
    """Tokens (N, T) int64 of prompts and texts, and the place (N,) int64 of each text's first token."""

    tokens: Tensor
    starts: Tensor


def prompted(tokenizer: Any, prompts: Sequence[str], texts: Sequence[str], context_length: int) -> Prompted:
    """Prompts and what follows them as one sequence each, [SOT] prompt text [EOT].

    Texts keep their room, up to half of the context; a prompt that does not fit loses its end.
    """
    tokenizer = tokenizer.ended()
    question, answer = (tokenizer.encode(list(part), context_length) for part in (prompts, texts))
    tokens = torch.full((len(prompts), context_length), tokenizer.pad_id, dtype=torch.int64)
    starts = torch.empty(len(prompts), dtype=torch.int64)
    for row, (words, said) in enumerate(zip(question.tolist(), answer.tolist())):
        said = said[1 : said.index(tokenizer.eot_id)]
        words = words[: words.index(tokenizer.eot_id)]
        said = said[: context_length - 2 if len(words) == 1 else max(1, context_length // 2)] + [tokenizer.eot_id]
        words = words[: context_length - len(said)]
        starts[row] = len(words)
        tokens[row, : len(words) + len(said)] = torch.tensor(words + said)
    return Prompted(tokens, starts)


def text_labels(tokens: Tensor, starts: Tensor, eot_id: int) -> Tensor:
    """Labels (N, T - 1) of the positions that predict a text, -1 elsewhere."""
    ends = tokens == eot_id
    inside = (ends.cumsum(1) - ends.long()) == 0
    place = torch.arange(tokens.shape[1], device=tokens.device)
    return tokens.masked_fill(~inside | (place < starts[:, None]), -1)[:, 1:]


def log_likelihood(model: Any, image_features: Any, rows: Tensor, texts: Prompted) -> tuple[Tensor, Tensor]:
    """Log-likelihood of texts.

    Args:
        model: one that writes captions.
        image_features: of a batch of images.
        rows: (N,) int64, the image of each text.
        texts: on the model's device.

    Returns:
        (N,) fp32 natural logarithms, (N,) int64 numbers of tokens, the end included.
    """
    text = model.config.text
    sums, counts = [], []
    longest = int(((texts.tokens == text.eot_id).int().argmax(1)).max()) + 1
    tokens = texts.tokens[:, :longest]
    for part in torch.arange(len(tokens), device=tokens.device).split(
        max(1, _LOGITS_BYTES // (4 * longest * text.vocab_size))
    ):
        logits = model.caption_logits(rows_of(image_features, rows[part]), tokens[part])[:, :-1].float()
        labels = text_labels(tokens[part], texts.starts[part], text.eot_id)
        scored = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[:, :, None]).squeeze(2)
        sums.append(scored.masked_fill(labels < 0, 0.0).sum(1))
        counts.append((labels >= 0).sum(1))
    return torch.cat(sums), torch.cat(counts)
