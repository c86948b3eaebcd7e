"""Converters: small files of the published shapes, every fault counted, and lines that open as a source."""

import json
import pickle
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.data import open_dataset
from train.data.convert import main
from train.data.convert_common import stream_list
from train.data.convert_flickr30k import plain_caption
from train.data.region_elems import read_elem
from train.data.region_lines import offsets_file, scan_lines
from train.data.sample import DataError


def dump(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def picture(path, size=(200, 100)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def lines(path):
    assert np.array_equal(np.load(offsets_file(path)), scan_lines(path))
    return [json.loads(line) for line in path.read_text().splitlines()]


def image(number, **more):
    return {"id": number, "file_name": f"{number:012d}.jpg", "width": 200, "height": 100, **more}


def box(number, bbox, category=1, **more):
    return {"id": 10 * number, "image_id": number, "category_id": category, "bbox": bbox, "iscrowd": 0, **more}


INSTANCES = {
    "images": [image(1), image(2), image(3), image(1), image(4, width=None), {"id": 9}],
    "annotations": [
        box(1, [20, 10, 100, 50]),
        box(1, [0, 0, 50, 50], 2),
        box(1, [0, 0, 50, 50], 3),
        box(1, [0, 0, 0, 50]),
        box(2, [0, 0, 50, 50], iscrowd=1),
        box(3, [0, 0, 200, 100]),
        box(8, [0, 0, 5, 5]),
    ],
    "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "traffic light"}],
}


def test_coco_instances(tmp_path, capsys):
    dump(tmp_path / "instances.json", INSTANCES)
    dump(tmp_path / "captions.json", {"annotations": [{"image_id": 1, "caption": " a dog "}, {"image_id": 7}]})
    picture(tmp_path / "images" / f"{1:012d}.jpg")
    out = tmp_path / "lines.jsonl"
    command = ["coco-instances", tmp_path / "instances.json", out, "--captions", tmp_path / "captions.json"]
    assert main([str(a) for a in [*command, "--images", tmp_path / "images"]]) == 0
    (line,) = lines(out)
    assert line == {
        "image_rpath": f"{1:012d}.jpg",
        "width": 200,
        "height": 100,
        "caption": ["a dog"],
        "elems": [{"caption": "dog", "bb": [20, 10, 100, 50]}, {"caption": "traffic light", "bb": [0, 0, 50, 50]}],
    }
    told = capsys.readouterr().out
    for cause in (
        "1 x duplicate image id",
        "1 x image without a size",
        "1 x image without id or name",
        "1 x object of an unknown category",
        "1 x object of an image that is not listed",
        "1 x box of a region has no area",
        "1 x box around a crowd",
        "1 x image without a usable object",
        "1 x image listed but absent",
        "1 images\n2 regions",
    ):
        assert cause in told, cause
    sample = open_dataset(f"{out}?images={tmp_path / 'images'}", whole=True)[0]
    assert sample.captions == ("a dog",) and sample.regions[0].box == (0.1, 0.1, 0.6, 0.6)
    # Without the folder nobody looks, and the third image is there.
    assert main([str(a) for a in command[:3]]) == 0 and len(lines(out)) == 2


IMAGE_DATA = [
    {"image_id": 1, "width": 200, "height": 100, "url": "https://x/VG_100K_2/1.jpg"},
    {"image_id": 2, "width": 200, "height": 100, "url": "https://x/VG_100K/2.jpg"},
    {"image_id": 3, "width": 0, "height": 100, "url": "https://x/VG_100K/3.jpg"},
    {"image_id": 4, "width": 10, "height": 10},
]
AREA = {"x": 20, "y": 10}


PAGE = Path(__file__).resolve().parents[3] / "docs" / "guides" / "boxes.md"


def test_the_page_word_for_word(tmp_path, monkeypatch, capsys):
    """Every conversion of the page in its order, then training on what it made, as far as opening it."""
    monkeypatch.chdir(tmp_path)
    dump(tmp_path / "annotations" / "instances_train2017.json", INSTANCES)
    captions = {"images": [image(n) for n in (1, 2, 3)], "annotations": [{"image_id": 1, "caption": "a dog"}]}
    for name in ("annotations", "coco"):
        dump(tmp_path / name / "captions_train2017.json", captions)
    items = [{**AREA, "width": 100, "height": 50, "phrase": "x"}]
    dump(tmp_path / "region_descriptions.json", [{"id": 1, "regions": items}])
    dump(tmp_path / "attributes.json", [{"image_id": 1, "attributes": [{**AREA, "w": 9, "h": 5, "names": ["x"]}]}])
    dump(tmp_path / "image_data.json", IMAGE_DATA)
    dump(tmp_path / "refcoco+" / "instances.json", INSTANCES)
    (tmp_path / "refcoco+" / "refs(unc).p").write_bytes(pickle.dumps(references(), protocol=2))
    said = {"image": f"train2014/{3:012d}.jpg", "text": "the dog", "ref_id": 1}
    for name, content in (("train", []), ("val", []), ("test", [said])):
        dump(tmp_path / f"refcoco+_{name}.json", content)
    dump(tmp_path / "dets.json", {"3": [[0, 0, 90, 90]]})
    for name, content in (("Annotations/7.xml", XML), ("Sentences/7.txt", SENTENCES), ("train.txt", "7")):
        dump(tmp_path / "flickr30k_entities" / name, content)
    picture(tmp_path / "flickr30k-images" / "7.jpg")
    picture(tmp_path / "train2017" / f"{1:012d}.jpg")
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    conversions = [line[3:] for line in lines if line[:3] == ["python", "-m", "train.data.convert"]]
    assert {c[0] for c in conversions} == {"coco-instances", "visual-genome", "refcoco", "flickr30k-entities", "index"}
    for words in conversions:
        assert main(words) == 0, (words, capsys.readouterr())
    sources = [
        word.removeprefix("data.regions=") for line in lines for word in line if word.startswith("data.regions=")
    ]
    assert len(open_dataset(sources[0], whole=True)) == 2 and len(open_dataset("entities")) == 1
    shown = json.loads(re.search(r"```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1])
    region = read_elem(shown["elems"][0], shown["width"], shown["height"])
    assert region.attributes == {"phrases": ("closed window", "small window")}


@pytest.mark.parametrize("kind", ["regions", "attributes", "objects"])
def test_visual_genome(kind, tmp_path, capsys):
    if kind == "regions":
        items = [{**AREA, "width": 100, "height": 50, "phrase": "a closed window", "region_id": 5}]
        broken = [{**AREA, "width": 0, "height": 50, "phrase": "x"}, {**AREA, "width": 5, "height": 50, "phrase": ""}]
        elem = {"caption": "a closed window"}
    else:
        known = {"attributes": ["closed", "red"]} if kind == "attributes" else {}
        items = [{**AREA, "w": 100, "h": 50, "names": ["window"], **known}]
        broken = [{**AREA, "w": 0, "h": 50, "names": ["x"]}, {**AREA, "w": 5, "h": 50, "names": []}]
        elem = {"caption": ["window"], **known}
    name = "id" if kind == "regions" else "image_id"
    entries = [{name: 1, kind: items + broken}, {name: 2, kind: broken}, {name: 7, kind: items}, {"id": 1}, 5]
    dump(tmp_path / "vg.json", entries)
    dump(tmp_path / "image_data.json", IMAGE_DATA)
    picture(tmp_path / "flat" / "1.jpg")
    out = tmp_path / "vg.jsonl"
    command = ["visual-genome", tmp_path / "vg.json", out, "--image-data", tmp_path / "image_data.json"]
    assert main([str(a) for a in command]) == 0
    size = {"width": 200, "height": 100}
    assert lines(out) == [{"image_rpath": "VG_100K_2/1.jpg", **size, "elems": [{**elem, "bb": [20, 10, 100, 50]}]}]
    told = capsys.readouterr().out
    for cause in (
        "2 x box of a region has no area",
        "2 x region without a phrase",
        "1 x image without a usable region",
        "1 x regions of an image that is not listed",
        "2 x image without a list of regions, attributes or objects",
        "1 x image without id or size",
        "1 x image without an address",
    ):
        assert cause in told, cause
    assert main([str(a) for a in [*command, "--images", tmp_path / "flat"]]) == 0
    assert lines(out)[0]["image_rpath"] == "1.jpg"


def references():
    def one(number, image_id, split, *sentences):
        said = [{"sent": s, "raw": s.upper(), "tokens": s.split(), "sent_id": i} for i, s in enumerate(sentences)]
        known = {"ref_id": number, "ann_id": 10 * image_id, "image_id": image_id, "split": split, "sentences": said}
        return known | {"file_name": f"{image_id}_{number}.jpg", "category_id": 1, "sent_ids": [0]}

    return [
        one(0, 1, "train", "left dog", "dog on the left", "left dog"),
        one(1, 3, "testA", "the dog"),
        one(2, 2, "val", ""),
        one(3, 8, "val", "x"),
        {"ref_id": 4},
    ]


@pytest.mark.parametrize("form", ["p", "json"])
def test_refcoco(form, tmp_path, capsys):
    instances = INSTANCES | {"annotations": [box(1, [20, 10, 100, 50]), box(2, [0, 0, 9, 9]), box(3, [0, 0, 200, 100])]}
    dump(tmp_path / "instances.json", instances)
    path = tmp_path / f"refs(unc).{form}"
    # As Python 2 wrote them.
    path.write_bytes(pickle.dumps(references(), protocol=2) if form == "p" else json.dumps(references()).encode())
    command = ["refcoco", path, tmp_path / "out", "--instances", tmp_path / "instances.json"]
    assert main([str(a) for a in command]) == 0
    (train,), (test,) = lines(tmp_path / "out" / "train.jsonl"), lines(tmp_path / "out" / "testA.jsonl")
    assert train["elems"] == [{"caption": ["left dog", "dog on the left"], "bb": [20, 10, 100, 50], "ref_id": 0}]
    assert test["image_rpath"] == f"{3:012d}.jpg" and not (tmp_path / "out" / "val.jsonl").exists()
    told = capsys.readouterr().out
    assert "train: 1 images\ntestA: 1 images\n2 regions" in told
    assert "1 x region without a phrase" in told and "1 x reference without a split" in told
    assert "1 x reference to an image or object that is not listed" in told
    source = open_dataset(f"{tmp_path / 'out'}", "test")
    assert len(source) == 1 and source.region_count(0) == 1


def test_a_pickle_that_asks_for_code_is_refused(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return sys.exit, (7,)

    dump(tmp_path / "instances.json", INSTANCES)
    (tmp_path / "refs.p").write_bytes(pickle.dumps([Evil()]))
    command = ["refcoco", tmp_path / "refs.p", tmp_path / "out", "--instances", tmp_path / "instances.json"]
    assert main([str(a) for a in command]) == 2
    assert "not a pickle of plain references: it asks for" in capsys.readouterr().err


XML = """<annotation><filename>7.jpg</filename><size><width>200</width><height>100</height><depth>3</depth></size>
<object><name>11</name><name>12</name><bndbox><xmin>20</xmin><ymin>10</ymin><xmax>120</xmax><ymax>60</ymax></bndbox></object>
<object><name>12</name><bndbox><xmin>100</xmin><ymin>20</ymin><xmax>140</xmax><ymax>90</ymax></bndbox></object>
<object><name>13</name><scene>1</scene><nobndbox>1</nobndbox></object></annotation>"""
SENTENCES = """[/EN#11/people A man] and [/EN#12/people/other two friends] in [/EN#13/scene a park] .
Nobody .
"""


def test_flickr30k_entities(tmp_path, capsys):
    root = tmp_path / "entities"
    dump(root / "Annotations" / "7.xml", XML)
    dump(root / "Sentences" / "7.txt", SENTENCES)
    dump(root / "Annotations" / "8.xml", XML[:90])
    dump(root / "Sentences" / "8.txt", SENTENCES)
    dump(root / "Annotations" / "10.xml", XML)
    dump(root / "Sentences" / "10.txt", "Nobody .\n")
    dump(root / "train.txt", "7\n8\n")
    dump(root / "val.txt", "9\n10\n")
    out = tmp_path / "out"
    assert main(["flickr30k-entities", str(root), str(out)]) == 0
    (line,) = lines(out / "train.jsonl")
    assert line["caption"] == ["A man and two friends in a park .", "Nobody ."]
    assert line["elems"] == [
        {"caption": "A man", "bb": [20, 10, 100, 50], "caption_index": 0},
        {"caption": "two friends", "bb": [20, 10, 120, 80], "caption_index": 0},
    ]
    told = capsys.readouterr().out
    assert "1 x damaged annotations" in told and "1 x image without annotations" in told
    assert "1 x image without a usable region" in told
    picture(tmp_path / "7.jpg")
    sample = open_dataset(f"{out / 'train.jsonl'}?images={tmp_path}", whole=True)[0]
    assert [r.caption for r in sample.regions] == [0, 0] and len(sample.described(0)) == 2


def test_marks_of_phrases():
    assert plain_caption("[/EN#1/a/b X y] z [/EN#0/notvisual w] .") == ("X y z w .", [("1", "X y"), ("0", "w")])


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("text", ["[]", "[1, 23, 456]", ' [ {"a": [1, "]"]} ,\n{"b": "\\u00e9"}, [], null, "x,]"]\n'])
def test_a_list_is_read_as_a_stream(text, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr("train.data.convert_common._CHUNK", chunk)
    assert list(stream_list(dump(tmp_path / "l.json", text))) == json.loads(text)


@pytest.mark.parametrize("text, message", [("[1, {", "ends early"), ('{"a": 1}', "no list"), ("", "ends early")])
def test_a_list_that_is_none_is_told(text, message, tmp_path):
    with pytest.raises(DataError, match=message):
        list(stream_list(dump(tmp_path / "l.json", text)))


def test_nothing_is_left_in_place_of_a_failed_conversion(tmp_path, capsys):
    dump(tmp_path / "image_data.json", IMAGE_DATA)
    item = {**AREA, "width": 100, "height": 50, "phrase": "x"}
    dump(tmp_path / "vg.json", json.dumps([{"id": 1, "regions": [item]}])[:-1])
    out = tmp_path / "vg.jsonl"
    command = ["visual-genome", tmp_path / "vg.json", out, "--image-data", tmp_path / "image_data.json"]
    assert main([str(a) for a in command]) == 2 and not list(tmp_path.glob("vg.jsonl*"))
    assert "ends early" in capsys.readouterr().err


def test_mistakes_are_told_in_one_line(tmp_path, capsys):
    dump(tmp_path / "captions.json", {"images": [], "annotations": [], "licenses": []})
    dump(tmp_path / "none.json", {"images": [], "annotations": [], "categories": [{"id": 1, "name": "dog"}]})
    for command, message in {
        ("coco-instances", "caption.json", "x.jsonl"): "did you mean",
        ("coco-instances", "captions.json", "x.jsonl"): "no list 'categories'; it has images, annotations, licenses",
        ("coco-instances", "none.json", "x.jsonl"): "no usable image",
        ("coco-instances", "captions.json", "x.json"): "has to be a file that ends in .jsonl",
        ("refcoco", "captions.json", "x.jsonl", "--instances", "captions.json"): "has to be a folder",
        ("flickr30k-entities", ".", "x"): "no folder 'Sentences'",
    }.items():
        placed = [str(tmp_path / word) if "." in word or word == "x" else word for word in command]
        assert main(placed) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1, (command, told)


def test_index(tmp_path, capsys):
    for number in range(2):
        dump(tmp_path / f"{number}.jsonl", '{"a": 1}\n{"b": 2}\n')
    assert main(["index", str(tmp_path / "{0..1}.jsonl")]) == 0
    assert capsys.readouterr().out.count(": 2 lines") == 2
    assert np.load(offsets_file(tmp_path / "0.jsonl")).tolist() == [0, 9, 18]
