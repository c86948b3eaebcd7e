"""The parts of a fine-tuning: objective, parameter groups, batches, and the verdicts before and after."""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from sycoca.config import ConfigError, to_dict
from sycoca.generate import opening
from sycoca.model import parameter_groups
from train.data import DataError, LoadedBatch, batches
from train.data.region_batches import region_batches
from train.health import Place
from train.optim import by_layer
from train.param_groups import encoder_depths, layer_of
from train.tasks.class_names import are_numbers, templates
from train.tasks.classification import name_features
from train.tasks.facts import task_facts, vqa_method
from train.tasks.fused_objectives import Locating, Matching, Stating
from train.tasks.heads import AnswerHead, Head, LabelHead, StatementHead, save_task
from train.tasks.judge import judge
from train.tasks.launch import FinetuneConfig, Tuning
from train.tasks.nlvr import statement_batches
from train.tasks.objectives import AnswerChoosing, AnswerWriting, Contrast, Labelling, Objective, Writing
from train.tasks.report import terminal_lines, write_results
from train.tasks.rows import AnswerRows, CaptionRows, LabelRows, ReferenceRows, WrittenRows
from train.tasks.scst import SelfCritical, training_frequencies
from train.tasks.vqa import frequent_answers


class Plan(NamedTuple):
    """What is trained, the loader's rows for it, and the source they come from; `names` are those of the classifier."""

    objective: Objective
    rows: Any
    source: Any
    names: tuple[str, ...]


class AllCaptions:
    """A caption source whose pairs hold all captions of the image, as JSON, the one chosen first.

    Whatever else it knows is the source's.
    """

    def __init__(self, source: Any) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._source, name)

    def pair(self, index: int, pick: int) -> tuple[Any, str, str]:
        image, captions, key = self._source.captioned(index)
        first = pick % len(captions)
        return image, json.dumps(captions[first:] + captions[:first]), key


def build_objective(tuning: Tuning, model: Any, tokenizer: Any, device: Any) -> Plan:
    """What is trained; the same on every rank.

    Raises:
        DataError: the training questions have no answer to classify.
    """
    config, source = tuning.config, tuning.train
    options = config.options
    if config.task == "retrieval" and model.config.learns("itm"):
        return Plan(Matching(model), CaptionRows(tokenizer, 1), AllCaptions(source), ())
    if config.task == "retrieval":
        return Plan(Contrast(model), CaptionRows(tokenizer, options.captions), AllCaptions(source), ())
    if config.task == "captioning" and not options.scst:
        rows = CaptionRows(tokenizer.ended(), options.captions, model.config.text.prompt)
        return Plan(Writing(model, len(opening(model, tokenizer))), rows, AllCaptions(source), ())
    if config.task == "captioning":
        scorer = training_frequencies(source)
        drawn = SelfCritical(
            model,
            tokenizer,
            scorer,
            samples=options.samples,
            temperature=options.temperature,
            baseline=options.baseline,
        )
        return Plan(drawn, ReferenceRows(), AllCaptions(source), ())
    if config.task == "vqa" and options.vqa == "generate":
        return Plan(AnswerWriting(model), WrittenRows(tokenizer), source, ())
    if config.task == "vqa":
        names = frequent_answers(source, options.answers)
        if not names:
            raise DataError(f"data.train={config.data.train}: no question has an answer")
        head = AnswerHead(model.config.text.width, len(names)).to(device)
        return Plan(AnswerChoosing(model, head), AnswerRows(tokenizer, names), source, names)
    if config.task == "grounding":
        return Plan(Locating(model), tokenizer, source, ())
    if config.task == "nlvr":
        head = StatementHead(model.config.text.width).to(device)
        return Plan(Stating(model, head), tokenizer, source, ("false", "true"))
    scale, weight = model.logit_scale().item(), None
    if options.named_head and model.config.learns("itc") and not _unnamed(config, source):
        sentences = templates(options.templates, source.classes)
        weight = name_features(
            model, tokenizer, source.classes, sentences, batch_size=options.batch_size, device=device
        )
    head = LabelHead(model.config.embed_dim, len(source.classes), scale, weight).to(device)
    return Plan(Labelling(model, head), LabelRows(), source, source.classes)


