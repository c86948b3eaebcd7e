"""Choosing among texts: multiple choice by likelihood, hard negatives by contrastive score and by likelihood."""

from typing import Any

import torch

from train.data.sample import Skipped
from train.tasks.likelihood import log_likelihood, prompted
from train.tasks.outcome import Example, Outcome, by_kind, image_batches, require_any, share
from train.tasks.retrieval import encode_texts


@torch.no_grad()
def evaluate_choice(model: Any, tokenizer: Any, source: Any, *, options: Any, device: Any, skipped: Skipped) -> Outcome:
    """Multiple choice: the answer whose tokens are likeliest behind the question.

    Args:
        model: in evaluation mode, one that writes captions.
        tokenizer: the model's.
        source: a `ChoiceSource`.
        options: `TaskOptions`; `per_token` divides by the number of tokens.
        device: of the model.
        skipped: account of what could not be used.

    Returns:
        The share of right choices beside chance; the examples are scored by the likelihood ratio of the right answer.

    Raises:
        ValueError: no image can be used.
    """
    return _evaluate("choice", (_by_likelihood,), model, tokenizer, source, options, device, skipped)


@torch.no_grad()
def evaluate_pairs(model: Any, tokenizer: Any, source: Any, *, options: Any, device: Any, skipped: Skipped) -> Outcome:
    """Hard negatives: whether the true caption beats the false one; ties are lost. As `evaluate_choice`."""
    ways = [_by_similarity] if model.config.learns("itc") else []
    ways += [_by_likelihood] if model.config.writes else []
    return _evaluate("pairs", tuple(ways), model, tokenizer, source, options, device, skipped)


def _by_likelihood(model: Any, tokenizer: Any, images: Any, rows: list[int], prompts, texts, options, device) -> list:
    # A text behind no question is a caption, and begins as the model has learned that captions do.
    prompts = [prompt or model.config.text.prompt for prompt in prompts]
    sequences = prompted(tokenizer, prompts, texts, model.config.text.context_length)
    sequences = sequences._make(part.to(device) for part in sequences)
    sums, counts = log_likelihood(model, images, torch.tensor(rows, device=device), sequences)
    return (sums / counts if options.per_token else sums).tolist()


def _by_similarity(model: Any, tokenizer: Any, images: Any, rows: list[int], prompts, texts, options, device) -> list:
    features = encode_texts(model, tokenizer, list(texts), options.batch_size, device)
    return (images.features.float()[torch.tensor(rows, device=device)] * features).sum(1).tolist()


_NAMES = {_by_likelihood: "likelihood", _by_similarity: "contrastive score"}


def _evaluate(task: str, ways: tuple, model, tokenizer, source, options, device, skipped: Skipped) -> Outcome:
    wins: dict[str, list[float]] = {_NAMES[way]: [] for way in ways}
    kinds, chances, examples = [], [], []
    for batch in image_batches(
        source,
        limit=options.limit,
        image_size=model.config.vision.image_size,
        batch_size=options.batch_size,
        device=device,
        skipped=skipped,
    ):
        images = model.encode_image(batch.images)
        asked = [(row, choice) for row, index in enumerate(batch.indices) for choice in source.choices(index)]
        if not asked:
            continue
        rows = [row for row, choice in asked for _ in choice.texts]
        prompts = [choice.prompt for _, choice in asked for _ in choice.texts]
        texts = [text for _, choice in asked for text in choice.texts]
        for way in ways:
            scores, start = way(model, tokenizer, images, rows, prompts, texts, options, device), 0
            for row, choice in asked:
                own = scores[start : start + len(choice.texts)]
                start += len(own)
                margin = own[choice.right] - max(s for i, s in enumerate(own) if i != choice.right)
                wins[_NAMES[way]].append(float(margin > 0))
                if way is ways[0]:
                    kinds.append(choice.kind)
                    chances.append(1 / len(own))
                    lines = [(f"{score:.2f}", text) for score, text in zip(own, choice.texts)]
                    shown = (
                        ("asked", choice.prompt or "which caption?"),
                        ("right", choice.texts[choice.right]),
                        *lines,
                    )
                    examples.append(Example(margin, batch.indices[row], batch.keys[row], shown))
    require_any(len(kinds), task, source, skipped)
    figures: dict[str, Any] = {"choices": len(kinds), "chance": share(chances)}
    tables = {}
    for name, won in wins.items():
        figures[name] = {kind: value for kind, _, value in by_kind(kinds, won)}
        tables[f"right by {name}"] = (("kind", "choices", "share"), by_kind(kinds, won))
    headline = {f"right by {name}": share(won) for name, won in wins.items()} | {"chance": share(chances)}
    return Outcome(task, figures, headline, tables, examples)
