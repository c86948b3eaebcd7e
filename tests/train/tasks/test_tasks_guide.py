"""Every command of the guide to the tasks is read by its script, with the files that it names in place."""

import io
import json
import os
import re
import shlex
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from sycoca.config import to_dict
from sycoca.presets import MODEL_PRESETS
from train import evaluate
from train.tasks import launch
from train.tasks.class_names import CLASSES
from train.tasks.options import EVALUATED, FINETUNED

ROOT = Path(__file__).resolve().parents[3]
GUIDE = (ROOT / "docs" / "guides" / "tasks.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL) for line in block.splitlines() if line]
COCO = "000000000001.jpg"


def table(path: Path) -> None:
    path.parent.mkdir(parents=True)
    splits = ["train"] * 140 + ["val"] * 3 + ["test"] * 3
    rows = [f"{i}.jpg\ta dog, number {i}\t{split}" for i, split in enumerate(splits)]
    path.write_text("\n".join(["image\tcaption\tsplit", *rows]) + "\n", encoding="utf-8")


def labelled(path: Path, picture: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(40):
            info = tarfile.TarInfo(f"{CLASSES['cifar10'][number % 10]}/{number}.jpg")
            info.size = len(picture)
            tar.addfile(info, io.BytesIO(picture))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and a little of every data set."""
    place = tmp_path_factory.mktemp("place")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "green").save(buffer, "JPEG")
    for run, preset in (("flickr", "tiny"), ("captioning", "tiny"), ("xvlm", "xvlm_tiny")):
        folder = place / "runs" / run / "model"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(to_dict(MODEL_PRESETS[preset])), encoding="utf-8")
        (folder / "model.safetensors").write_bytes(b"")
    # Commands without --model take the newest run.
    os.utime(place / "runs" / "xvlm", (0, 0))
    for name in ("flickr30k", "coco"):
        table(place / name / "captions.tsv")
    for name in ("cifar10/train.tar", "cifar10/test.tar", "train.tar", "test.tar"):
        labelled(place / name, buffer.getvalue())
    line = {"image_rpath": COCO, "width": 8, "height": 8, "elems": [{"caption": "a dog", "bb": [1, 1, 4, 4]}]}
    captioned = line | {"caption": ["a dog"], "detections": [[1, 1, 4, 5]]}
    for folder, entry in (("refcoco_plus", line), ("refcoco_published", captioned)):
        for name, count in (("train", 140), ("val", 2), ("testA", 2)):
            path = place / folder / f"{name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text((json.dumps(entry) + "\n") * count, encoding="utf-8")
    for folder in ("val", "val2014", "train2014", "val2017", "nlvr2"):
        (place / folder).mkdir()
        (place / folder / COCO).write_bytes(buffer.getvalue())
    asked = {"question_id": 1, "image_id": 1, "question": "what?"}
    contents = {
        "nocaps_val.json": {
            "images": [{"id": 1, "file_name": COCO, "domain": "in-domain"}],
            "annotations": [{"image_id": 1, "caption": "a dog"}],
        },
        "questions.json": {"questions": [asked]},
        "answers.json": {"annotations": [asked | {"answers": [{"answer": "yes"}]}]},
        "train_questions.json": {"questions": [asked]},
        "train_answers.json": {"annotations": [asked | {"answers": [{"answer": "no"}]}]},
        "aokvqa_val.json": [asked | {"question_id": "x", "choices": ["a", "b"], "correct_choice_idx": 0}],
        "train.json": [{"images": [COCO, COCO], "sentence": "two", "label": "True"}] * 140,
        "dev.json": [{"images": [COCO, COCO], "sentence": "two", "label": "False"}] * 2,
        "sugar_crepe/swap_obj.json": {"0": {"filename": COCO, "caption": "a", "negative_caption": "b"}},
    }
    for name, content in contents.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(json.dumps(content), encoding="utf-8")
    return place


@pytest.mark.parametrize("line", LINES)
def test_command_of_the_guide(line, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    _, script, *argv = shlex.split(line)
    if script == "train/evaluate.py":
        asked = evaluate.parse(argv)
        assert len(asked.source) and not asked.source.skipped
    else:
        assert script == "train/finetune.py"
        tuning = launch.parse(argv, script=ROOT / script, has_cuda=False)
        assert len(tuning.train) in (40, 140) and len(tuning.val) and not tuning.train.skipped


def test_the_guide_shows_every_task_and_both_scripts():
    named = {shlex.split(line)[2] for line in LINES}
    assert named >= {*EVALUATED, *FINETUNED}


def test_what_holds_nothing_out_needs_a_source_to_be_judged_on(place, monkeypatch):
    monkeypatch.chdir(place)
    argv = ["classification", "--config", "ds_zero2.json", "--model", "runs/flickr", "--data", "train.tar"]
    with pytest.raises(ValueError, match="holds nothing out; give --val"):
        launch.parse(argv, script=ROOT / "train" / "finetune.py", has_cuda=False)
    with pytest.raises(ValueError, match="probe needs --train"):
        evaluate.parse(["probe", "--model", "runs/flickr", "--data", "test.tar"])


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["vqa", "vqa=rank"], "needs no fine-tuning"),
        (["vqa", "scst=true"], "scst belongs to captioning"),
        (["captioning", "scst=true", "--config", "ds_zero3.json"], "ZeRO stage 3 (ds_zero3.json) does not allow"),
        (["retrieval", "optimizer.lrr=1"], "did you mean 'optimizer.lr'"),
        (["retrieval", "train.micro_batch=4096", "--data", "coco/captions.tsv"], "do not fill a batch"),
        (["retrieval", "--data", "scenes", "data.train=x"], "differ"),
        (["classification", "classes=cifar"], "did you mean 'cifar10'"),
        (["retrieval", "--config", "ds_zero.json"], "no such file"),
    ],
)
def test_a_mistake_is_one_line(argv, told, place, monkeypatch):
    monkeypatch.chdir(place)
    script = ROOT / "train" / "finetune.py"
    config = [] if "--config" in argv else ["--config", "ds_zero2.json"]
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        launch.parse([*argv, *config, "--model", "runs/flickr"], script=script, has_cuda=False)
    assert "\n" not in str(caught.value)


def test_scst_is_gentler_unless_told_otherwise(place, monkeypatch):
    monkeypatch.chdir(place)
    argv = ["captioning", "--config", "ds_zero2.json", "--model", "runs/flickr"]
    script = ROOT / "train" / "finetune.py"
    rates = [
        launch.parse([*argv, *more], script=script, has_cuda=False).config.optimizer.lr
        for more in ([], ["scst=true"], ["scst=true", "lr=0.25"])
    ]
    assert rates[1] == pytest.approx(rates[0] / 5) and rates[2] == 0.25


def test_results_of_different_data_have_different_names():
    names = [
        "vqav2:v2_OpenEnded_mscoco_val2014_questions.json?annotations=a.json&images=val2014",
        "vqav2:v2_OpenEnded_mscoco_test2015_questions.json?images=test2015",
        "nocaps:nocaps_val.json?images=val",
        "nocaps:my_val.json?images=val",
        "nocaps:my_val.json?images=other",
        "one/set/val.tsv",
        "two/set/val.tsv",
        "scenes",
    ]
    found = [evaluate.file_name("task", name, "val") for name in names]
    assert len({*found}) == len(names) and all(re.fullmatch(r"[\w-]+", name) for name in found)
    assert found[-1] == "task-scenes-val" and "test2015-questions" in found[1]
    assert evaluate.file_name("probe", "cifar10/test.tar", "val") == "probe-cifar10-test-val"


def test_numbers_are_no_names_of_classes(place, monkeypatch):
    monkeypatch.chdir(place)
    for name in ("0", "2"):
        (place / "numbered" / name).mkdir(parents=True)
        (place / "numbered" / name / "x.jpg").write_bytes((place / "val" / COCO).read_bytes())
    argv = ["zeroshot", "--model", "runs/flickr", "--data", "numbered"]
    with pytest.raises(ValueError, match="classes are numbers; give classes=NAME_OR_FILE"):
        evaluate.parse(argv)
    assert evaluate.parse([*argv, "classes=cifar10"]).source.label(1) == 2


def test_answers_to_rank_are_not_those_of_the_judged_questions(place, monkeypatch):
    monkeypatch.chdir(place)
    argv = ["vqa", "--model", "runs/flickr", "--data", "vqav2:questions.json?annotations=answers.json&images=val2014"]
    with pytest.raises(ValueError, match="vqa=rank needs --train as well"):
        evaluate.parse(argv)
    train = ["--train", "vqav2:train_questions.json?annotations=train_answers.json&images=train2014"]
    assert evaluate.parse([*argv, *train]).train.asked(0)[0].answers == ("no",)
    assert evaluate.parse([*argv, "vqa=generate"]).train is None
    with pytest.raises(ValueError, match="have no candidates"):
        evaluate.parse([*argv, *train, "vqa=generate"])


def test_a_model_of_openclip_is_refused_with_the_way_to_convert_it(tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"load_pretrained\(.*save_pretrained\(FOLDER, tokenizer"):
        evaluate.parse(["retrieval", "--model", str(tmp_path)])
