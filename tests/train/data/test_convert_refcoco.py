"""RefCOCO+ as X-VLM is fine-tuned and judged on it: lists of texts joined with references, boxes of a detector."""

import json

import pytest
from PIL import Image

from tests.train.data.test_convert import box, dump, image, lines, picture
from train.data import open_dataset
from train.data.convert import main
from train.data.prepare import main as prepare

INSTANCES = {
    "images": [image(1), image(3), image(4), image(5)],
    "annotations": [
        box(1, [20, 10, 100, 50]),
        box(1, [0, 0, 50, 100]) | {"id": 11},
        box(3, [0, 0, 100, 100]),
        box(4, [100, 0, 100, 100]),
        box(5, [0, 0, 10, 10]),
    ],
    "categories": [{"id": 1, "name": "dog"}],
}


def reference(number, annotation, image_id, split, *sentences):
    said = [{"sent": text} for text in sentences]
    known = {"ref_id": number, "ann_id": annotation, "image_id": image_id, "split": split}
    return known | {"sentences": said}


REFERENCES = [
    reference(0, 10, 1, "train", "spotted dog", "dog with spots"),
    reference(1, 11, 1, "train", "sitting dog"),
    reference(2, 30, 3, "val", "black dog"),
    reference(3, 40, 4, "testA", "running dog"),
    reference(4, 50, 5, "testB", "small dog"),
    reference(4, 50, 5, "testB", "small dog again"),
]


def text(number, image_id, said):
    return {"image": f"train2014/{image_id:012d}.jpg", "text": said, "ref_id": number}


TRAIN = [text(0, 1, "spotted dog"), text(0, 1, "the spotted one"), text(1, 1, "sitting dog"), text(1, 1, "sitting dog")]
VAL = [text(2, 3, "black dog")]
# As published, one list holds testA and testB; REFER says which is which.
TEST = [text(3, 4, "running dog"), text(4, 5, "small dog")]
DETECTIONS = {
    "1": [[18, 12, 100, 50, 0.9], [0, 0, 0, 5], [150, 50, 50, 50]],
    "3": [[0, 0, 95, 100]],
    "4": "none",
    "77": [[1, 1, 5, 5]],
}


@pytest.fixture
def published(tmp_path):
    """The files of REFER and X-VLM, and the images."""
    dump(tmp_path / "instances.json", INSTANCES)
    dump(tmp_path / "refs(unc).json", REFERENCES)
    for name, content in (("train", TRAIN), ("val", VAL), ("test", TEST)):
        dump(tmp_path / f"refcoco+_{name}.json", content)
    dump(tmp_path / "dets.json", DETECTIONS)
    for number in (1, 3, 4, 5):
        picture(tmp_path / "images" / "train2014" / f"{number:012d}.jpg")
    return tmp_path


def convert(folder, *options):
    texts = [str(folder / f"refcoco+_{name}.json") for name in ("train", "val", "test")]
    command = ["refcoco", folder / "refs(unc).json", folder / "out", "--instances", folder / "instances.json"]
    return main([*map(str, command), "--texts", *texts, *map(str, options)])


def test_lists_and_references_become_region_lines(published, capsys):
    assert convert(published, "--detections", published / "dets.json", "--images", published / "images") == 0
    (train,) = lines(published / "out" / "train.jsonl")
    assert train == {
        "image_rpath": f"train2014/{1:012d}.jpg",
        "width": 200,
        "height": 100,
        "elems": [
            {"caption": ["spotted dog", "the spotted one"], "bb": [20, 10, 100, 50], "ref_id": 0},
            {"caption": ["sitting dog"], "bb": [0, 0, 50, 100], "ref_id": 1},
        ],
        "detections": [[18, 12, 100, 50], [150, 50, 50, 50]],
    }
    for name, number in (("val", 3), ("testA", 4), ("testB", 5)):
        (line,) = lines(published / "out" / f"{name}.jsonl")
        assert line["image_rpath"].endswith(f"{number}.jpg") and len(line["elems"]) == 1
    told = capsys.readouterr().out
    for cause in (
        "1 x duplicate reference id",
        "1 x detection: box of a region has no area",
        "1 x detection: box of a region is not four numbers",
        "2 x image without a detection (kept)",
    ):
        assert cause in told, (cause, told)
    tests = open_dataset(f"{published / 'out'}?images={published / 'images'}", "test")
    assert [tests.file_of(index) for index in range(len(tests))] == ["testA", "testB"]
    found = open_dataset(f"{published / 'out'}?images={published / 'images'}", "train")[0]
    assert found.detections == ((0.09, 0.12, 0.59, 0.62), (0.75, 0.5, 1.0, 1.0)) and found.captions == ()


