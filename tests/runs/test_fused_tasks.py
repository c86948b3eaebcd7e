"""Tasks of a model with a fusion encoder as whole commands, on an untrained X-VLM and the built-in scenes."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.runs.conftest import metric_rows
from tests.train.data.test_convert import dump
from tests.train.data.test_convert_refcoco import DETECTIONS, convert, published

__all__ = ["published"]
from tests.runs.faults import Run, finished

pytestmark = pytest.mark.run
SHORT = "train.steps=12 warmup_steps=2 micro_batch=16 data.workers=0 train.log_every=2 limit=16 examples=1"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    from sycoca.presets import MODEL_PRESETS
    from sycoca.tokenizer import Tokenizer
    from sycoca.xvlm import XVLM
    from train.data import open_dataset

    torch.manual_seed(0)
    config = MODEL_PRESETS["xvlm_tiny"]
    tokenizer = Tokenizer.train_wordpiece(open_dataset("scenes").texts(300), config.text.vocab_size)
    folder = tmp_path_factory.mktemp("untrained") / "model"
    XVLM(config).save_pretrained(folder, tokenizer=tokenizer)
    return folder


def test_boxes_are_fine_tuned_and_judged_before_and_after(command, checkout, untrained):
    folder = checkout / "runs" / "boxes"
    done = command(
        f"python train/finetune.py grounding --config ds_zero2.json --model {untrained} --run-dir {folder} {SHORT}"
    )
    assert done.code == 0, done.err[-3000:]
    before, after = (json.loads((folder / f"{name}.json").read_text()) for name in ("before", "after"))
    assert before["results"]["phrases"] == after["results"]["phrases"] > 40
    rows = metric_rows(folder)
    assert rows[-1]["l1"] < rows[0]["l1"] and "Acc@0.5" in done.out


def test_statements_are_fine_tuned_and_judged_again(command, checkout, untrained):
    folder = checkout / "runs" / "statements"
    done = command(
        f"python train/finetune.py nlvr --config ds_zero2.json --model {untrained} --run-dir {folder} {SHORT}"
    )
    assert done.code == 0, done.err[-3000:]
    assert not (folder / "before.json").exists()
    after = json.loads((folder / "after.json").read_text())["results"]
    done = command(f"python train/evaluate.py nlvr --model {folder} limit=16 --out {folder / 'judged'}")
    assert done.code == 0, done.err[-3000:]
    again = json.loads((folder / "judged" / "nlvr-scenes-val.json").read_text())["results"]
    assert again["statements"] == 16 and again["accuracy"] == after["accuracy"]
    refused = command(f"python train/evaluate.py nlvr --model {untrained}")
    assert refused.code == 2 and "make one with train/finetune.py nlvr" in refused.err


def test_retrieval_is_tuned_with_matching_and_ranked_anew(command, checkout, untrained):
    folder = checkout / "runs" / "matched"
    done = command(
        f"python train/finetune.py retrieval --config ds_zero2.json --model {untrained} --run-dir {folder} "
        f"{SHORT} rerank=8"
    )
    assert done.code == 0, done.err[-3000:]
    assert metric_rows(folder)[-1]["itm"] > 0
    results = json.loads((folder / "after.json").read_text())["results"]
    assert results["rerank"] == 8 and set(results["itc"]) == {"image_to_text", "text_to_image"}


def with_judges() -> None:
    """Undoes that a forked fine-tuning does not judge its models."""
    importlib.reload(importlib.import_module("train.tasks.tuning"))


def test_captions_are_taught_judged_and_written(checkout, untrained, tmp_path, monkeypatch, capsys):
    from sycoca.__main__ import main
    from sycoca.config import ConfigError
    from train import evaluate
    from train.data import open_dataset
    from train.export import consolidated

    photo = tmp_path / "scene.png"
    Image.fromarray(open_dataset("scenes", "val", image_size=64)[0].image).save(photo)
    monkeypatch.chdir(checkout)
    for attempt in (["captioning", "--model", str(untrained)], ["choice", "--model", str(untrained)]):
        with pytest.raises(ConfigError, match=r"train/finetune.py captioning teaches it to write"):
            evaluate.parse(attempt)
    assert main(["caption", str(photo), "--model", str(untrained)]) == 2
    assert "has not learned to write; train/finetune.py captioning teaches it" in capsys.readouterr().err

    folder = tmp_path / "captions"
    tuned = Run(folder, "captioning", "--model", str(untrained), *SHORT.split(), script="finetune", prepare=with_judges)
    rows = metric_rows(finished(tuned).run_dir)
    assert rows[-1]["caption"] < 0.9 * rows[0]["caption"]
    before, after = (json.loads((folder / f"{name}.json").read_text())["results"] for name in ("before", "after"))
    assert before["images"] == after["images"] == 16 and before["captions"] != after["captions"]
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["text"]["writes"] and config["loss"]["caption_label_smoothing"] == 0.1
    assert consolidated(folder / "checkpoints" / "step_00000012").keys() >= {"model.word_head.dense.weight"}

    out = tmp_path / "judged"
    evaluate.evaluate(evaluate.parse(["captioning", "--model", str(folder), "--out", str(out), "limit=16", "beams=1"]))
    assert json.loads((out / "captioning-scenes-val.json").read_text())["results"]["captions"] == after["captions"]
    capsys.readouterr()
    assert main(["caption", str(photo), "--model", str(folder), "--prompt", "a", "--num-beams", "2"]) == 0
    written = capsys.readouterr().out.rstrip("\n").split("\t")
    assert written[0] == str(photo) and written[1].startswith("a")


def test_published_lists_are_converted_and_judged_among_detections(command, checkout, untrained, published):
    """From the published files to figures of testA and testB."""
    dump(published / "dets.json", DETECTIONS | {"5": [[0, 0, 12, 10]]})
    assert convert(published, "--images", published / "images", "--detections", published / "dets.json") == 0
    data = f"--model {untrained} --data '{published / 'out'}?images={published / 'images'}' --out {published}"
    judged = command(f"python train/evaluate.py grounding {data} --split test grounding=detections")
    assert judged.code == 0 and "by file" in judged.out, judged.err[-3000:]
    (path,) = published.glob("grounding-*-test.json")
    results = json.loads(path.read_text())["results"]
    assert results["by_file"].keys() == {"testA", "testB", "all"} and results["without_detections"] == 1
    # The only box of testB's detector overlaps the true one by 100 / 120.
    assert results["Acc@0.5 of the best detection"] == 0.5
