"""Captioning: what the model writes against what people wrote."""

from typing import Any

import torch

from sycoca.generate import generate_from
from train.data.sample import Skipped
from train.tasks.bleu import ORDERS, bleu
from train.tasks.cider import cider_d
from train.tasks.coco_java import meteor, spice
from train.tasks.outcome import CaptionImages, Example, Outcome, by_kind, image_batches, require_any, share
from train.tasks.ptb import ptb_words
from train.tasks.rouge import rouge_l


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, source: Any, *, options: Any, device: Any, skipped: Skipped) -> Outcome:
    """Writes a caption for every image and scores it.

    Args:
        model: in evaluation mode, one that writes captions.
        tokenizer: the model's.
        source: images with captions; its `domain(index)`, where it has one, splits the scores.
        options: `TaskOptions`.
        device: of the model.
        skipped: account of what could not be used; captions that came out empty are counted there too.

    Returns:
        CIDEr-D in the usual unit (times ten, so that 1.0 is 100 of the literature's points), BLEU, ROUGE-L in 0..1;
        the examples are the images, scored by CIDEr-D.

    Raises:
        ValueError: no image can be used.
    """
    config, read = model.config, CaptionImages(source)
    written, indices, keys = [], [], []
    for batch in image_batches(
        read,
        limit=options.limit,
        image_size=config.vision.image_size,
        batch_size=options.batch_size,
        device=device,
        skipped=skipped,
    ):
        written += generate_from(
            model,
            tokenizer,
            model.encode_image(batch.images),
            num_beams=options.beams,
            min_length=options.min_length,
            max_length=options.max_length,
            length_penalty=options.length_penalty,
        )
        indices += batch.indices
        keys += batch.keys
    require_any(len(indices), "captioning", source, skipped)
    candidates = [ptb_words(text) for text in written]
    for key, words in zip(keys, candidates):
        if not words:
            skipped.row("empty caption written", key)
    references = [[ptb_words(text) for text in read.captions[index]] for index in indices]
    cider, rouge, blue = cider_d(candidates, references), rouge_l(candidates, references), bleu(candidates, references)
    headline = {"CIDEr-D": share(cider)}
    headline |= {f"BLEU-{n + 1}": blue.corpus[n] for n in range(ORDERS)} | {"ROUGE-L": share(rouge)}
    if options.meteor:
        headline["METEOR"] = meteor(candidates, references)
    if options.spice:
        headline["SPICE"] = spice(candidates, references)
    figures: dict[str, Any] = {"images": len(indices), **headline}
    tables = {}
    if hasattr(source, "domain"):
        rows = by_kind([source.domain(index) for index in indices], cider)
        figures["CIDEr-D by domain"] = {name: value for name, _, value in rows}
        tables["CIDEr-D by domain"] = (("domain", "images", "CIDEr-D"), rows)
    figures["captions"] = dict(zip(keys, written))
    examples = [
        Example(
            score,
            index,
            key,
            (("CIDEr-D", f"{score:.2f}"), ("written", text), *(("true", said) for said in read.captions[index])),
        )
        for score, index, key, text in zip(cider, indices, keys, written)
    ]
    return Outcome("captioning", figures, headline, tables, examples)