def _unnamed(config: FinetuneConfig, source: Any) -> bool:
    """Whether the classes of labelled images are numbers that nobody asked to be taken for names."""
    return config.options.classes is None and are_numbers(source.classes)


def training_groups(objective: Objective, config: FinetuneConfig) -> list[dict]:
    """Parameter groups; for classification those of the image side alone, slower layer by layer towards the pixels.

    A block's rate is the peak's times `layer_decay` to the power of its distance from the classifier; what the
    objective does not train needs no gradient.
    """
    grouped = parameter_groups(objective.model, config.optimizer.weight_decay)
    if objective.head is not None:
        plain = [p for p in objective.head.parameters() if p.ndim < 2]
        grouped[0]["params"] += [p for p in objective.head.parameters() if p.ndim >= 2]
        grouped[1]["params"] += plain
    if config.task != "classification":
        return [group for group in grouped if group["params"]]
    depths = encoder_depths(objective.model.config, "vision")
    layers = {id(p): _layer(name, depths) for name, p in objective.named_parameters()}
    layers = {key: place for key, place in layers.items() if place is not None}
    split = by_layer(grouped, layers, sum(depths), config.options.layer_decay)
    trained = {id(p) for group in split for p in group["params"]}
    for parameter in objective.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return split


def _layer(name: str, depths: tuple[int, ...]) -> int | None:
    """Distance of a parameter from the pixels, from 0 on; None where a classifier does not depend on it."""
    if name.startswith("model.vision."):
        return layer_of(name.removeprefix("model.vision."), depths)
    return sum(depths) + 1 if name.startswith(("head.", "model.image_projection")) else None


