"""All tasks on the built-in scenes, as whole commands: fine-tuning improves on what pre-training left.

It starts in the middle of pre-training, whose end leaves little that a few seconds could add (train/log.md).
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from statistics import fmean
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.run
# Seconds of both cores that all tasks together may take.
BAR_S = 90
LEFT = ("before.json", "after.json", "after.html", "config.json", "metrics.jsonl", "model/model.safetensors")


class Bar(NamedTuple):
    """Figures, and how much better their mean has to be after fine-tuning: half of what was measured, or less."""

    figures: tuple[str, ...]
    gain: float


TUNED = {
    "retrieval limit=1000": Bar(("mTR", "mIR"), 0.008),
    "captioning scst=true train.steps=50": Bar(("CIDEr-D",), 0.08),
    "vqa": Bar(("accuracy",), 0.2),
    "classification": Bar(("top-1",), 0.12),
}


def folder_of(command: str) -> str:
    return "tuned-" + command.split()[0]


def processor_s() -> float:
    """Seconds that two cores would take for what the commands have computed so far, whatever else runs beside them."""
    times = os.times()
    return (times.children_user + times.children_system) / 2


class Tasks(NamedTuple):
    """What the commands left behind, and the seconds of two cores that they took."""

    done: dict
    again: object
    seconds: float


@pytest.fixture(scope="module")
def tasks(command, checkout, half_trained) -> Tasks:
    """Every fine-tuning, two at a time on a core each, and a tuned classifier judged again."""
    cores: Queue = Queue()
    for core in sorted(os.sched_getaffinity(0))[:2]:
        cores.put(core)

    def on_a_core(line: str):
        core = cores.get()
        try:
            return command(f"taskset -c {core} {line}")
        finally:
            cores.put(core)

    def run(task: str):
        # As the README shows it; without the launcher a single process needs less time to start.
        launcher = "deepspeed" if task.startswith("retrieval") else "python"
        line = f"{launcher} train/finetune.py {task} --config ds_zero2.json --model {half_trained}"
        return on_a_core(f"{line} --run-dir runs/{folder_of(task)}")

    started = processor_s()
    with ThreadPoolExecutor(cores.qsize()) as pool:
        done = dict(zip(TUNED, pool.map(run, TUNED), strict=True))
    again = on_a_core(f"python train/evaluate.py classification --model runs/{folder_of('classification')} limit=500")
    return Tasks(done, again, processor_s() - started)


@pytest.mark.parametrize("task", TUNED)
def test_fine_tuning_improves(task, tasks, checkout):
    done, folder = tasks.done[task], checkout / "runs" / folder_of(task)
    assert done.code == 0, done.err[-3000:]
    assert "Traceback" not in done.err
    print(done.out[-1500:])
    for name in LEFT:
        assert (folder / name).stat().st_size > 0, name
    figures, gain = TUNED[task]
    before, after = (
        fmean(json.loads((folder / f"{name}.json").read_text())["headline"][figure] for figure in figures)
        for name in ("before", "after")
    )
    assert after >= before + gain
    page = (folder / "after.html").read_text()
    assert all(f"<h2>{kind}</h2>" in page for kind in ("best", "median", "worst"))


def test_a_tuned_classifier_is_judged_again(tasks, checkout):
    assert tasks.again.code == 0, tasks.again.err[-3000:]
    tuned = checkout / "runs" / folder_of("classification")
    again, after = (json.loads((tuned / f"{name}.json").read_text()) for name in ("classification-scenes-val", "after"))
    assert again["results"]["per class"] == after["results"]["per class"]


def test_all_of_it_stays_within_its_time(tasks):
    print(f"{tasks.seconds:.1f} s of two cores")
    assert tasks.seconds <= BAR_S
