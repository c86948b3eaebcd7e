"""What X-VLM finds on held-out images: the boxes of phrases, and which texts match which images and boxes.

Acc@0.5: share of the phrases whose box is found with an intersection over union of at least one half. Beside it three
predictors that do not know the phrase: one box for all images, the best of training boxes on training boxes; the
model's own answer to another phrase of the same image, one that speaks of another box; and the box of each image that
most of its phrases have, which no predictor of one box per image can beat.
ITM: share of right verdicts, matching and not matching pairs weighed alike, the latter drawn by the model itself among
`_GROUP` images or boxes, hard ones: with the floor of the sampler, whatever that of training.

Boxes are judged in the whole picture as a square, proportions not kept, as region batches show it: a crop would cut
away what some phrases describe. Whole images and their captions are judged in the crop that retrieval takes.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import sample_hard_negatives
from sycoca.images import eval_transform, normalise
from sycoca.locate import whole_image
from sycoca.masking import hash_tensor
from sycoca.regions import cells, from_corners, iou
from sycoca.xvlm import Views
from train.data.region_batches import region_kind, text_id
from train.data.regions import asked_of
from train.data.sample import Sample, readable
from train.evaluation_pairs import HeldOut
from train.grounding import same_boxes

_GROUP = 64
_HIT = 0.5
# Training images whose boxes the fixed box is fitted on.
_FITTED = 256


class _Counts:
    """Sums by name, over this rank."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def total(self, held_out: HeldOut) -> dict[str, float]:
        """The sums over all ranks, which add under the same names."""
        names = sorted(_NAMES)
        return dict(zip(names, held_out.sum([self._sums.get(name, 0.0) for name in names])))


_KINDS = ("image", "box")
_NAMES = (
    *("phrases", "hits", "fixed", "iou", "several", "other", "best"),
    *(f"{kind}_{what}" for kind in _KINDS for what in ("same", "same_right", "differs", "differs_right")),
)


@torch.no_grad()
def judge(model: Any, tokenizer: Any, held_out: HeldOut, train: Any = None) -> dict[str, dict | None]:
    """Figures of the objectives `bbox` and `itm`.

    Args:
        model: X-VLM in eval mode, not wrapped.
        tokenizer: the one the model was trained with.
        held_out: the pairs to judge on; all ranks of its group call this.
        train: source of the boxes that the fixed box is fitted on; None for none.

    Returns:
        Plain data: `grounding` with `phrases`, `acc@0.5`, `mean_iou`, and `fixed_box`, `other_phrase`, `best_box` as
        above; `matching` with the balanced accuracies over `images` and `boxes`. None where the model does not learn
        it or the data have no boxes.
    """
    config, counts = model.config, _Counts()
    fixed = _fixed_box(train) if train is not None and config.learns("bbox") else None
    for indices in held_out.rows(_GROUP):
        samples = [sample for index in indices if (sample := held_out.read(index)) is not None]
        if samples:
            _judge(model, tokenizer, held_out, samples, fixed, counts)
    sums = counts.total(held_out)
    return {"grounding": _grounding(sums, fixed), "matching": _matching(sums)}


class Phrase(NamedTuple):
    """A phrase, what it says, and where its box lies: (x0, y0, x1, y1) in 0..1 of the whole picture."""

    text: str
    kind: str
    box: tuple[float, float, float, float]


def phrases_of(sample: Sample) -> list[Phrase]:
    """The phrases of a sample's usable boxes."""
    return [
        Phrase(text, region_kind(region, text), tuple(min(1.0, max(0.0, side)) for side in region.box))
        for text, region in asked_of(sample.regions)
    ]


def _judge(
    model: Any, tokenizer: Any, held_out: HeldOut, samples: list[Sample], fixed: Tensor | None, counts: _Counts
) -> None:
    if model.config.learns("itm"):
        _judge_images(model, tokenizer, samples, held_out.device, counts)
    found = [(row, phrase) for row, sample in enumerate(samples) for phrase in phrases_of(sample)]
    if not found:
        return
    size = model.config.vision.image_size
    pictures = [torch.from_numpy(whole_image(sample.image, size)) for sample in samples]
    images = normalise(torch.stack(pictures)).to(held_out.device)
    _judge_boxes(model, tokenizer, images, [row for row, _ in found], [phrase for _, phrase in found], fixed, counts)


def _judge_images(model: Any, tokenizer: Any, samples: list[Sample], device: torch.device, counts: _Counts) -> None:
    """ITM of whole images and their first captions."""
    size = model.config.vision.image_size
    image = model.encode_image(torch.stack([eval_transform(sample.image, size) for sample in samples]).to(device))
    captions = [sample.captions[0] for sample in samples]
    text = _encoded(model, tokenizer, captions, device)
    _count_matches(model, image.features, model.view_images(image), text, captions, "image", counts)


