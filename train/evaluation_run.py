"""Evaluation of SyCoCa on held-out pairs: retrieval, captioning, TG-MIM, and what the selection finds.

Features, captions and their likelihoods come from full images; the masks of TG-MIM are those of the score, random
ones where training never follows it.
Beside a figure with the true caption stands the same with a stranger's: what the caption is worth.
A figure is None where the model does not learn what it measures, the data do not tell, or the result is not finite.
"""

import math
import time
from typing import Any

import torch
from torch import Tensor

from kernels import gather_patches
from sycoca.generate import generate_from
from sycoca.losses import feature_targets
from sycoca.masking import select_at_random
from sycoca.vision import patchify
from sycoca.visualize import has_scores, restore_patches
from train.evaluation import auc, caption_nats, overlap, retrieval, share_inside
from train.evaluation_pairs import HeldOut, Pairs

_LOGITS_BYTES = 128 << 20
_MOSTLY = 0.5
_SHOWN = 4


@torch.no_grad()
def evaluate(
    model: Any,
    tokenizer: Any,
    dataset: Any,
    *,
    image_size: int,
    pairs: int = 256,
    batch_size: int = 64,
    device: Any,
    group: Any = None,
    examples: int = 16,
    train: Any = None,
) -> dict:
    """Judges a model on the first pairs of a held-out data set.

    Args:
        model: SyCoCa in eval mode, not wrapped.
        tokenizer: the one the model was trained with.
        dataset: a source of samples with captions and, where known, regions.
        image_size: side of the images in pixels.
        pairs: how many, at most; unreadable ones among them are left out and counted.
        batch_size: pairs of a forward pass.
        device: where the model is.
        group: a process group whose ranks share the work and all get the result; None for this process alone.
        examples: captions to write, at most.
        train: the training source, for the predictor of boxes that ignores its text; None leaves that one out.

    Returns:
        Plain data, ready for JSON:
        `retrieval.pairs` (first captions) and `retrieval.captions` (all of them, a hit if any is in the top k):
        recalls and their chance; `captioning`: nats per token with the true image and with a stranger's, and captions
        written beside the true ones; `tgmim`: L1 of the masked pixels, normalised, against plain colours, or L1 of
        masked features against the model's own of the full image;
        `selection`: share of the described area inside the selected patches, AUC of the scores; `grounding` and
        `matching` as of `train.evaluation_regions.judge`; `seconds`.

    Raises:
        ValueError: no pair is usable.
    """
    started = time.perf_counter()
    config, device = model.config, torch.device(device)
    held_out = HeldOut(dataset, tokenizer, config, image_size=image_size, pairs=pairs, device=device, group=group)
    sums, features = _Sums(), []
    for batch in held_out.batches(batch_size):
        images, texts = model.encode_image(batch.images), model.encode_text(batch.tokens)
        features.append((images.features.float(), texts.features.float()))
        if config.learns("ic"):
            _captioning(sums, model, images, batch)
        if config.num_masked or has_scores(config):
            _selection(sums, model, images, texts, batch)
    usable = held_out.share()
    if not usable:
        raise ValueError(f"evaluate: none of the first {min(pairs, len(dataset))} held-out pairs can be used")
    means = sums.means(held_out, strangers=len(usable) > 1)
    figures = {
        "pairs": len(usable),
        "skipped": held_out.skipped(),
        "retrieval": None,
        "captioning": None,
        "tgmim": None,
        "selection": None,
    }
    if config.learns("bbox") or config.learns("itm"):
        from train.evaluation_regions import judge

        figures |= judge(model, tokenizer, held_out, train)
    if config.learns("itc"):
        figures["retrieval"] = _retrieval(model, held_out, features, usable, batch_size)
    if config.learns("ic"):
        figures["captioning"] = _captioning_figures(means, _written(model, tokenizer, held_out, usable, examples))
    if config.num_masked:
        figures["tgmim"] = _tgmim_figures(means, config)
    if has_scores(config):
        figures["selection"] = _selection_figures(means, config)
    return figures | {"seconds": round(time.perf_counter() - started, 3)}


class _Sums:
    """Sums of a figure over pairs and how much they weigh, by name."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, name: str, values: Tensor, weights: Tensor) -> None:
        """Adds `values` (B,); a pair of weight 0 may hold anything."""
        total = torch.where(weights > 0, values.double() * weights, 0.0).sum().item()
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] += total
        entry[1] += weights.double().sum().item()

    def means(self, held_out: HeldOut, *, strangers: bool) -> dict[str, float | None]:
        """Means over all ranks; those that take another pair's caption are None without `strangers`."""
        names = sorted(self._sums)
        flat = held_out.sum([number for name in names for number in self._sums[name]])
        means = {}
        for name, total, weight in zip(names, flat[::2], flat[1::2]):
            known = weight > 0 and math.isfinite(total) and (strangers or not name.endswith("shuffled"))
            means[name] = total / weight if known else None
        return means