def test_shards_keep_the_detections(published, capsys):
    assert convert(published, "--detections", published / "dets.json", "--images", published / "images") == 0
    lines_of, shards = f"{published / 'out'}?images={published / 'images'}", published / "shards"
    assert prepare([lines_of, str(shards), "--workers", "1"]) == 0
    for split in ("train", "val", "test"):
        before, after = open_dataset(lines_of, split), open_dataset(str(shards), split)
        assert [s.detections for s in before] == [s.detections for s in after] and len(before)


def test_a_list_of_detections_by_image(published):
    listed = [{"image_id": 3, "box": [0, 0, 95, 100], "score": 0.5}, {"image_id": 8, "box": []}, 5]
    dump(published / "dets.json", listed)
    assert convert(published, "--detections", published / "dets.json") == 0
    assert lines(published / "out" / "val.jsonl")[0]["detections"] == [[0, 0, 95, 100]]
    assert lines(published / "out" / "testA.jsonl")[0]["detections"] == []


def test_texts_may_be_captions_too(published):
    assert convert(published, "--as-captions") == 0
    (train,) = lines(published / "out" / "train.jsonl")
    assert train["caption"] == ["spotted dog", "the spotted one", "sitting dog"] and "detections" not in train


def test_what_does_not_belong_together_is_left_out(published, capsys):
    wrong = [text(2, 3, "a text of val"), text(0, 3, "another image"), text(9, 1, "nobody"), {"ref_id": 0}, 7]
    dump(published / "refcoco+_train.json", [*TRAIN[2:], *wrong, text(1, 1, "  "), {"text": "x", "ref_id": [1]}])
    # The file of this image lies on its side.
    picture(published / "images" / "train2014" / f"{4:012d}.jpg", (100, 200))
    # That of this one does once it is turned upright, as images are decoded.
    turned = Image.new("RGB", (200, 100)).getexif()
    turned[0x0112] = 6
    Image.new("RGB", (200, 100)).save(published / "images" / "train2014" / f"{3:012d}.jpg", exif=turned)
    # This one is a smaller copy, which its boxes fit as well.
    picture(published / "images" / "train2014" / f"{5:012d}.jpg", (67, 34))
    assert convert(published, "--images", published / "images") == 0
    (train,) = lines(published / "out" / "train.jsonl")
    assert [elem["ref_id"] for elem in train["elems"]] == [1]
    told = capsys.readouterr().out
    for cause in (
        "1 x text of another split than its list's",
        "1 x text of another image than its reference's",
        "2 x text of a reference that is not listed",
        "3 x entry of a list without a text",
        "1 x reference that no list speaks of",
        "2 x image of other proportions than its annotations say",
    ):
        assert cause in told, (cause, told)
    assert not (published / "out" / "val.jsonl").exists()
    assert not (published / "out" / "testA.jsonl").exists() and (published / "out" / "testB.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("refcoco+_val.json", {}, "no list of texts"),
        ("dets.json", 5, "neither boxes by image nor a list of them"),
        ("dets.json", {"9": [[0, 0, 5, 5]]}, "no usable box of these images"),
        ("refs(unc).json", [], "no list of references"),
    ],
)
def test_mistakes_are_told_in_one_line(published, name, content, message, capsys):
    dump(published / name, json.dumps(content))
    assert convert(published, "--detections", published / "dets.json") == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and not list(published.glob("out/*"))
