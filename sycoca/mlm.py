"""Words that masked language modelling hides: whole words, some with their neighbours, as a function of each seed.

    n = min(most, max(1, round(share * tokens of the text)))
    words in the order of a hash;  with some chance a word draws the next one or two up to its own place
    hidden: the first words that together have at most n tokens; of a first word that has more, its first n tokens
    of the hidden tokens 8 in 10 become [MASK], 1 another token, 1 stays

[CLS], [SEP] and padding are never hidden and never stand in for a word. Unlike in the published code, a word is never
hidden in part to fill up n.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sycoca.config import TextConfig, WordMaskingConfig
from sycoca.masking import hash_tensor

_LAST = 1 << 62


class MaskedWords(NamedTuple):
    """Texts with hidden words.

    Attributes:
        tokens: (E, T) int64, as the encoder sees them.
        positions: (E, M) int64, of the hidden tokens, ascending, 0 behind the end.
        labels: (E, M) int64, what stood there, -1 behind the end.
    """

    tokens: Tensor
    positions: Tensor
    labels: Tensor


def mask_words(
    tokens: Tensor, seeds: Tensor, continues: Tensor, text: TextConfig, masking: WordMaskingConfig
) -> MaskedWords:
    """Hides words of texts.

    Args:
        tokens: (E, T) int64, [CLS] first.
        seeds: (E,) int64; equal seeds hide the same places of equal texts.
        continues: (V,) bool, tokens that go on with a word; see `Tokenizer.continues`.
        text: of the encoder.
        masking: how much is hidden.
    """
    T = tokens.shape[1]
    content = ~torch.isin(tokens, tokens.new_tensor([text.pad_id, text.sot_id, text.eot_id]))
    going_on = continues[tokens.clamp(max=len(continues) - 1)] & (tokens < len(continues))
    begins = content & ~(going_on & content.roll(1, 1))
    word = begins.cumsum(1) - 1  # (E, T): number of the word; -1 before the first

    keys = _draws(seeds, T, 0)
    lengths = 2 + (_draws(seeds, T, 1) & 1)
    draws_others = _draws(seeds, T, 2).double() < masking.ngram_prob * _LAST
    lengths = torch.where(draws_others, lengths, 1)  # (E, T): of the run of words that begins with each word
    # A word goes with the earliest of those whose run reaches it.
    own_keys = keys
    for reach in (1, 2):
        earlier = own_keys.roll(reach, 1).masked_fill(lengths.roll(reach, 1) <= reach, _LAST)
        earlier[:, :reach] = _LAST
        keys = torch.minimum(keys, earlier)

    own = word.clamp(min=0)
    sizes = torch.zeros_like(tokens).scatter_add_(1, own, content.long())  # tokens of each word
    order = keys.masked_fill(sizes == 0, _LAST).argsort(dim=1, stable=True)
    before = torch.zeros_like(sizes).scatter_(1, order, sizes.gather(1, order).cumsum(1) - sizes.gather(1, order))
    length = content.sum(1, keepdim=True) + 1
    most = (length * masking.share).round().long().clamp(1, masking.most)
    within = content.cumsum(1) - begins.long().mul(content.cumsum(1)).cummax(1).values  # place within the word
    whole = (before + sizes).gather(1, own) <= most
    cut = (before.gather(1, own) == 0) & (within < most)
    hidden = content & (whole | cut)

    M = min(masking.most, T)
    positions = (~hidden).to(torch.uint8).argsort(dim=1, stable=True)[:, :M]
    counted = hidden.gather(1, positions)
    labels = tokens.gather(1, positions).masked_fill(~counted, -1)
    return MaskedWords(
        _replaced(tokens, hidden, seeds, text, len(continues)), positions.masked_fill(~counted, 0), labels
    )


def _replaced(tokens: Tensor, hidden: Tensor, seeds: Tensor, text: TextConfig, vocabulary: int) -> Tensor:
    kind = _draws(seeds, tokens.shape[1], 3) % 10
    reserved = torch.tensor(sorted({text.pad_id, text.sot_id, text.eot_id, text.mask_id}), device=tokens.device)
    other = _draws(seeds, tokens.shape[1], 4) % (vocabulary - len(reserved))
    for special in reserved:
        # A draw from what is left, without rejection.
        other = other + (other >= special)
    shown = torch.where(kind < 8, text.mask_id, torch.where(kind == 8, other, tokens))
    return torch.where(hidden, shown, tokens)


def _draws(seeds: Tensor, count: int, use: int) -> Tensor:
    """Numbers (E, count) int64, uniform in 0..2^62 - 1."""
    number = torch.arange(count, device=seeds.device) + (use << 32)
    return hash_tensor(hash_tensor(seeds)[:, None] + number) & (_LAST - 1)
