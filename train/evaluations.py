"""Held-out figures while a run trains: one JSON line every `train.evaluate_every` steps, and what a step costs.

    evaluations.jsonl    {"step", "step_cpu_s", and what `train.evaluation_run.evaluate` finds}

The cost is the processor time of rank 0 between batches, data included and evaluation left out, which other work on
the machine changes less than the clock on the wall.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.evaluation_run import evaluate
from train.metrics import truncate_after

NAME = "evaluations.jsonl"
# The first steps of a process import, allocate and fill caches.
_UNCOUNTED_STEPS = 3


class Evaluations:
    """Judges the model from time to time. All ranks make one and call it alike.

    Args:
        run_dir: the run's folder.
        every: steps between two evaluations; None for none.
        first_step: where this process starts; later rows of an earlier one are dropped.
        total_steps: of the run, whose end is judged elsewhere.
        writes: whether this rank writes.
        **how: arguments of `evaluate` by name.
    """

    def __init__(
        self, run_dir: Path, every: int | None, *, first_step: int, total_steps: int, writes: bool, **how: Any
    ) -> None:
        self._rows, self._every, self._total, self._writes, self._how = run_dir / NAME, every, total_steps, writes, how
        self._taken, self._begun_s = 0, 0.0
        if writes:
            truncate_after(self._rows, first_step)

    def after(self, step: int, model: Callable[[], Any], say: Callable[[str], None]) -> None:
        """Takes note of a finished step, `step` of them in all, and judges the model if it is time.

        Args:
            step: finished steps of the run.
            model: gives the whole model.
            say: takes a line for people.
        """
        self._taken += 1
        if self._taken == _UNCOUNTED_STEPS:
            self._begun_s = time.process_time()
        if self._every is None or step % self._every or step == self._total:
            return
        stopped_s, counted = time.process_time(), self._taken - _UNCOUNTED_STEPS
        cost = (stopped_s - self._begun_s) / counted if counted > 0 else None
        judged = model()
        was_training = judged.training
        try:
            figures = evaluate(judged.eval(), examples=0, **self._how)
        except ValueError as error:
            say(f"no held-out figures: {error}")
            return
        finally:
            judged.train(was_training)
        self._begun_s += time.process_time() - stopped_s
        if self._writes:
            with self._rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "step_cpu_s": cost, **figures}) + "\n")
        say(line(step, figures))


def line(step: int, figures: dict) -> str:
    """What was found after so many steps, in one line."""
    parts = []
    if figures["retrieval"]:
        pairs = figures["retrieval"]["pairs"]
        ways = " / ".join(f"{pairs[way]['r@1']:.3f}" for way in ("image_to_text", "text_to_image"))
        parts.append(f"r@1 {ways} of {pairs['images']}")
    for group, name, unit in (
        ("captioning", "nats_per_token", "nats/token"),
        ("tgmim", "l1", "TG-MIM L1"),
        ("selection", "described_share", "of the described area selected"),
        ("grounding", "acc@0.5", "Acc@0.5"),
        ("matching", "images", "ITM of images"),
        ("matching", "boxes", "ITM of boxes"),
    ):
        if figures.get(group) and figures[group][name] is not None:
            parts.append(f"{figures[group][name]:.3f} {unit}")
    return f"held out after step {step}: {', '.join(parts)}"
