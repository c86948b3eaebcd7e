"""Captions of images.

    y_0 = [SOT],  y_(t+1) = choose(p(. | y_0 .. y_t, patches)),  until every caption holds [EOT]

`choose` is the likeliest token, a draw, or a beam search. Options: `Decoding`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sycoca.beam import beam_search
from sycoca.cache import Cached, Session
from sycoca.decoding import Decoding
from sycoca.fused_captioner import FusedCached
from sycoca.masking import hash_int
from sycoca.sampling import Constraints, draw

__all__ = [
    "Caption",
    "Decoding",
    "Generated",
    "generate",
    "generate_from",
    "generate_scored",
    "generate_tokens",
    "opening",
    "unable",
]


class Generated(NamedTuple):
    """R captions for each of B images.

    Attributes:
        tokens: (B, R, L) int64, [SOT] and prompt first; padding behind the end.
        lengths: (B, R) int64, tokens of each, [SOT] and, where it was reached, [EOT] included.
        scores: (B, R) fp32, log-probability under the model of what stands behind the prompt; -inf where a beam
            search found fewer than R captions, whose length is 0.
        normalised: (B, R) fp32, the same, repetition penalised, over the number of tokens behind the prompt to the
            power of the length penalty: what beams are ranked by, best first. Draws keep their order.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor
    normalised: Tensor


class Caption(NamedTuple):
    """A caption as a person reads it, with its scores as in `Generated`."""

    text: str
    score: float
    normalised: float


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, images: Tensor, *, prompt: str | Sequence[str] | None = None, **options: Any
) -> list[str]:
    """Captions of a batch of images.

    Args:
        model: one that writes captions (`model.config.writes`).
        tokenizer: the one the model was trained with.
        images: (B, 3, height, width) float, normalised.
        prompt: how every caption begins, or how each of the B does.
        options: fields of `Decoding`, such as `num_beams=4`.

    Returns:
        B * num_return captions without special tokens, those of an image together.

    Raises:
        ValueError: an option out of its range, or a prompt that leaves no room for a caption.
        TypeError: an unknown option.
    """
    Decoding.of(options).lengths(model.config.text.context_length)
    if len(images) == 0:
        return []
    return generate_from(model, tokenizer, model.encode_image(images), prompt=prompt, **options)


def generate_from(
    model: Any, tokenizer: Any, image_features: Any, *, prompt: str | Sequence[str] | None = None, **options: Any
) -> list[str]:
    """Captions of images that `model.encode_image` has seen; otherwise as `generate`."""
    found = generate_scored(model, tokenizer, image_features, prompt=prompt, **options)
    return [caption.text for captions in found for caption in captions]


def generate_scored(
    model: Any, tokenizer: Any, image_features: Any, *, prompt: str | Sequence[str] | None = None, **options: Any
) -> list[list[Caption]]:
    """`num_return` captions of each image with their scores; otherwise as `generate_from`."""
    B = len(image_features.patches)
    _, most = Decoding.of(options).lengths(model.config.text.context_length)
    before = opening(model, tokenizer)
    asked = [[]] * B if prompt is None else _prompt_ids(tokenizer, prompt, B, most)
    found = generate_tokens(model, image_features, prompt=[before + ids for ids in asked], **options)
    rows, lengths = found.tokens.flatten(0, 1).tolist(), found.lengths.flatten().tolist()
    texts = tokenizer.decode([row[1 + len(before) : length] for row, length in zip(rows, lengths)])
    captions = map(Caption, texts, found.scores.flatten().tolist(), found.normalised.flatten().tolist())
    return [[next(captions) for _ in range(found.tokens.shape[1])] for _ in range(B)]