def _captioning(sums: _Sums, model: Any, images: Any, batch: Pairs) -> None:
    text = model.config.text
    rows = max(1, _LOGITS_BYTES // (4 * text.context_length * text.vocab_size))
    for name, tokens in (("nats", batch.tokens), ("nats_shuffled", batch.strangers)):
        for part in torch.arange(len(tokens), device=tokens.device).split(rows):
            seen = images._make(None if field is None else field[part] for field in images)
            nats, count = caption_nats(model.caption_logits(seen, tokens[part]), tokens[part], text.eot_id)
            sums.add(name, nats / count, count * batch.counted[part])


def _selection(sums: _Sums, model: Any, images: Any, texts: Any, batch: Pairs) -> None:
    config, strangers = model.config, model.encode_text(batch.strangers)
    sound = batch.counted & texts.scored.any(1) & strangers.scored.any(1)
    selection = model.select(images, texts) if has_scores(config) else None
    if config.num_masked:
        masks = selection if _masks_by_score(config) else select_at_random(batch.indices, config)
        errors = _feature_errors if config.predicts_features else _pixel_errors
        for name, error in errors(model, images, texts, strangers, masks, batch.images).items():
            sums.add(name, error, sound)
    if not has_scores(config):
        return
    other = model.select(images, strangers)
    index, other_index = _chosen(config, selection), _chosen(config, other)
    sums.add("overlap_shuffled", overlap(index, other_index), sound)
    known = sound & (batch.described.sum(1) > 0)
    sums.add("share", share_inside(batch.described, index), known)
    sums.add("share_shuffled", share_inside(batch.described, other_index), known)

    described = batch.described >= _MOSTLY
    silent = (batch.undescribed >= _MOSTLY) & ~described
    for name, scores, rest in (
        ("auc", selection.scores, ~described),
        ("auc_shuffled", other.scores, ~described),
        ("auc_undescribed", selection.scores, silent),
    ):
        sums.add(name, auc(scores, described, rest), sound & described.any(1) & rest.any(1))


def _chosen(config: Any, selection: Any) -> Tensor:
    """The patches that the score puts first: those that TG-MIM masks, without it those that captioning keeps."""
    return selection.masked if _masks_by_score(config) else selection.kept


def _masks_by_score(config: Any) -> bool:
    return config.num_masked > 0 and config.masking.mask_by == "score" and has_scores(config)


def _feature_errors(
    model: Any, encoded: Any, texts: Any, strangers: Any, selection: Any, images: Tensor
) -> dict[str, Tensor]:
    """L1 (B,) of the features that TG-MIM predicts, in units of each patch, under both captions."""
    target = gather_patches(feature_targets(encoded.patches), selection.masked)
    said = {"l1": texts, "l1_shuffled": strangers}
    found = {name: model.reconstruct(images, text, selection).float() for name, text in said.items()}
    return {name: (predicted - target).abs().mean((1, 2)) for name, predicted in found.items()}


def _pixel_errors(
    model: Any, encoded: Any, texts: Any, strangers: Any, selection: Any, images: Tensor
) -> dict[str, Tensor]:
    """L1 (B,) of the pixels that TG-MIM predicts under both captions, and of plain colours."""
    patches = patchify(images, model.config.vision.patch_size)
    index = selection.masked[:, :, None].expand(-1, -1, patches.shape[2])
    target = patches.gather(1, index)  # (B, K, p * p * 3)
    predicted = model.reconstruct(images, texts, selection).float()
    misled = model.reconstruct(images, strangers, selection).float()
    if model.config.loss.tgmim_kind == "mse_normalised":
        predicted, misled = restore_patches(predicted, target), restore_patches(misled, target)
    colours = patches.unflatten(2, (-1, 3))  # (B, P, p * p, 3)
    visible = selection.visible[:, :, None, None].expand(-1, -1, *colours.shape[2:])
    median = colours.flatten(1, 2).median(1).values
    mean = colours.gather(1, visible).mean((1, 2))
    guesses = {
        "l1": predicted,
        "l1_shuffled": misled,
        "l1_median_colour": _plain(median, target),
        "l1_visible_mean_colour": _plain(mean, target),
    }
    return {name: (guess - target).abs().mean((1, 2)) for name, guess in guesses.items()}


def _plain(colour: Tensor, like: Tensor) -> Tensor:
    """Patches (B, K, p * p * 3) of one colour (B, 3) per image."""
    return colour.repeat(1, like.shape[2] // 3)[:, None].expand_as(like)


def _retrieval(model: Any, held_out: HeldOut, features: list, usable: dict, batch_size: int) -> dict:
    rows = torch.tensor(list(usable), device=features[0][0].device)
    images, firsts = (held_out.gather(list(part), max(usable) + 1)[rows] for part in zip(*features))
    pairs = retrieval(images, firsts, torch.arange(len(rows), device=rows.device))
    captions = [caption for _, said in usable.values() for caption in said]
    if len(captions) == len(usable):
        return {"pairs": pairs, "captions": None}
    encoded = [model.encode_text(tokens).features.float() for tokens in held_out.captions(captions, batch_size)]
    owner = [row for row, (_, said) in enumerate(usable.values()) for _ in said]
    texts = held_out.gather(encoded, len(captions))
    return {"pairs": pairs, "captions": retrieval(images, texts, torch.tensor(owner, device=rows.device))}


def _written(model: Any, tokenizer: Any, held_out: HeldOut, usable: dict, examples: int) -> list[dict]:
    """The first pairs with a caption by the model; every rank writes the same."""
    chosen = list(usable)[:examples]
    if not chosen:
        return []
    written = generate_from(model, tokenizer, model.encode_image(held_out.images(chosen)))
    return [{"key": usable[i][0], "caption": usable[i][1][0], "written": text} for i, text in zip(chosen, written)]


def _captioning_figures(means: dict, written: list[dict]) -> dict:
    return {
        "nats_per_token": means["nats"],
        "nats_per_token_shuffled": means["nats_shuffled"],
        "gain": _apply(lambda true, other: other - true, means["nats"], means["nats_shuffled"]),
        "examples": written,
    }


def _tgmim_figures(means: dict, config: Any) -> dict:
    # Features are no colours; predictions in units of the hidden patch are no rival to a colour that does not know it.
    fair = config.loss.tgmim_kind in ("l1", "mse")
    return {
        "l1": means["l1"],
        "l1_shuffled": means["l1_shuffled"],
        "gain": _apply(lambda true, other: 1 - true / other, means["l1"], means["l1_shuffled"]),
        "l1_median_colour": means["l1_median_colour"] if fair else None,
        "l1_visible_mean_colour": means["l1_visible_mean_colour"] if fair else None,
    }


def _selection_figures(means: dict, config: Any) -> dict:
    kept = config.vision.num_patches - config.num_dropped
    chosen = config.num_masked if _masks_by_score(config) else kept
    return {
        "described_share": means["share"],
        "described_share_shuffled": means["share_shuffled"],
        "described_share_random": chosen / config.vision.num_patches,
        "auc": means["auc"],
        "auc_shuffled": means["auc_shuffled"],
        "auc_against_undescribed": means["auc_undescribed"],
        "overlap_shuffled": means["overlap_shuffled"],
    }


def _apply(compute: Any, *values: float | None) -> float | None:
    """The result, None where a value is missing."""
    return None if None in values else compute(*values)


def summary_lines(figures: dict) -> list[str]:
    """What `evaluate` found, for a terminal.

    Args:
        figures: the result of `evaluate`.

    Returns:
        Lines, each of one subject.
    """
    skipped = "".join(f", {count} x {cause}" for cause, count in figures["skipped"].items())
    lines = [f"held out: {figures['pairs']} pairs{skipped}, judged in {figures['seconds']:.1f} s"]
    if figures["retrieval"]:
        lines += [_retrieval_line(kind, block) for kind, block in figures["retrieval"].items() if block]
    if captioning := figures["captioning"]:
        lines.append(
            f"captioning: {_number(captioning['nats_per_token'])} nats/token, "
            f"{_number(captioning['nats_per_token_shuffled'])} with another image"
        )
    if tgmim := figures["tgmim"]:
        lines.append(
            f"TG-MIM: L1 {_number(tgmim['l1'])}, {_number(tgmim['l1_shuffled'])} with another caption, "
            f"{_number(tgmim['l1_median_colour'])} for the image's median colour"
        )
    if selection := figures["selection"]:
        lines.append(
            f"selected patches hold {_number(selection['described_share'])} of what the caption describes, "
            f"{_number(selection['described_share_shuffled'])} by another caption, "
            f"{_number(selection['described_share_random'])} at random"
        )
    if figures.get("grounding") or figures.get("matching"):
        from train.evaluation_regions import region_lines

        lines += region_lines(figures)
    for example in (captioning or {}).get("examples", [])[:_SHOWN]:
        lines += [f"  true:    {example['caption']}", f"  written: {example['written']}"]
    return lines


def _retrieval_line(kind: str, block: dict) -> str:
    def ways(direction: str) -> str:
        return " ".join(f"{k} {value:.3f}" for k, value in block[direction].items())

    chance = block["chance"]["text_to_image"]["r@1"]
    return (
        f"retrieval, {block['images']} images x {block['texts']} {kind if kind == 'captions' else 'first captions'}: "
        f"image to text {ways('image_to_text')} | text to image {ways('text_to_image')} (r@1 by chance {chance:.4f})"
    )


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