def tuning_batches(tuning: Tuning, plan: Plan, first: int, *, rank: int, world: int, device: Any) -> Iterator[tuple]:
    """What an objective's `inputs` take but for the seed, and where it stands, from global batch number `first` on.

    Images, rows and ids; for grounding the fields of a region batch, for nlvr those of a batch of statements.
    """
    config, model = tuning.config, plan.objective.model.config
    global_batch = config.train.micro_batch * world
    form = {
        "image_size": model.vision.image_size,
        "context_length": model.text.context_length,
        "seed": config.train.seed,
        "rank": rank,
        "world": world,
        "workers": config.data.workers,
    }
    if config.task == "grounding":
        # Phrases may say where a thing stands among others, so that their images are seen whole.
        how = {"elements": global_batch, "grid": model.vision.grid, "whole_share": 0.0, "crop": False, "start": first}
        loader = region_batches(plan.source, plan.rows, **how, **form)
    elif config.task == "nlvr":
        loader = statement_batches(plan.source, plan.rows, global_batch=global_batch, first=first, **form)
    else:
        epoch, start = divmod(first, len(plan.source) // global_batch)
        how = {"global_batch": global_batch, "epoch": epoch, "start": start, "crop_scale": config.data.crop_scale}
        loader = batches(plan.source, plan.rows, **how, **form)
    loader.skipped = tuning.train.skipped
    with closing(loader):
        for loaded in loader:
            place = Place(loaded.epoch, loaded.index, loaded.keys)
            if not isinstance(loaded, LoadedBatch):
                fields = loaded.regions if config.task == "grounding" else loaded
                yield tuple(part.to(device, non_blocking=True) for part in fields if isinstance(part, Tensor)), place
                continue
            distinct = plan.source.fresh and not plan.source.repeats
            ids = None if distinct else loaded.ids.to(device, non_blocking=True)
            images, tokens = (part.to(device, non_blocking=True) for part in (loaded.images, loaded.tokens))
            yield (images, tokens, ids), place


def judge_untuned(tuning: Tuning, model: Any, tokenizer: Any, device: Any) -> None:
    """Writes what the model reaches as it is: zero-shot, or as an earlier fine-tuning left it."""
    config = tuning.config
    facts = task_facts(Path(config.model))
    task = "zeroshot" if config.task == "classification" else config.task
    if task == "nlvr" or (task == "zeroshot" and not model.config.learns("itc")):
        return
    if task == "zeroshot" and _unnamed(config, tuning.val):
        return
    if task == "vqa" and not model.config.writes:
        return
    method = vqa_method("auto", facts)
    how: dict[str, Any] = {"method": "rank" if method == "classify" else method}
    if task == "vqa":
        how["train"] = tuning.train
    try:
        found = judge(task, model, tokenizer, tuning.val, options=config.options, device=device, **how)
    except ValueError as error:
        raise DataError(str(error)) from None
    _write(tuning, "before", found, {})


def judge_tuned(tuning: Tuning, plan: Plan, tokenizer: Any, device: Any, *, step: int) -> None:
    """Leaves the tuned model in the run's folder, judges it, and shows it beside what it was."""
    from train.export import consolidated
    from train.tasks.start import starting_model

    config, folder = tuning.config, tuning.run_dir / "model"
    state = consolidated(tuning.run_dir / "checkpoints" / f"step_{step:08d}")
    model, _ = starting_model(config, "cpu")
    head = _load(model, plan, state)
    model.save_pretrained(folder, tokenizer=tokenizer)
    method = config.options.vqa if config.task == "vqa" else ""
    save_task(folder, config.task, {"method": method, "from": config.model}, head)
    try:
        found = judge(
            config.task,
            model.to(device).eval(),
            tokenizer,
            tuning.val,
            options=config.options,
            device=device,
            head=head,
            method=method,
            train=tuning.train,
        )
    except ValueError as error:
        # The training is done and saved; a held-out part that cannot be read must not look like its failure.
        print(f"the tuned model is in {folder}; not judged: {error}", flush=True)
        return
    before = tuning.run_dir / "before.json"
    earlier = json.loads(before.read_text(encoding="utf-8"))["headline"] if before.is_file() else {}
    _write(tuning, "after", found, earlier)
    if found.skipped:
        print(found.skipped.line())
    was = found.outcome._replace(headline=earlier)
    print("\n".join(terminal_lines(found.outcome, was, ("before", "after"))))
    print(f"left in {tuning.run_dir}: {', '.join(sorted(p.name for p in tuning.run_dir.iterdir()))}", flush=True)


def _load(model: nn.Module, plan: Plan, state: dict[str, Tensor]) -> Head | None:
    """Puts the trained parameters into a fresh model and into the classifier."""
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "head": {}}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    missing, unexpected = model.load_state_dict(parts["model"], strict=False)
    if unexpected or set(missing) & {name for name, _ in model.named_parameters()}:
        raise ConfigError(f"the checkpoint lacks {', '.join(missing[:3])} or has {', '.join(unexpected[:3])}")
    if plan.objective.head is None:
        return None
    head: Callable | nn.Module = plan.objective.head
    if isinstance(head, LabelHead):
        module: nn.Module = LabelHead(model.config.embed_dim, len(plan.names), float(head.scale))
    elif isinstance(head, StatementHead):
        module = StatementHead(model.config.text.width)
    else:
        module = AnswerHead(model.config.text.width, len(plan.names))
    module.load_state_dict({**module.state_dict(), **parts["head"]})
    return Head(module.eval().to(head.linear.weight.device), plan.names)


def _write(tuning: Tuning, name: str, found: Any, before: dict[str, float]) -> None:
    config = tuning.config
    facts = {
        "model": config.model,
        "data": config.data.val or config.data.train,
        "headline": found.outcome.headline,
        "before": before,
        "options": to_dict(config.options),
        "left_out": found.skipped.counts(),
        "seconds": round(found.seconds, 3),
    }
    write_results(tuning.run_dir, name, found.outcome, facts, tuning.val, config.options.examples)
