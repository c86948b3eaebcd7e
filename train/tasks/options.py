"""What can be asked of a task, checked without importing torch."""

from dataclasses import dataclass
from typing import Any, Literal

from train.config import Section, require

EVALUATED = (
    "retrieval",
    "captioning",
    "vqa",
    "grounding",
    "nlvr",
    "choice",
    "pairs",
    "zeroshot",
    "probe",
    "classification",
)
FINETUNED = ("retrieval", "captioning", "vqa", "grounding", "nlvr", "classification")
# The objectives of which a model must have been trained with one.
_FUSED = ("itm", "bbox", "mlm")
_NEEDS = {
    "retrieval": ("itc",),
    "zeroshot": ("itc",),
    "captioning": ("ic",),
    # Without captioning answers are classified only, by a head that fine-tuning makes.
    "vqa": ("ic", *_FUSED),
    "choice": ("ic",),
    "grounding": ("bbox", "itm"),
    "nlvr": _FUSED,
}


@dataclass(frozen=True)
class TaskOptions(Section):
    """Options of the tasks; each names the tasks that read it.

    Attributes:
        limit: images that are judged, at most; none judges all.
        batch_size: images of a forward pass at evaluation.
        examples: best, median and worst examples shown in the report, each.
        beams, length_penalty: captioning, vqa by generation; as `sycoca.generate`.
        min_length, max_length: captioning; tokens as `sycoca.generate` counts them.
        meteor, spice: captioning: these figures as well, by Java through pycocoevalcap.
        vqa: how a question is answered; auto takes what the model was fine-tuned for, else rank.
        answers: vqa: frequent answers that the classifier knows.
        ranked: vqa by rank: frequent answers that are compared.
        per_token: choice, pairs: likelihood over the number of tokens.
        classes, templates: zeroshot, classification: the name of a known set, or a file with one a line.
        probe_limit: probe: images that it is fitted to, at most.
        grounding: how a phrase is located; by regression, by the heat of matching (Grad-CAM), by that heat among the
            boxes of a detector, or by regression where the model has learned it.
        rerank: retrieval: the best so many by ITC are ranked anew by matching; none ranks by ITC alone.
        captions: retrieval, captioning: fine-tuning takes so many captions of each image in a step.
        label_smoothing: captioning: of the cross-entropy, 0..1; none is the model's own, 0.1 where X-VLM is taught to
            write.
        prompt: captioning: fine-tuning has captions begin with it, neither counted nor shown; none is the model's own.
        scst: captioning: fine-tuning rewards CIDEr-D of drawn captions instead of cross-entropy.
        samples: captioning with scst: captions drawn for each image.
        temperature: captioning with scst: of the draws.
        baseline: captioning with scst: what a draw's reward is held against, the greedy caption's or the mean of the
            other draws'.
        layer_decay: classification: factor on the learning rate from each layer of the image encoder to the one below.
        named_head: classification: the classifier starts from the names of the classes instead of zeros.
        seed: probe: of its validation part.
    """

    limit: int | None = None
    batch_size: int = 64
    examples: int = 3
    beams: int = 3
    min_length: int = 0
    max_length: int | None = None
    length_penalty: float = 1.0
    meteor: bool = False
    spice: bool = False
    vqa: Literal["auto", "classify", "generate", "rank"] = "auto"
    answers: int = 3129
    ranked: int = 100
    per_token: bool = False
    classes: str | None = None
    templates: str | None = None
    probe_limit: int | None = 10_000
    grounding: Literal["auto", "regress", "heat", "detections"] = "auto"
    rerank: int | None = None
    captions: int = 1
    label_smoothing: float | None = None
    prompt: str | None = None
    scst: bool = False
    samples: int = 5
    temperature: float = 1.0
    baseline: Literal["greedy", "others"] = "others"
    layer_decay: float = 0.75
    named_head: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (
            "limit",
            "batch_size",
            "beams",
            "max_length",
            "answers",
            "ranked",
            "probe_limit",
            "rerank",
            "captions",
            "samples",
        )
        for name in counts:
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}: {value}, needs at least 1")
        for name in ("examples", "min_length"):
            require(getattr(self, name) >= 0, f"{name}: {getattr(self, name)}, needs at least 0")
        bounds = f"min_length: {self.min_length}, max_length is {self.max_length}"
        require(self.max_length is None or self.min_length <= self.max_length, bounds)
        require(0 < self.layer_decay <= 1, f"layer_decay: {self.layer_decay}, needs to be above 0, at most 1")
        smoothing = self.label_smoothing
        require(smoothing is None or 0 <= smoothing < 1, f"label_smoothing: {smoothing}, needs to be in 0..1")
        require(0 < self.temperature < float("inf"), f"temperature: {self.temperature}, needs to be above 0")
        require(self.samples > 1 or self.baseline == "greedy", "samples: 1, baseline=others needs at least 2")


