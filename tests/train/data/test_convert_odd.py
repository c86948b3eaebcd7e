"""Converters on annotations with odd values in every place: counted, or refused in one line, and never a traceback."""

import copy
import json
import pickle
import random

import pytest

from tests.train.data.test_convert import AREA, IMAGE_DATA, INSTANCES, SENTENCES, XML, box, dump, lines, references
from train.data.convert import main
from train.data.region_elems import read_elem

ODD = [
    *(None, True, -1, 0, 3.0, 1.5, 10**400, -(10**400), 1e308, float("nan"), float("inf")),
    *("", " ", "x", "a" * 5000, "\0", "\ud800", "../../x", "NaN"),
    *([], [1], [[]], [None] * 4, [1, 2, 3], [float("nan")] * 4, ["a", 1, 2, 3], [10**400] * 4, {}, {"a": 1}),
]
ROUNDS = 60


def places(value, path=()):
    """Where something may be replaced, from the whole on."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def spoilt(value, draws):
    """A copy with an odd value, or nothing, in one place or in two."""
    for _ in range(draws.choice((1, 1, 2))):
        value = copy.deepcopy(value)
        found = [path for path in places(value) if path]
        if not found:
            return value
        *outer, last = draws.choice(found)
        inside = value
        for key in outer:
            inside = inside[key]
        if draws.random() < 0.2:
            del inside[last]
        else:
            inside[last] = draws.choice(ODD)
    return value


LISTED = [{"image": f"x/{1:012d}.jpg", "text": "left dog", "ref_id": 0}]
REGIONS = [{"id": 1, "regions": [{**AREA, "width": 100, "height": 50, "phrase": "x", "region_id": 5}]}]
OBJECTS = [{"image_id": 1, "attributes": [{**AREA, "w": 9, "h": 5, "names": ["x", "y"], "attributes": ["red"]}]}]
OBJECTS_OF_REFERENCES = {**INSTANCES, "annotations": [box(1, [20, 10, 100, 50]), box(3, [0, 0, 200, 100])]}
CAPTIONS = {"annotations": [{"image_id": 1, "caption": "a dog"}]}
# Files by name, those that are spoilt first; then the command.
KINDS = {
    "coco-instances": ({"i.json": INSTANCES, "c.json": CAPTIONS}, ["i.json", "o.jsonl", "--captions", "c.json"]),
    "visual-genome": ({"a.json": REGIONS, "d.json": IMAGE_DATA}, ["a.json", "o.jsonl", "--image-data", "d.json"]),
    "visual-genome objects": (
        {"a.json": OBJECTS, "d.json": IMAGE_DATA},
        ["a.json", "o.jsonl", "--image-data", "d.json"],
    ),
    "refcoco": (
        {
            "r.json": references(),
            "i.json": OBJECTS_OF_REFERENCES,
            "t_train.json": LISTED,
            "d.json": {"1": [[1, 2, 30, 40, 0.5]]},
        },
        ["r.json", "o", "--instances", "i.json", "--texts", "t_train.json", "--detections", "d.json", "--as-captions"],
    ),
}


def judged(code, folder, capsys):
    """What a command left is sound: one line of error, or lines whose elements can be read."""
    told = capsys.readouterr()
    assert code in (0, 2)
    if code:
        assert told.err.startswith("error: ") and told.err.count("\n") == 1, told.err
        return 0
    count = 0
    for path in folder.rglob("*.jsonl"):
        for line in lines(path):
            assert line["image_rpath"].strip()
            for elem in line["elems"]:
                read_elem(elem, line["width"], line["height"])
                count += 1
    return count


@pytest.mark.parametrize("kind", KINDS)
def test_odd_json(kind, tmp_path, capsys, monkeypatch):
    files, command = KINDS[kind]
    monkeypatch.chdir(tmp_path)
    draws, kept = random.Random(kind), 0
    (tmp_path / "images").mkdir()
    for number in range(ROUNDS):
        wrong = draws.choice(list(files))
        folder = tmp_path / str(number)
        for name, content in files.items():
            dump(folder / name, json.dumps(spoilt(content, draws) if name == wrong else content))
        monkeypatch.chdir(folder)
        images = ["--images", str(tmp_path / "images")] if number % 10 == 0 else []
        kept += judged(main([kind.split()[0], *command, *images]), folder, capsys) > 0
    # One odd value does not cost what is sound beside it.
    assert kept > ROUNDS // 5


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_are_no_utf_8(kind, tmp_path, capsys, monkeypatch):
    files, command = KINDS[kind]
    for wrong in files:
        folder = tmp_path / wrong
        for name, content in files.items():
            data = json.dumps(content).encode()
            dump(folder / name, "")
            (folder / name).write_bytes(
                data.replace(b'"x', b'"\xff\xfe').replace(b"dog", b"d\xff") if name == wrong else data
            )
        monkeypatch.chdir(folder)
        judged(main([kind.split()[0], *command]), folder, capsys)
        for path in folder.rglob("*.jsonl"):
            assert "\ufffd" not in path.read_text(encoding="utf-8")


def test_odd_pickles(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dump(tmp_path / "i.json", OBJECTS_OF_REFERENCES)
    draws, whole = random.Random(0), pickle.dumps(references(), protocol=2)
    odd = [b"x", (1, 2), {1, 2}, {(1,): 2}, 2**70, b"\x80\x02"]
    for number in range(ROUNDS):
        if number % 2:
            data = bytearray(whole)
            data[draws.randrange(len(data))] = draws.randrange(256)
        else:
            content = references()
            content[0][draws.choice(list(content[0]))] = draws.choice(odd)
            content[0]["sentences"] = draws.choice([content[0]["sentences"], [{"sent": draws.choice(odd)}], content])
            data = pickle.dumps(content, protocol=2)
        (tmp_path / "refs.p").write_bytes(data)
        judged(main(["refcoco", "refs.p", f"o{number}", "--instances", "i.json"]), tmp_path / f"o{number}", capsys)


def test_odd_xml(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draws = random.Random(0)
    odd = ["", "0", "-5", "nan", "1e9", "9" * 300, "9" * 5000, "\u0663", "<a>", "&#0;", "&x;", "200"]
    numbers = ["200", "100", "20", "120", "140"]
    names = ["7", "..", "x/../7", "\0", "n" * 300, "7.jpg", "\udcff"]
    heads = ["", '<?xml version="1.0" encoding="nothing"?>', '<?xml version="1.0" encoding="utf-16"?>']
    for number in range(ROUNDS):
        folder = tmp_path / str(number)
        old = draws.choice(numbers)
        dump(
            folder / "e" / "Annotations" / "7.xml",
            draws.choice(heads) + XML.replace(f">{old}<", f">{draws.choice(odd)}<"),
        )
        text = SENTENCES.replace("park", draws.choice(["park", "p\0", "[/EN#/ ]", "[[/EN#12/x"])).encode()
        dump(folder / "e" / "Sentences" / "7.txt", "")
        (folder / "e" / "Sentences" / "7.txt").write_bytes(draws.choice([text, text.replace(b"friends", b"\xff")]))
        (folder / "e" / "train.txt").write_bytes("\n".join(draws.sample(names, 2)).encode("utf-8", "surrogateescape"))
        monkeypatch.chdir(folder)
        judged(main(["flickr30k-entities", "e", "o"]), folder, capsys)
