"""JSON lines: both published forms, what is left out and why, splits, and reading through workers."""

import base64
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from tests.train.data.test_region_batches import FORM, TOKENIZER, same
from train.data import BadSample, DataError, check_source, open_dataset, readable
from train.data.inspect import main as inspect
from train.data.prepare import main as prepare
from train.data.region_batches import region_batches
from train.data.region_elems import read_elem
from train.data.region_lines import line_offsets, offsets_file, scan_lines

ELEM = {"caption": "a red box", "bb": [10, 5, 20, 10]}


def picture(path, size=(40, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def write(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [e if isinstance(e, str) else json.dumps(e, ensure_ascii=False) for e in entries]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def opened(tmp_path, *entries, split="train", **options):
    picture(tmp_path / "a.png")
    write(tmp_path / "lines.jsonl", entries)
    return open_dataset(str(tmp_path / "lines.jsonl"), split, whole=True, **options)


def test_a_line_of_regions(tmp_path):
    elems = [ELEM, {"caption": "window", "attributes": ["closed", "big"], "bb": [0, 0, 40, 20], "caption_index": 0}]
    source = opened(tmp_path, {"image_rpath": "a.png", "caption": ["one", "two"], "elems": elems})
    sample = source[0]
    assert sample.captions == ("one", "two") and sample.key == "a.png" and sample.image.size == (40, 20)
    red, window = sample.regions
    assert red.phrase == "a red box" and red.box == (0.25, 0.25, 0.75, 0.75) and red.caption == -1
    assert window.box == (0, 0, 1, 1) and window.caption == 0
    assert window.attributes == {"phrases": ("closed window", "big window")}
    assert source.region_count(0) == 2 and source.pair(0, 3)[1:] == ("two", "a.png")
    assert list(source.texts()) == ["one", "two", "a red box", "closed window"]
    assert source.captions(0) == ("one", "two") and source.captioned(0)[1:] == (("one", "two"), "a.png")
    assert not source.skipped


def test_a_line_of_an_image_in_base64_whose_boxes_are_of_another_size(tmp_path):
    picture(tmp_path / "a.png")
    data = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    bb = {"caption": "x", "bb": [100, 0, 100, 100]}
    source = opened(
        tmp_path, {"binary": data, "elems": [bb], "width": 200, "height": 100}, {"binary": data, "caption": "c"}
    )
    assert source[0].regions[0].box == (0.5, 0, 1, 1) and source[0].captions == () and source[0].key == "lines.jsonl#0"
    assert source[1].regions is None and source[1].captions == ("c",)
    assert source.encoded(0)[0] == (tmp_path / "a.png").read_bytes()
    with pytest.raises(BadSample, match="without a usable caption"):
        source.pair(0, 0)


WRONG_ELEMS = {
    "region is not an object": [3, "x", None],
    "region without a phrase": [{"bb": [0, 0, 1, 1]}, {**ELEM, "caption": " "}, {**ELEM, "caption": 3}],
    "box of a region is not four numbers": [
        {**ELEM, "bb": [0, 0, 1]},
        {**ELEM, "bb": "0,0,1,1"},
        {**ELEM, "bb": [0, 0, "1", 1]},
        {**ELEM, "bb": [0, 0, float("nan"), 1]},
        {**ELEM, "bb": [0, 0, True, 1]},
        {**ELEM, "bb": [0, 0, 1e300, 1]},
    ],
    "box of a region has no area": [{**ELEM, "bb": [1, 1, 0, 5]}, {**ELEM, "bb": [1, 1, 5, 0]}],
    "box of a region has swapped corners": [{**ELEM, "bb": [30, 5, -20, 10]}],
    "box of a region is outside its image": [{**ELEM, "bb": [40, 0, 5, 5]}, {**ELEM, "bb": [-9, -9, 5, 5]}],
    "box of a region is mostly outside its image": [{**ELEM, "bb": [35, 0, 20, 10]}],
}


@pytest.mark.parametrize("cause, elems", WRONG_ELEMS.items())
def test_wrong_regions_are_counted_by_cause(cause, elems, tmp_path):
    for elem in elems:
        with pytest.raises(ValueError, match=cause):
            read_elem(elem, 40, 20)
    source = opened(tmp_path, {"image_rpath": "a.png", "elems": [*elems, ELEM]})
    for _ in range(2):
        assert len(source[0].regions) == 1
    assert source.skipped.counts() == {cause: len(elems)}


def test_a_box_over_the_border_is_clipped():
    assert read_elem({**ELEM, "bb": [-5, 0, 20, 25]}, 40, 20).box == (0, 0, 0.375, 1)


def test_wrong_lines_are_left_out_and_counted(tmp_path):
    entries = [
        {"image_rpath": "a.png", "caption": "fine"},
        '{"image_rpath": "a.png", "capt',
        "[1, 2]",
        "",
        {"caption": "no image"},
        {"image_rpath": "b.png", "caption": "absent"},
        {"image": "a.png", "caption": "\x00"},
        {"image": "a.png", "elems": [{"caption": "x", "bb": [0, 0, 0, 0]}]},
        {"binary": "%%%", "caption": "x"},
        {"binary": "", "caption": "x"},
        {"binary": "aaaa", "caption": "x"},
        {"image": "a.png", "caption": "fine too"},
    ]
    source = opened(tmp_path, *entries)
    assert len(source) == 11 and [s.captions[0] for _, s in readable(source)] == ["fine", "fine too"]
    assert source.skipped.counts() == {
        "line is damaged": 1,
        "line is not an object": 1,
        "line without an image": 1,
        "missing image": 1,
        "caption holds NUL": 1,
        "line without a usable caption or box": 2,
        "box of a region has no area": 1,
        "image is not base64": 1,
        "empty file": 1,
        "unreadable image": 1,
    }


@pytest.mark.parametrize("text, expected", [("{}\n{}\n", [0, 3, 6]), ('{}\n\n \n{"é":1}', [0, 6, 14]), ("", [0])])
def test_line_breaks(text, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("train.data.region_lines._CHUNK", 2)
    (tmp_path / "f.jsonl").write_text(text, encoding="utf-8")
    found = scan_lines(tmp_path / "f.jsonl").tolist()
    # A blank line before an end is passed over with its place.
    assert found[-1] == len(text.encode()) and len(found) == len(expected)


def test_noted_line_breaks_are_used_while_they_fit(tmp_path):
    path = write(tmp_path / "f.jsonl", [{"a": 1}, {"a": 2}])
    np.save(offsets_file(path), np.array([0, path.stat().st_size]))
    assert len(line_offsets(path)) == 2
    path.write_text(path.read_text() + '\n{"a":3}')
    assert len(line_offsets(path)) == 4
    offsets_file(path).write_bytes(b"junk")
    assert len(line_offsets(path)) == 4


def test_a_folder_of_lines_has_the_splits_of_its_names(tmp_path):
    picture(tmp_path / "images" / "a.png")
    for split, count in (("train", 3), ("val", 2), ("testA", 1), ("testB", 4)):
        write(tmp_path / f"{split}.jsonl", [{"image": "a.png", "caption": f"{split} {i}"} for i in range(count)])
    assert check_source(str(tmp_path)).kind == "lines"
    assert [len(open_dataset(str(tmp_path), split)) for split in ("train", "val", "test")] == [3, 2, 5]
    assert len(open_dataset(str(tmp_path / "testA.jsonl"), "val", whole=True)) == 1
    assert len(open_dataset(str(tmp_path) + "/test{A,B}.jsonl", "test")) == 5
    assert open_dataset(str(tmp_path), "val")[1].captions == ("val 1",)


def test_without_splits_a_share_is_held_out(tmp_path):
    picture(tmp_path / "a.png")
    for number in range(4):
        write(tmp_path / f"{number}.jsonl", [{"image": "a.png", "caption": f"{number} {i}"} for i in range(50)])
    spec = f"{tmp_path}/{{0..3}}.jsonl?val_share=0.2"
    parts = [{s.captions for _, s in readable(open_dataset(spec, split))} for split in ("train", "val")]
    assert len(parts[0]) + len(parts[1]) == 200 and not parts[0] & parts[1] and 20 < len(parts[1]) < 60
    with pytest.raises(DataError, match="names no splits"):
        open_dataset(spec, "test")


def test_region_batches_of_lines_do_not_depend_on_workers(tmp_path):
    lines = [
        {"image": "a.png", "elems": [{"caption": f"box {i}", "bb": [x, 2, 9, 9]} for x in range(0, 30, 10)]}
        for i in range(40)
    ]
    source = opened(tmp_path, *lines)

    def made(workers):
        loader = region_batches(source, TOKENIZER, elements=16, workers=workers, **FORM)
        found = list(itertools.islice(loader, 4))
        loader.close()
        return found

    assert all(map(same, made(0), made(2)))


def test_lines_without_captions_survive_shards_and_can_be_looked_at(tmp_path, capsys):
    elem = {**ELEM, "attributes": ["bright", "dark"]}
    lines = [{"image": "a.png", "elems": [elem, {**ELEM, "bb": [x, 2, 9, 9]}]} for x in range(12)]
    source = opened(tmp_path, *lines)
    spec = f"{tmp_path / 'lines.jsonl'}"
    assert prepare([spec, str(tmp_path / "shards"), "--splits", "train", "--workers", "1"]) == 0
    assert inspect([spec, "--sheet", str(tmp_path / "sheet.png")]) == 0 and (tmp_path / "sheet.png").stat().st_size > 0
    assert "captions an image   0 / 0 / 0 / 0" in capsys.readouterr().out
    kept = open_dataset(spec, "train")
    shards = open_dataset(str(tmp_path / "shards"), "train")
    assert len(shards) == len(kept) and shards.region_count(0) == 2
    for index in range(len(kept)):
        read, stored = kept[index], shards[index]
        assert stored.captions == () and [r.box for r in stored.regions] == [r.box for r in read.regions]
        assert stored.regions[0].attributes == {"phrases": ["bright a red box", "dark a red box"]}
    with pytest.raises(BadSample, match="missing caption"):
        shards.pair(0, 0)
    assert len(source) == 12


def test_wrong_specifications_are_told_in_one_line(tmp_path):
    write(tmp_path / "lines.jsonl", [{}])
    for spec, message in {
        f"{tmp_path}/line.jsonl": "did you mean",
        f"{tmp_path}/lines.jsonl?image=x": "did you mean 'images'",
        f"{tmp_path}/lines.jsonl?images=nowhere": "no folder 'nowhere'",
        f"table:{tmp_path}/lines.jsonl": "looks like 'lines'",
        f"{tmp_path}/lines{{0..2}}.jsonl": "no file",
    }.items():
        with pytest.raises(DataError) as caught:
            check_source(spec)
        assert message in str(caught.value) and "\n" not in str(caught.value)
