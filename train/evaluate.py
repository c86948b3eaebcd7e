"""Evaluation of a model on a task.

python train/evaluate.py retrieval --model runs/tiny --data scenes
"""

import argparse
import hashlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from sycoca.config import ConfigError, to_dict
from train.command_line import Parser, apply_overrides, split_overrides
from train.hardware import has_cuda
from train.run_folder import check_writable
from train.tasks.class_names import are_numbers, class_names, templates
from train.tasks.facts import model_folder, model_settings, task_facts, vqa_method
from train.tasks.options import (
    EVALUATED,
    TRAINING_ONLY,
    TaskOptions,
    check_answering,
    check_meant,
    check_objectives,
    check_task,
)
from train.tasks.sources import holds_out, open_source


@dataclass(frozen=True)
class Evaluation:
    """What the command line asks for, checked, its sources open."""

    task: str
    model: Path
    data: str
    split: str
    out: Path
    options: TaskOptions
    facts: dict[str, Any]
    source: Any
    train: Any


def parse(argv: list[str]) -> Evaluation:
    """Reads the command line and opens what it names, without importing torch.

    Raises:
        ConfigError, DataError: one line.
    """
    p = Parser(
        prog="evaluate.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Judges a model on a task; leaves a JSON file and an HTML page with examples.",
        epilog="examples:\n"
        "  python train/evaluate.py retrieval --model runs/tiny --data flickr8k/captions.tsv\n"
        "  python train/evaluate.py captioning --data 'nocaps:nocaps_val.json?images=val' beams=5 meteor=true\n"
        "  python train/evaluate.py retrieval --model runs/xvlm_tiny rerank=32\n"
        "  python train/evaluate.py grounding --data refcoco_plus/testA.jsonl --split all\n"
        "  python train/evaluate.py vqa --data 'vqav2:questions.json?annotations=answers.json&images=val2014' \\\n"
        "    --train 'vqav2:train_questions.json?annotations=train_answers.json&images=train2014'\n"
        "  python train/evaluate.py zeroshot --data cifar10/test.tar classes=cifar10\n"
        "  python train/evaluate.py probe --train cifar10/train.tar --data cifar10/test.tar\n",
    )
    p.add_argument("task", help=f"one of {', '.join(EVALUATED)}")
    p.add_argument("--model", help="folder of a model or of a run; the newest run without it")
    p.add_argument("--data", default="scenes", help="what is judged on, as the task's own sources are written")
    p.add_argument("--split", default="val", help="train, val, test, or all of a table")
    p.add_argument("--train", help="what a probe is fitted to, or vqa ranks the answers of; scenes have their own")
    p.add_argument("--out", type=Path, help="folder of the results; the model's own without it")
    p.add_argument("options", nargs="*", metavar="key=value", help="options of the task, such as limit=500 or beams=5")
    args = p.parse_intermixed_args(argv)
    check_task(args.task, EVALUATED, "evaluate.py")
    overrides = split_overrides(args.options, TaskOptions())
    for name in sorted(TRAINING_ONLY & set(overrides)):
        raise ConfigError(f"{name} belongs to train/finetune.py")
    check_meant(args.task, set(overrides))
    options = apply_overrides(TaskOptions(), overrides)
    if args.train is not None and args.task not in ("probe", "vqa"):
        raise ConfigError(f"--train belongs to probe and vqa, not to {args.task}")
    folder = model_folder(args.model)
    facts, settings = task_facts(folder), model_settings(folder)
    check_objectives(args.task, settings, folder)
    if args.task in ("classification", "nlvr") and facts.get("task") != args.task:
        raise ConfigError(f"--model {folder}: no classifier; make one with train/finetune.py {args.task}")
    if options.meteor or options.spice:
        from train.tasks.coco_java import require_java

        require_java(spice=options.spice)
    classes = tuple(facts["names"]) if args.task == "classification" else class_names(options.classes)
    size = settings["image_size"]
    if options.templates is not None:
        templates(options.templates, classes or ())
    source = open_source(args.task, args.data, args.split, image_size=size, classes=classes)
    if args.task == "zeroshot" and options.classes is None and are_numbers(source.classes):
        raise ConfigError(f"--data {args.data}: its classes are numbers; give classes=NAME_OR_FILE")
    train = None
    if args.task == "probe":
        if args.train is None and not holds_out("probe", args.data):
            raise ConfigError(f"--data {args.data}: probe needs --train as well, the images that it is fitted to")
        train = open_source("probe", args.train or args.data, "train", image_size=size, classes=source.classes)
    elif args.task == "vqa" and vqa_method(options.vqa, facts) == "rank":
        if args.train is None and args.data.partition("?")[0] != "scenes":
            raise ConfigError(
                f"--data {args.data}: vqa=rank needs --train as well, questions with the answers that are ranked; "
                "vqa=generate needs none"
            )
        train = open_source("vqa", args.train or args.data, "train", image_size=size)
    elif args.task == "vqa" and args.train is not None:
        raise ConfigError("--train: of vqa=rank; classify and generate have no candidates")
    out = args.out or folder
    check_writable(out, "--out" if args.out else "--model")
    return Evaluation(args.task, folder, args.data, args.split, out, options, facts, source, train)


def evaluate(asked: Evaluation) -> None:
    """Judges the model and leaves the results in the folder asked for."""
    import torch

    from sycoca.hub import load_pretrained
    from train.tasks.heads import load_head
    from train.tasks.judge import judge
    from train.tasks.report import terminal_lines, write_results

    device = torch.device("cuda" if has_cuda() else "cpu")
    model, tokenizer, config = load_pretrained(asked.model, device=device)
    method = vqa_method(asked.options.vqa, asked.facts) if asked.task == "vqa" else ""
    if asked.task == "vqa":
        check_answering(method, model_settings(asked.model)["learned"], asked.model)
    classifies = asked.task in ("classification", "nlvr") or method == "classify"
    head = load_head(asked.facts, config) if classifies else None
    if head is not None:
        head.module.to(device)
    print(f"{asked.task}: {asked.model} on {asked.data}, {len(asked.source)} images", flush=True)
    found = judge(
        asked.task,
        model,
        tokenizer,
        asked.source,
        options=asked.options,
        device=device,
        head=head,
        method=method,
        train=asked.train,
    )
    facts = {
        "model": str(asked.model),
        "data": asked.data,
        "split": asked.split,
        "options": to_dict(asked.options),
        "left_out": found.skipped.counts(),
        "seconds": round(found.seconds, 3),
    }
    name = file_name(asked.task, asked.data, asked.split)
    write_results(asked.out, name, found.outcome, facts, asked.source, asked.options.examples)
    if found.skipped:
        print(found.skipped.line())
    print("\n".join(terminal_lines(found.outcome)))
    if origin := found.outcome.figures.get("candidates from"):
        print(f"candidates from {origin}")
    print(f"left in {asked.out}: {name}.json, {name}.html ({found.seconds:.1f} s)", flush=True)


def file_name(task: str, data: str, split: str) -> str:
    """Stem of the files of an evaluation: the end of the path, and a digest where the data's name says more."""
    path, options, _ = data.partition("?")
    *rest, folder, name = ["", "", *re.sub(r"\.\w+$", "", path.rstrip("/")).split("/")]
    digest = [hashlib.sha256(data.encode()).hexdigest()[:6]] if options or any(rest) else []
    return "-".join([task, *re.findall(r"[A-Za-z0-9]+", f"{folder} {name}"), *digest, split])


def main() -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        evaluate(parse(sys.argv[1:]))
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