TASKS_OF_OPTIONS = {
    "beams": ("captioning", "vqa"),
    "length_penalty": ("captioning", "vqa"),
    "min_length": ("captioning",),
    "max_length": ("captioning",),
    "meteor": ("captioning",),
    "spice": ("captioning",),
    "vqa": ("vqa",),
    "answers": ("vqa",),
    "ranked": ("vqa",),
    "per_token": ("choice", "pairs"),
    "classes": ("zeroshot", "probe", "classification"),
    "templates": ("zeroshot", "classification"),
    "probe_limit": ("probe",),
    "seed": ("probe",),
    "grounding": ("grounding",),
    "rerank": ("retrieval",),
    "captions": ("retrieval", "captioning"),
    "label_smoothing": ("captioning",),
    "prompt": ("captioning",),
    "scst": ("captioning",),
    "samples": ("captioning",),
    "temperature": ("captioning",),
    "baseline": ("captioning",),
    "layer_decay": ("classification",),
    "named_head": ("classification",),
}
TRAINING_ONLY = frozenset(
    [
        "captions",
        "label_smoothing",
        "prompt",
        "scst",
        "samples",
        "temperature",
        "baseline",
        "layer_decay",
        "named_head",
    ]
)


def check_task(task: str, known: tuple[str, ...], script: str) -> None:
    """Raises ConfigError for a task that is not one of `known`."""
    from sycoca.config import ConfigError, nearest

    if task not in known:
        raise ConfigError(f"{script}: no task '{task}'{nearest(task, known) or '; there are ' + ', '.join(known)}")


def check_objectives(task: str, settings: dict[str, Any], model: object, *, teaches: bool = False) -> None:
    """Raises ConfigError where a model was not trained for what a task asks of it.

    Args:
        task: its name.
        settings: from `model_settings`.
        model: what a refusal names.
        teaches: fine-tuning for captioning begins with a model that can learn it.
    """
    needed = _NEEDS.get(task)
    teachable = needed == ("ic",) and settings["teachable"]
    require(
        needed is None or set(needed) & set(settings["learned"]) or (teaches and teachable and task == "captioning"),
        f"--model {model}: {task} needs a model trained with the objective "
        f"{' or '.join(repr(name) for name in needed or ())}; it has {', '.join(settings['learned'])}"
        + "; train/finetune.py captioning teaches it to write"
        * teachable,
    )


def check_answering(method: str, objectives: tuple[str, ...], model: object) -> None:
    """Raises ConfigError where a model cannot answer questions that way."""
    require(
        method == "classify" or "ic" in objectives,
        f"--model {model}: vqa={method} needs a model trained with the objective 'ic'; it has {', '.join(objectives)}; "
        "train/finetune.py vqa makes it classify answers",
    )


def check_meant(task: str, given: set[str]) -> None:
    """Raises ConfigError for an option that the task does not read."""
    for name in sorted(given):
        tasks = TASKS_OF_OPTIONS.get(name)
        require(tasks is None or task in tasks, f"{name} belongs to {' and '.join(tasks or ())}, not to {task}")
