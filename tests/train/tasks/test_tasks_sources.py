"""Files of the standard data sets, sound and damaged: what is used, what is counted and named, what is refused."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from train.data import DataError
from train.data.scene_words import PLACE_WORDS, place
from train.tasks.class_names import class_names, templates
from train.tasks.sources import open_source

ROOT = Path(__file__).resolve().parents[3]


def write_image(path: Path, colour="red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), colour).save(path)


def write(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def images(tmp_path):
    for number in (1, 2):
        write_image(tmp_path / "images" / f"COCO_val2014_{number:012d}.jpg")
    write_image(tmp_path / "images" / "000000000003.jpg")
    return tmp_path / "images"


def people(*answers):
    return [{"answer": a, "answer_id": i, "answer_confidence": "yes"} for i, a in enumerate(answers, 1)]


@pytest.fixture
def vqa(tmp_path, images):
    questions = [
        {"question_id": 10, "image_id": 1, "question": "what color?"},
        {"question_id": 11, "image_id": 1, "question": "how many?"},
        {"question_id": 11, "image_id": 1, "question": "twice"},
        {"question_id": 12, "image_id": 2, "question": "  "},
        {"question_id": 13, "image_id": 9, "question": "of an absent image?"},
        {"question_id": 14, "image_id": 3},
        {"question_id": 15, "image_id": 3, "question": "not annotated?"},
        {"question_id": "16", "image_id": 3, "question": "a number in quotes?"},
        7,
    ]
    answers = [
        {"question_id": 10, "image_id": 1, "answer_type": "other", "answers": people(*["red"] * 9, "blue")},
        {"question_id": 11, "image_id": 1, "answer_type": "number", "answers": [*people("2"), {"answer": 2}]},
        {"question_id": 12, "image_id": 2, "answer_type": "other", "answers": people("x")},
    ]
    q = write(tmp_path / "q.json", {"data_subtype": "val2014", "questions": questions})
    return q, write(tmp_path / "a.json", {"annotations": answers}), images


def test_vqav2_is_read_and_its_faults_are_counted(vqa):
    q, a, images = vqa
    source = open_source("vqa", f"vqav2:{q}?annotations={a}&images={images}", "val", image_size=8)
    assert len(source) == 1
    first, second = source.asked(0)
    assert (first.question, first.kind, first.key) == ("what color?", "other", "10")
    assert first.answers == ("red",) * 9 + ("blue",) and second.answers == ("2",)
    assert source.image(0)[0].size == (20, 16)
    assert source.skipped.counts() == {
        "answers without text": 1,
        "duplicate question_id": 1,
        "empty question": 1,
        "image of a question is absent": 1,
        "field question is missing": 1,
        "question without an annotation": 1,
        "field question_id is of another type": 1,
        "entry is not an object": 1,
    }
    line = source.skipped.line()
    assert "q.json[2] 11" in line and "first: 9" in line
    _, text, key = source.pair(0, 3)
    assert json.loads(text) == ["how many?", ["2"], 1] and key.endswith("1.jpg")


def test_test_questions_have_no_answers(vqa):
    q, _, images = vqa
    source = open_source("vqa", f"vqav2:{q}?images={images}", "test", image_size=8)
    assert [asked.answers for index in range(len(source)) for asked in source.asked(index)] == [()] * 3
    with pytest.raises(DataError, match="training needs"):
        open_source("vqa", f"vqav2:{q}?images={images}", "train", image_size=8)


def test_images_of_test_dev_are_those_of_test(tmp_path):
    write_image(tmp_path / "images" / "COCO_test2015_000000000001.jpg")
    asked = {"question_id": 1, "image_id": 1, "question": "what?"}
    q = write(tmp_path / "q.json", {"data_subtype": "test-dev2015", "questions": [asked]})
    assert len(open_source("vqa", f"vqav2:{q}?images={tmp_path / 'images'}", "test", image_size=8)) == 1


def test_aokvqa(tmp_path, images):
    whole = {"image_id": 3, "question": "what is it?", "choices": ["a", "b", "c", "d"], "correct_choice_idx": 2}
    path = write(
        tmp_path / "a.json",
        [
            {**whole, "question_id": "x1"},
            {**whole, "question_id": "x2", "correct_choice_idx": 4},
            {**whole, "question_id": "x3", "choices": ["a", ""]},
            {**whole, "question_id": "x4", "image_id": 8},
            {"question_id": "x5"},
        ],
    )
    source = open_source("choice", f"aokvqa:{path}?images={images}", "val", image_size=8)
    (choice,) = source.choices(0)
    assert len(source) == 1 and choice.texts[choice.right] == "c" and choice.key == "x1"
    assert len(source.skipped.counts()) == 4 and sum(source.skipped.counts().values()) == 4


def test_sugarcrepe(tmp_path, images):
    pair = {"filename": "000000000003.jpg", "caption": "a red dog", "negative_caption": "a blue dog"}
    folder = tmp_path / "crepe"
    folder.mkdir()
    write(folder / "replace_att.json", {"0": pair, "1": {**pair, "negative_caption": "a red dog"}})
    write(folder / "swap_obj.json", {"0": pair, "1": {**pair, "filename": "no.jpg"}, "2": {"filename": "x"}})
    source = open_source("pairs", f"sugarcrepe:{folder}?images={images}", "val", image_size=8)
    assert [choice.kind for choice in source.choices(0)] == ["replace_att", "swap_obj"]
    assert source.choices(0)[0].texts == ("a red dog", "a blue dog") and source.choices(0)[0].right == 0
    assert source.skipped.counts() == {
        "captions are empty or equal": 1,
        "image of a caption is absent": 1,
        "field caption is missing": 1,
    }


def test_nocaps(tmp_path, images):
    content = {
        "images": [
            {"id": 0, "file_name": "000000000003.jpg", "domain": "near-domain"},
            {"id": 1, "file_name": "absent.jpg", "domain": "in-domain"},
            {"id": 0, "file_name": "000000000003.jpg"},
            {"id": 2, "file_name": "COCO_val2014_000000000001.jpg"},
            {"id": [3], "file_name": "000000000003.jpg"},
        ],
        "annotations": [
            {"image_id": 0, "caption": "a dog"},
            {"image_id": 0, "caption": "the dog"},
            {"image_id": 2, "caption": " "},
            {"image_id": 5, "caption": "of nothing"},
        ],
    }
    path = write(tmp_path / "nocaps.json", content)
    source = open_source("captioning", f"nocaps:{path}?images={images}", "val", image_size=8)
    assert len(source) == 1 and source[0].captions == ("a dog", "the dog") and source.domain(0) == "near-domain"
    assert source.skipped.counts() == {
        "image listed but absent": 1,
        "duplicate id": 1,
        "field id is of another type": 1,
        "empty caption": 1,
        "image without a usable caption": 1,
        "captions of an image that is not listed": 1,
    }


def test_labels_of_folders(tmp_path):
    for split, names in (("train", ("cat", "dog")), ("val", ("cat", "dog", "bird"))):
        for name in names:
            write_image(tmp_path / "set" / split / name / "0.png")
    write(tmp_path / "set" / "train" / "cat" / "notes.txt", "x")
    train = open_source("classification", str(tmp_path / "set"), "train", image_size=8)
    assert train.classes == ("cat", "dog") and [train.label(i) for i in range(2)] == [0, 1]
    assert train.skipped.counts() == {"file is no image": 1}
    val = open_source("classification", str(tmp_path / "set"), "val", image_size=8, classes=train.classes)
    assert len(val) == 2 and val.skipped.counts() == {"class is not among the class names": 1}


def test_numbered_classes_of_the_training_images_are_names(tmp_path):
    for split, names in (("train", "01"), ("val", "02")):
        for name in names:
            write_image(tmp_path / "set" / split / name / "0.png")
    train, val = (
        open_source("probe", str(tmp_path / "set"), split, image_size=8, classes=classes)
        for split, classes in (("train", None), ("val", ("0", "1")))
    )
    assert train.classes == val.classes and [val.label(i) for i in range(len(val))] == [0]
    assert val.skipped.counts() == {"class is not among the class names": 1}


def test_wordnet_numbers_take_the_classes_in_order(tmp_path, capsys):
    for name in ("n01443537", "n01440764"):
        write_image(tmp_path / "set" / name / "0.png")
    source = open_source("zeroshot", str(tmp_path / "set"), "val", image_size=8, classes=("tench", "goldfish"))
    found = {Path(source.image(i)[1]).parent.name: source.classes[source.label(i)] for i in range(2)}
    told = capsys.readouterr().err
    assert found == {"n01440764": "tench", "n01443537": "goldfish"}
    assert told.count("\n") == 1 and "n01440764 for 'tench'" in told
    with pytest.raises(DataError, match="class is not among the class names"):
        open_source("zeroshot", str(tmp_path / "set"), "val", image_size=8, classes=("tench", "goldfish", "cat"))


def test_a_folder_of_splits_is_read_by_split(tmp_path):
    for split in ("train", "test"):
        write_image(tmp_path / "set" / split / "cat" / "deep" / f"{split}.png")
    train, val, test = (
        open_source("classification", str(tmp_path / "set"), split, image_size=8) for split in ("train", "val", "test")
    )
    assert [Path(source.image(0)[1]).stem for source in (train, val, test)] == ["train", "test", "test"]
    (tmp_path / "set" / "train").rename(tmp_path / "set" / "dev")
    with pytest.raises(DataError, match="no split 'train'; it has test, val"):
        open_source("classification", str(tmp_path / "set"), "train", image_size=8)


def add(tar, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_labels_of_tar_files(tmp_path):
    write_image(tmp_path / "x.jpg", "blue")
    picture = (tmp_path / "x.jpg").read_bytes()
    with tarfile.open(tmp_path / "set-0.tar", "w") as tar:
        add(tar, "dog/1.jpg", picture)
        add(tar, "cat/2.jpg", picture)
        add(tar, "cat/2.jpg", picture)
        add(tar, "3.jpg", picture)
    with tarfile.open(tmp_path / "set-1.tar", "w") as tar:
        add(tar, "k1.jpg", picture)
        add(tar, "k1.cls", b"1\n")
        add(tar, "k2.jpg", b"no image")
        add(tar, "k2.cls", b"0")
    source = open_source("zeroshot", str(tmp_path / "set-0.tar"), "val", image_size=8)
    assert source.classes == ("cat", "dog") and sorted(source.label(i) for i in range(2)) == [0, 1]
    assert source.skipped.counts() == {"duplicate key": 1, "image without a class": 1}
    numbered = open_source("zeroshot", str(tmp_path / "set-1.tar"), "val", image_size=8, classes=("cat", "dog"))
    assert [numbered.label(i) for i in range(2)] == [1, 0] and numbered.image(0)[0].size == (20, 16)
    both = open_source("zeroshot", str(tmp_path / "set-{0..1}.tar"), "val", image_size=8)
    assert len(both) == 4
    data = (tmp_path / "set-0.tar").read_bytes()
    first_ends = 512 + -(-len(picture) // 512) * 512
    (tmp_path / "short.tar").write_bytes(data[: first_ends + 512 + len(picture) // 2])
    short = open_source("zeroshot", str(tmp_path / "short.tar"), "val", image_size=8)
    assert len(short) == 1 and short.image(0)[0].size == (20, 16)
    assert short.skipped.counts() == {"shard ends within a member": 1}


@pytest.mark.parametrize(
    ("task", "spec", "told"),
    [
        ("vqa", "vqav2:no.json", "not found"),
        ("vqa", "vqav2:q.json?image=.", "did you mean 'images'"),
        ("vqa", "vqav2:q.json?images=nowhere", "no such file or folder"),
        ("vqa", "vqav2:bad.json", "not valid JSON"),
        ("vqa", "vqav2:list.json", "no list 'questions'"),
        ("vqa", "vqav2:q.json", "no usable question"),
        ("vqa", "captions.tsv", "has no questions"),
        ("choice", "aokvqa:q.json", "no list of questions"),
        ("choice", "aokvqa:list.json", "no usable question"),
        ("pairs", "sugarcrepe:q.json", "no usable pair"),
        ("captioning", "nocaps:q.json", "no list 'annotations'; it has questions"),
        ("zeroshot", "nowhere.tar", "not found"),
        ("zeroshot", "q.json", "has no labels"),
        ("zeroshot", "bad.tar", "no usable labelled image; left out: 1 x shard without a sample (first: bad.tar)"),
        ("zeroshot", "empty", "no usable labelled image"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, monkeypatch, task, spec, told):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "q.json", {"questions": []})
    write(tmp_path / "list.json", [])
    write(tmp_path / "bad.json", "{")
    write(tmp_path / "bad.tar", "x" * 2000)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=re.escape(told)) as caught:
        open_source(task, spec, "val", image_size=8)
    assert "\n" not in str(caught.value)


def test_class_names_and_templates(tmp_path):
    assert class_names("cifar10")[3] == "cat" and class_names(None) is None and len(class_names("scenes")) == 9
    path = write(tmp_path / "names.txt", "cat\n\ndog\n")
    assert class_names(str(path)) == ("cat", "dog")
    assert all("{}" in line for line in templates(None, class_names("cifar10")))
    assert templates(None, ("at the top",)) == templates("scenes", ())
    for text, told in (("cat\ncat\n", "stands twice"), ("\n", "empty")):
        with pytest.raises(ValueError, match=told):
            class_names(str(write(path, text)))
    with pytest.raises(ValueError, match="needs one"):
        templates(str(write(path, "a photo\n")), ())
    with pytest.raises(ValueError, match="did you mean 'cifar10'"):
        class_names("cifar")


def test_scenes_serve_every_task():
    questions = open_source("vqa", "scenes", "val", image_size=16)
    assert {asked.kind for asked in questions.asked(0)} >= {"exists", "count", "relation"}
    choices = open_source("choice", "scenes", "val", image_size=16)
    made = [choice for index in range(40) for choice in choices.choices(index)]
    assert made and all(len(set(choice.texts)) == 4 for choice in made)
    assert {choice.right for choice in made} == {0, 1, 2, 3}
    pairs = open_source("pairs", "scenes", "val", image_size=16)
    for true, false in (choice.texts for index in range(40) for choice in pairs.choices(index)):
        differing = [(a, b) for a, b in zip(true.split(), false.split(), strict=True) if a != b]
        assert len(differing) == 1
    labels = open_source("classification", "scenes", "val", image_size=16)
    thing = labels._scenes.scene(5).things[0]
    assert labels.classes[labels.label(5)] == PLACE_WORDS[place(thing)][0] and len(labels.classes) == 9
    assert len({labels.label(index) for index in range(200)}) == 9


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("evaluate.py retreival", "did you mean 'retrieval'"),
        ("evaluate.py retrieval", "no run with a model"),
        ("evaluate.py retrieval --model nowhere", "no such folder"),
        ("evaluate.py captioning beams=0", "beams: 0, needs at least 1"),
        ("evaluate.py captioning min_length=9 max_length=8", "min_length: 9, max_length is 8"),
        ("evaluate.py captioning beam=3", "did you mean"),
        ("evaluate.py retrieval beams=3", "beams belongs to captioning and vqa"),
        ("evaluate.py captioning scst=true", "belongs to train/finetune.py"),
        ("evaluate.py captioning --train x", "--train belongs to probe"),
        ("finetune.py zeroshot --config ds_zero2.json", "no task 'zeroshot'"),
        ("finetune.py vqa", "--config"),
        ("finetune.py vqa --config ds_zero2.json --resume", "name the run"),
    ],
)
def test_a_mistake_is_one_line_before_torch_is_imported(tmp_path, line, told):
    script, _, rest = line.partition(" ")
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert 'torch' not in sys.modules"
    )
    argv = [sys.executable, "-c", code, str(ROOT / "train" / script), *rest.split()]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and told in done.stderr