@torch.no_grad()
def generate_tokens(
    model: Any,
    image_features: Any,
    *,
    prompt: Sequence[Sequence[int]] | Tensor | None = None,
    session: Callable[[Any, Any, int], Session] | None = None,
    **options: Any,
) -> Generated:
    """Captions as token ids.

    Args:
        model: one that writes captions (`model.config.writes`).
        image_features: of B images, by `model.encode_image`.
        prompt: ids that each of the B captions begins with, of any lengths, [SOT] not included; those of `opening`
            first, where the model has been taught one.
        session: what decoding remembers, from model, features and the most tokens of a caption; by default each key
            and value that the model computes.
        options: fields of `Decoding`.

    Returns:
        Captions with scores.

    Raises:
        ValueError: an option or a prompt out of its range, a model without captioning or with logits that are NaN.
        TypeError: an unknown option.
    """
    text, decoding = model.config.text, Decoding.of(options)
    least, most = decoding.lengths(text.context_length)
    if not model.config.writes:
        raise ValueError(f"generate: {unable(model.config)}")
    if session is None:
        session = FusedCached if model.caption_decoder is None else Cached
    patches = image_features.patches
    prompts, prompt_lengths = _prompt_table(prompt, len(patches), text, most, patches.device)
    R, device = decoding.num_return, patches.device
    if len(patches) == 0:
        nothing = torch.zeros(0, R, device=device)
        return Generated(torch.zeros(0, R, 1, dtype=torch.int64, device=device), nothing.long(), nothing, nothing)
    constraints = Constraints(text.sot_id, text.eot_id, least, decoding.repetition_penalty, decoding.no_repeat_ngram)
    opened = session(model, image_features, most)
    if decoding.num_beams > 1:
        found = beam_search(
            opened,
            prompts,
            prompt_lengths,
            num_beams=decoding.num_beams,
            max_length=most,
            length_penalty=decoding.length_penalty,
            constraints=constraints,
            pad_id=text.pad_id,
        )
        tokens, scores, normalised = (part[:, :R] for part in (found.tokens, found.scores, found.ranks))
    else:
        tokens, scores, searched = write(
            opened,
            prompts,
            prompt_lengths,
            per_image=R,
            max_length=most,
            choose=greedy if decoding.temperature is None else _drawer(decoding, len(prompts), most, device),
            constraints=constraints,
            pad_id=text.pad_id,
        )
    lengths = _lengths(tokens, text.eot_id)
    if decoding.num_beams == 1:
        normalised = searched / (lengths - prompt_lengths[:, None]).clamp(min=1) ** decoding.length_penalty
    if bool(scores.isnan().any()):
        raise ValueError("generate: the model's logits are not numbers (NaN); its weights or the images are broken")
    lengths = lengths.masked_fill(scores.isneginf(), 0)
    return Generated(tokens[:, :, : max(1, int(lengths.max()))], lengths, scores, normalised)


def opening(model: Any, tokenizer: Any) -> list[int]:
    """Ids of the words that a model has been taught to begin every caption with, [SOT] not included."""
    text = model.config.text
    return _prompt_ids(tokenizer, text.prompt, 1, text.context_length)[0] if text.prompt else []


def greedy(log_probs: Tensor, position: int) -> Tensor:
    """The likeliest token (N,) of (N, V); among equals the first."""
    return log_probs.argmax(dim=1)


