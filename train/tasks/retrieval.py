"""Image-text retrieval: R@1/5/10 in both directions, every caption a query and every image a query.

With `rerank=K` the best K by ITC are ranked anew by matching.

mTR, mIR = mean of R@1, R@5, R@10 from image to text, from text to image        (the SyCoCa paper's)
"""

from typing import Any

import torch

from sycoca.config import ConfigError
from train.data.sample import Skipped
from train.evaluation import retrieval_figures, retrieval_ranks
from train.tasks import rerank
from train.tasks.outcome import CaptionImages, Example, Outcome, image_batches, require_any, share

_SHOWN_TEXTS = 3


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, source: Any, *, options: Any, device: Any, skipped: Skipped) -> Outcome:
    """Judges retrieval among the images of a source and all their captions.

    Args:
        model: in evaluation mode, with the objective `itc`.
        tokenizer: the model's.
        source: images with captions.
        options: `TaskOptions`; `rerank` needs a model with the objective `itm`.
        device: of the model.
        skipped: account of what could not be used.

    Returns:
        Recalls and their chance; the examples are the images, scored by the rank of their best caption.

    Raises:
        ValueError: no image can be used.
        ConfigError: the model cannot match, and is asked to rank anew.
    """
    if options.rerank and getattr(model, "itm_head", None) is None:
        raise ConfigError("rerank: needs a model trained with the objective 'itm'")
    config, read = model.config, CaptionImages(source)
    how = {"limit": options.limit, "image_size": config.vision.image_size, "batch_size": options.batch_size}
    how |= {"device": device, "skipped": skipped}
    images, indices, keys = [], [], []
    for batch in image_batches(read, **how):
        images.append(model.encode_image(batch.images).features.float())
        indices += batch.indices
        keys += batch.keys
    require_any(len(indices), "retrieval", source, skipped)
    texts = [caption for index in indices for caption in read.captions[index]]
    owner = torch.tensor([row for row, index in enumerate(indices) for _ in read.captions[index]], device=device)
    encoded = torch.cat(images), encode_texts(model, tokenizer, texts, options.batch_size, device)
    ranks = retrieval_ranks(*encoded, owner)
    figures = retrieval_figures(*ranks, owner, len(indices))
    by_itc = {}
    if options.rerank:
        by_itc = {"itc": {way: figures[way] for way in ("image_to_text", "text_to_image")}, "rerank": options.rerank}
        pictures = (batch.images for batch in image_batches(read, **how))
        ranks = _ranked_anew(model, tokenizer, pictures, encoded, owner, ranks, texts, options, device)
        figures = retrieval_figures(*ranks, owner, len(indices))
    means = {
        name: share(list(figures[way].values())) for name, way in (("mTR", "image_to_text"), ("mIR", "text_to_image"))
    }
    headline = {
        **{f"TR {name.upper()}": value for name, value in figures["image_to_text"].items()},
        **{f"IR {name.upper()}": value for name, value in figures["text_to_image"].items()},
        **means,
    }
    rows = [
        (way.replace("_", " "), *figures[way].values(), figures["chance"][way]["r@1"])
        for way in ("image_to_text", "text_to_image")
    ]
    for way, recalls in by_itc.get("itc", {}).items():
        headline[f"{'TR' if way == 'image_to_text' else 'IR'} R@1 by ITC alone"] = recalls["r@1"]
    table = {"recall": (("direction", "R@1", "R@5", "R@10", "R@1 by chance"), rows)}
    examples = _examples(encoded, ranks[0].tolist(), owner.tolist(), indices, keys, texts, read)
    return Outcome("retrieval", figures | means | by_itc, headline, table, examples)


def encode_texts(model: Any, tokenizer: Any, texts: list[str], batch_size: int, device: Any) -> torch.Tensor:
    """Features (M, E) fp32 of M texts."""
    length = model.config.text.context_length
    parts = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
    return torch.cat([model.encode_text(tokenizer.encode(part, length).to(device)).features.float() for part in parts])


def _ranked_anew(
    model: Any,
    tokenizer: Any,
    pictures: Any,
    encoded: tuple[torch.Tensor, torch.Tensor],
    owner: torch.Tensor,
    ranks: tuple[torch.Tensor, torch.Tensor],
    texts: list[str],
    options: Any,
    device: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ranks of `retrieval_ranks` after the best by ITC were ordered by matching."""
    length = model.config.text.context_length
    parts = [texts[i : i + options.batch_size] for i in range(0, len(texts), options.batch_size)]
    said = [model.encode_text(tokenizer.encode(part, length).to(device)) for part in parts]
    states = said[0]._make(torch.cat(fields) for fields in zip(*said))
    chosen = rerank.candidates(*encoded, options.rerank)
    scores = rerank.match_scores(model, pictures, states, chosen, batch_size=options.batch_size)
    own = torch.arange(len(chosen.texts), device=device)[:, None]
    right = owner[chosen.texts] == own, chosen.images == owner[:, None]
    return tuple(rerank.ranked_anew(*parts) for parts in zip(scores, right, ranks))


def _examples(
    encoded: Any,
    ranks: list[int],
    owner: list[int],
    indices: list[int],
    keys: list[str],
    texts: list[str],
    read: Any,
) -> list[Example]:
    images, captions = encoded
    found = []
    for row, (rank, index, key) in enumerate(zip(ranks, indices, keys)):
        best = (captions @ images[row]).topk(min(_SHOWN_TEXTS, len(texts))).indices.tolist()
        lines = [("rank of its first caption", str(rank + 1)), ("one of its captions", read.captions[index][0])]
        for place, text in enumerate(best, 1):
            lines.append((f"{place}: {'right' if owner[text] == row else 'wrong'}", texts[text]))
        found.append(Example(-float(rank), index, key, tuple(lines)))
    return found