def _judge_boxes(
    model: Any,
    tokenizer: Any,
    images: Tensor,
    rows: list[int],
    phrases: list[Phrase],
    fixed: Tensor | None,
    counts: _Counts,
) -> None:
    """Box regression and ITM of phrases, each of the image of its row."""
    config, device = model.config, images.device
    owner = torch.tensor(rows, device=device)
    boxes = from_corners(torch.tensor([phrase.box for phrase in phrases], dtype=torch.float32)).to(device)
    if config.learns("bbox"):
        views = model.view_images(model.encode_image(images))
        text = _encoded(model, tokenizer, [phrase.text for phrase in phrases], device)
        located = model.locate(text, Views(views.tables, views.seen.of(owner)))
        _count_boxes(located, boxes, owner, fixed, counts)
    if config.learns("itm"):
        rects = cells(boxes, config.vision.grid)
        for start in range(0, len(phrases), _GROUP):
            part = slice(start, start + _GROUP)
            # The images of a part, no others.
            shown, own = owner[part].unique(return_inverse=True)
            seen = model.encode_regions(images[shown], rects[part], own)
            text = _encoded(model, tokenizer, [phrase.text for phrase in phrases[part]], device)
            kinds = [phrase.kind for phrase in phrases[part]]
            _count_matches(model, seen.features, seen.boxes, text, kinds, "box", counts)


def _encoded(model: Any, tokenizer: Any, texts: list[str], device: torch.device) -> Any:
    return model.encode_text(tokenizer.encode(texts, model.config.text.context_length).to(device))


def _count_boxes(located: Tensor, boxes: Tensor, owner: Tensor, fixed: Tensor | None, counts: _Counts) -> None:
    overlap = iou(located, boxes)
    counts.add("phrases", len(boxes))
    counts.add("iou", overlap.sum())
    counts.add("hits", (overlap >= _HIT).sum())
    if fixed is not None:
        counts.add("fixed", (iou(fixed.to(boxes.device).expand_as(boxes), boxes) >= _HIT).sum())
    for row in owner.unique().tolist():
        mine, answers = boxes[owner == row], located[owner == row]
        agree = iou(mine[:, None], mine[None]) >= _HIT
        counts.add("best", agree.sum(0).max())
        asked, other = _others(mine)
        counts.add("several", len(asked))
        counts.add("other", (iou(answers[other], mine[asked]) >= _HIT).sum())


def _others(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The phrases of an image (M,) for which there is one of another box, and the nearest such before each, cyclically.

    Args:
        boxes: (E, 4), those of the phrases.
    """
    number = torch.arange(len(boxes), device=boxes.device)
    back = (number[:, None] - number).remainder(len(boxes)).masked_fill(same_boxes(boxes), len(boxes))
    least, other = back.min(1)
    asked = least < len(boxes)
    return number[asked], other[asked]


def _count_matches(
    model: Any, features: Tensor, views: Any, text: Any, kinds: list[str], name: str, counts: _Counts
) -> None:
    ids = torch.tensor([text_id(kind) for kind in kinds], device=features.device)
    seed = hash_tensor(ids[:1])
    other_image, other_text = sample_hard_negatives(features, text.features, model.logit_scale(), ids=ids, seed=seed)
    own = torch.arange(len(ids), device=ids.device)
    for said, shown, same in ((own, own, True), (own, other_image, False), (other_text, own, False)):
        drawn = (said >= 0) & (shown >= 0)
        said, shown = said[drawn], shown[drawn]
        if not len(said):
            continue
        logits = model.match(type(text)(*(part[said] for part in text)), Views(views.tables, views.seen.of(shown)))
        side = f"{name}_{'same' if same else 'differs'}"
        counts.add(side, len(said))
        counts.add(f"{side}_right", ((logits[:, 1] > logits[:, 0]) == same).sum())


@lru_cache(maxsize=1)
def _fixed_box(train: Any) -> Tensor | None:
    """The training box (4,) that most boxes of the first training images overlap by half."""
    samples = (sample for _, sample in readable(train, range(min(_FITTED, len(train)))))
    found = [phrase.box for sample in samples for phrase in phrases_of(sample)]
    if not found:
        return None
    boxes = from_corners(torch.tensor(found, dtype=torch.float32))
    hits = [(iou(box.expand_as(boxes), boxes) >= _HIT).sum() for box in boxes]
    return boxes[int(torch.stack(hits).argmax())]


def _grounding(sums: dict[str, float], fixed: Tensor | None) -> dict | None:
    if not (count := sums["phrases"]):
        return None
    return {
        "phrases": int(count),
        "acc@0.5": sums["hits"] / count,
        "mean_iou": sums["iou"] / count,
        "fixed_box": None if fixed is None else sums["fixed"] / count,
        "other_phrase": sums["other"] / sums["several"] if sums["several"] else None,
        "best_box": sums["best"] / count,
    }


def _matching(sums: dict[str, float]) -> dict | None:
    found = {}
    for kind, name in zip(_KINDS, ("images", "boxes")):
        sides = [(sums[f"{kind}_{side}"], sums[f"{kind}_{side}_right"]) for side in ("same", "differs")]
        found[name] = sum(right / count for count, right in sides) / 2 if all(count for count, _ in sides) else None
    return found if any(value is not None for value in found.values()) else None


def region_lines(figures: dict) -> list[str]:
    """What `judge` found, for a terminal."""
    lines = []
    if grounding := figures.get("grounding"):
        others = (
            ("fixed_box", "one fixed box"),
            ("other_phrase", "another phrase"),
            ("best_box", "an image's best box"),
        )
        told = [f"{grounding[key]:.3f} for {words}" for key, words in others if grounding[key] is not None]
        lines.append(
            f"grounding, {grounding['phrases']} phrases: Acc@0.5 {grounding['acc@0.5']:.3f}, {', '.join(told)}; "
            f"mean IoU {grounding['mean_iou']:.3f}"
        )
    if matching := figures.get("matching"):
        told = [f"{value:.3f} over {name}" for name, value in matching.items() if value is not None]
        lines.append(f"matching (ITM), hard negatives: balanced accuracy {', '.join(told)}")
    return lines
