"""Where each word of a caption lies in its image.

score       mean over the word's tokens of their cosine with each patch, in the space of the patch scores
attention   how far the captioner looked at each patch when it was about to write the word, layers and heads averaged
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class WordMaps(NamedTuple):
    """Maps of one caption.

    Attributes:
        kind: `score` or `attention`.
        words: n of them, as written.
        maps: (n, rows, cols) float.
    """

    kind: str
    words: tuple[str, ...]
    maps: np.ndarray


@torch.no_grad()
def word_maps(
    model: Any, tokenizer: Any, image: Any, text: Any, captions: Sequence[str], *, scored: bool
) -> list[WordMaps] | None:
    """Maps of the words of captions.

    Args:
        model: SyCoCa in eval mode.
        tokenizer: the one the model was trained with.
        image: what `model.encode_image` made of B images.
        text: what `model.encode_text` made of the captions.
        captions: B of them.
        scored: whether the score space is trained; then it is taken if it tells words apart, else attention.

    Returns:
        B maps, or None for a model that knows words in neither way.
    """
    config = model.config
    kind, weights = "score", None
    if scored and config.masking.score_space != "value":
        weights = model.token_scores(image, text).transpose(1, 2)  # (B, T, P)
    elif model.caption_decoder is not None and config.vision.pooler == "cls":
        kind, weights = "attention", caption_attention(model.caption_decoder, text.words, image.patches)
    rows, cols = config.vision.grid
    # What was pooled before the captioner has no place in the image.
    if weights is None:
        return None
    weights = weights.float().cpu().unflatten(2, (rows, cols)).numpy()
    # A token is written by the one before it.
    shift = 1 if kind == "attention" else 0
    found = []
    for caption, row, valid in zip(captions, weights, text.valid):
        words = tokenizer.words(caption, config.text.context_length)
        # The end of the caption is a token like the others: it scores patches, and something is looked at for it.
        words.append(("[EOT]", [int(valid.sum()) - 1]))
        maps = [row[np.array(positions) - shift].mean(0) for _, positions in words]
        found.append(WordMaps(kind, tuple(w for w, _ in words), np.array(maps).reshape(len(words), rows, cols)))
    return found


@torch.no_grad()
def caption_attention(decoder: Any, words: Tensor, patches: Tensor) -> Tensor:
    """Attention (B, T, M) of the captioner's words (B, T, D) to the patches (B, M, D'), layers and heads averaged."""
    seen = []

    def look(attention: Any, operands: tuple) -> None:
        x, (keys, _) = operands[0], operands[1] if isinstance(operands[1], tuple) else attention.look_up(operands[1])
        q = attention.q(x).unflatten(2, (attention.heads, -1)).transpose(1, 2)
        logits = q @ keys.transpose(2, 3) * q.shape[3] ** -0.5
        seen.append(logits.float().softmax(-1).mean(1))

    hooks = [cross.attn.register_forward_pre_hook(look) for _, cross in decoder.layers()]
    try:
        decoder.states(words, patches)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen).mean(0)