def write(
    session: Session,
    prompts: Tensor,
    prompt_lengths: Tensor,
    *,
    per_image: int,
    max_length: int,
    choose: Callable[[Tensor, int], Tensor],
    constraints: Constraints,
    pad_id: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Grows captions token by token until all have ended or are full.

    Args:
        session: fresh, of B images.
        prompts: (B, n) int64, tokens before the caption, [SOT] first.
        prompt_lengths: (B,) int64 in 1..n, how many of them count.
        per_image: R, captions of each image.
        max_length: L, most tokens of a caption, prompt and end included.
        choose: constrained log-probabilities (N, V) fp32 and the position to tokens (N,) int64.
        constraints: on the tokens behind the prompt.
        pad_id: the token behind the end.

    Returns:
        tokens (B, R, L), and what they sum to, (B, R) fp32, in log-probability of the model and as constrained.
    """
    B, R, device = len(prompts), per_image, prompts.device
    first = int(prompt_lengths.min())
    rows = torch.arange(B, device=device).repeat_interleave(R)
    prompts, prompt_lengths = prompts[rows], prompt_lengths[rows]
    tokens = torch.full((B * R, max_length), pad_id, dtype=torch.int64, device=device)
    tokens[:, :first] = prompts[:, :first]
    ended: Tensor | None = None
    scores = torch.zeros(B * R, device=device)
    # Without a penalty what may be said keeps its probability.
    searched = scores.clone() if constraints.penalises else scores

    logits = session.advance(prompts[::R, :first])[rows]
    session.select(rows)
    for t in range(first, max_length):
        log_probs = logits.log_softmax(dim=1)
        allowed = constraints.apply(log_probs, tokens[:, :t])
        token, idle = choose(allowed, t), ended
        if ended is not None:
            token = token.masked_fill(ended, pad_id)
        if t < prompts.shape[1]:
            forced = t < prompt_lengths
            token, idle = torch.where(forced, prompts[:, t], token), forced if ended is None else forced | ended
        for total, part in ((scores, log_probs), (searched, allowed))[: 1 + constraints.penalises]:
            gain = part.gather(1, token[:, None]).squeeze(1)
            total += gain if idle is None else gain.masked_fill(idle, 0.0)
        tokens[:, t] = token
        ends = token == constraints.eot_id
        if idle is not None:
            ends &= ~idle
        if ended is not None:
            ends |= ended
        count = int(ends.count_nonzero())
        if t + 1 == max_length or count == len(ends):
            break
        ended = ends if count else None
        logits = session.advance(token[:, None])
    return tokens.view(B, R, -1), scores.view(B, R), searched.view(B, R)


def _drawer(decoding: Decoding, images: int, most: int, device: torch.device) -> Callable[[Tensor, int], Tensor]:
    """Draws whose numbers depend on the seed and the place of the image, not on the number of images."""
    size = decoding.num_return, most
    if decoding.seed is None:
        uniform = torch.rand(images * size[0], most).to(device)
    else:
        key, places = hash_int(decoding.seed), range(decoding.first, decoding.first + images)
        seeded = [torch.Generator().manual_seed(hash_int(key + place)) for place in places]
        drawn = [torch.rand(size, generator=own) for own in seeded]
        uniform = torch.cat([torch.empty(0, most), *drawn]).to(device)

    def choose(log_probs: Tensor, position: int) -> Tensor:
        return draw(log_probs, uniform[:, position], decoding.temperature, decoding.top_k, decoding.top_p)

    return choose


def unable(config: Any) -> str:
    """Why a model of a configuration that does not write does not, and what teaches it."""
    if config.text.kind == "bidirectional" and config.fuses:
        return "the model has not learned to write; train/finetune.py captioning teaches it"
    return "the model was built without captioning (objective 'ic')"


def _lengths(tokens: Tensor, eot_id: int) -> Tensor:
    ends = tokens == eot_id
    return torch.where(ends.any(-1), ends.int().argmax(-1) + 1, tokens.shape[-1])


def _prompt_ids(tokenizer: Any, prompt: str | Sequence[str], B: int, most: int) -> list[list[int]]:
    """Word tokens of each image's prompt."""
    prompts = [prompt] * B if isinstance(prompt, str) else list(prompt)
    # With room to spare, so that a prompt that is too long shows.
    rows = tokenizer.ended().encode(prompts, most + 2).tolist()
    return [row[1 : row.index(tokenizer.eot_id)] for row in rows]


def _prompt_table(prompt: Any, B: int, text: Any, most: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts (B, n), [SOT] first, and their lengths (B,)."""
    given = [[]] * B if prompt is None else [[int(i) for i in ids] for ids in prompt]
    if len(given) != B:
        raise ValueError(f"generate: {len(given)} prompts for {B} images")
    for ids in given:
        if ids and len(ids) + 1 >= most:
            raise ValueError(
                f"generate: a prompt of {len(ids)} tokens, its start not counted, leaves no room within {most}"
            )
        if not all(0 <= i < text.vocab_size and i not in (text.sot_id, text.eot_id) for i in ids):
            raise ValueError(f"generate: a prompt holds words only, ids in 0..{text.vocab_size - 1}, no start, no end")
    table = torch.full((B, 1 + max(map(len, given), default=0)), text.pad_id, dtype=torch.int64)
    table[:, 0] = text.sot_id
    for row, ids in zip(table, given):
        row[1 : len(ids) + 1] = torch.tensor(ids, dtype=torch.int64)
    return table.to(device), torch.tensor([1 + len(ids) for ids in given], device=device)
