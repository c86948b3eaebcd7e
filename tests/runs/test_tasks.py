"""All tasks on the built-in scenes, as whole commands: fine-tuning improves on what pre-training left."""

import json
import os

import pytest

pytestmark = pytest.mark.run
# Seconds of both cores that all tasks together may take.
BAR_S = 90
LEFT = ("before.json", "after.json", "after.html", "config.json", "metrics.jsonl", "model/model.safetensors")
# Pre-training has settled cross-entropy on scenes; what is left to gain is the metric itself.
MORE = {"captioning": "scst=true train.steps=30 limit=256 --data 'scenes?count=2000&fresh=false'"}
JUDGED = {
    "retrieval": ("mTR", "mIR"),
    "captioning": ("CIDEr-D",),
    "vqa": ("accuracy",),
    "classification": ("top-1", "top-5"),
}


def processor_s() -> float:
    """Seconds that two cores would take for what the commands have computed so far, whatever else runs beside them."""
    times = os.times()
    return (times.children_user + times.children_system) / 2


@pytest.fixture(scope="module")
def spent():
    return []


@pytest.fixture(scope="module")
def tune(command, checkout, pretrained, spent):
    def run(task: str, *more: str) -> tuple:
        started = processor_s()
        folder = checkout / "runs" / f"tuned-{task}"
        # As the README shows it; without the launcher a single process needs less time to start.
        launcher = "deepspeed" if task == "retrieval" else "python"
        done = command(
            f"{launcher} train/finetune.py {task} --config ds_zero2.json --model {pretrained} --run-dir {folder} "
            + " ".join(more)
        )
        spent.append(processor_s() - started)
        assert done.code == 0, done.err[-3000:]
        return folder, done

    return run


@pytest.mark.parametrize("task", JUDGED)
def test_fine_tuning_improves(task, tune):
    folder, done = tune(task, MORE.get(task, ""))
    for name in LEFT:
        assert (folder / name).stat().st_size > 0, name
    before, after = (json.loads((folder / f"{name}.json").read_text())["headline"] for name in ("before", "after"))
    print(done.out[-1500:])
    assert sum(after[name] for name in JUDGED[task]) > sum(before[name] for name in JUDGED[task])
    assert "Traceback" not in done.err and "best" in (folder / "after.html").read_text()


def test_zero_shot_and_a_tuned_classifier_are_judged_again(command, checkout, pretrained, spent):
    started = processor_s()
    done = command(f"python train/evaluate.py zeroshot --model {pretrained} --out {checkout}/runs/judged limit=500")
    assert done.code == 0, done.err[-3000:]
    found = json.loads((checkout / "runs" / "judged" / "zeroshot-scenes-val.json").read_text())
    tuned = checkout / "runs" / "tuned-classification"
    done = command(f"python train/evaluate.py classification --model {tuned} limit=500")
    spent.append(processor_s() - started)
    assert done.code == 0, done.err[-3000:]
    again = json.loads((tuned / "classification-scenes-val.json").read_text())["results"]
    before = json.loads((tuned / "after.json").read_text())["results"]
    assert again["top-1"] == before["top-1"] > found["results"]["top-1"]


def test_all_of_it_stays_within_its_time(spent):
    print([round(seconds, 1) for seconds in spent])
    assert len(spent) == 5 and sum(spent) <= BAR_S
