"""X-VLM trained by the command: resumed, on several ranks, at every ZeRO stage; and what five minutes of it find."""

import json
import shutil

import pytest

from tests.runs.faults import Run, finished, rows

pytestmark = pytest.mark.run
SMALL = (
    "--preset=xvlm_tiny",
    "--data=scenes?count=400",
    "log_every=1",
    "save_every=2",
    "val_pairs=4",
    "workers=0",
    "warmup_steps=2",
    "eps=1e-2",
    "model.vision.depth=2",
    "model.text.depth=1",
    "model.fusion.depth=1",
    *(f"model.{part}.width=32" for part in ("vision", "text")),
)
TERMS = ("itc", "mlm", "region_itc", "region_mlm", "l1", "giou")


def test_resumed_losses_are_those_of_the_uninterrupted_run(tmp_path):
    options = (*SMALL, "train.steps=4", "micro_batch=4", "region_batch=16")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finished(Run(whole, *options))
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "step_00000004")
    finished(Run(broken, "--resume"))
    assert [row["step"] for row in rows(broken)] == [1, 2, 3, 4] and rows(broken) == rows(whole)
    assert rows(whole)[0].keys() >= {*TERMS, "itm", "region_itm", "matched"}
    assert (whole / "model" / "model.safetensors").exists()


def test_ranks_and_stages_take_the_same_steps(tmp_path):
    """The pairs of ITM are drawn on each rank: all other terms of the first step are those of one rank."""
    runs = {(1, 2): finished(Run(tmp_path / "one", *SMALL, "train.steps=2", "micro_batch=8", "region_batch=32"))}
    for stage in (1, 2, 3):
        options = (*SMALL, "train.steps=2", "micro_batch=4", "region_batch=16")
        runs[2, stage] = finished(Run(tmp_path / f"two_{stage}", *options, world=2, stage=stage))
    found = {key: rows(run.run_dir) for key, run in runs.items()}
    for (world, stage), steps in found.items():
        for name in TERMS:
            assert steps[0][name] == pytest.approx(found[1, 2][0][name], rel=2e-5), (world, stage, name)
        if world == 2:
            for step, expected in zip(steps, found[2, 2], strict=True):
                for name in ("loss", "grad_norm", *TERMS, "itm", "region_itm"):
                    assert step[name] == pytest.approx(expected[name], rel=1e-4), (stage, name)


def test_mistakes_are_told_in_one_line(tmp_path):
    for options, line in (
        (("region_batch=0",), "train.region_batch: 0, the objective 'bbox' needs texts with boxes"),
        (("data.tokenizer=bpe",), "data.tokenizer: 'bpe', a bidirectional text encoder needs wordpiece or a file"),
        (("objectives=itc,ic",), "objectives: 'ic' predicts the next word, which needs text.kind 'causal'"),
        (("model.vision.local_depth=5",), "vision.local_depth: 5 of 4 blocks"),
        (("accumulation=2",), "train.accumulation: 2, but X-VLM takes its batch at once"),
        (("data.regions=nowhere.jsonl",), "nowhere.jsonl"),
    ):
        run = Run(tmp_path / "run", "--preset=xvlm_tiny", *options)
        assert run.wait() == [2] and line in run.text and run.text.strip().count("\n") == 0, run.text


@pytest.mark.full
def test_five_minutes_find_what_phrases_describe(command, checkout):
    done = command("deepspeed train/pretrain.py --config ds_zero2.json --preset xvlm_tiny", timeout_s=1500)
    assert done.code == 0, done.err[-3000:]
    figures = json.loads((checkout / "runs" / "xvlm_tiny" / "eval.json").read_text())
    grounding = figures["grounding"]
    assert grounding["acc@0.5"] >= 0.5
    assert grounding["acc@0.5"] >= 2 * max(grounding[name] for name in ("fixed_box", "other_phrase", "best_box"))
    assert figures["matching"]["boxes"] >= 0.75
    assert figures["matching"]["images"] >= 0.75
