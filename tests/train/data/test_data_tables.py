"""Tables: what the header means, what is left out and counted, and errors that name the right path."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.data import BadSample, DataError, check_source, open_dataset, parse_spec, readable

ROOT = Path(__file__).parents[3]


def picture(path, size=(40, 30), color=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def table(path, rows, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join("\t".join(row) for row in rows).encode(encoding) + b"\n")
    return path


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        picture(tmp_path / "images" / f"{i}.png", color=(40 * i, 10, 10))
    rows = [["image", "split", "caption"]]
    rows += [[f"{i}.png", "val" if i == 5 else "train", f"caption {j} of {i}"] for i in range(6) for j in range(3)]
    table(tmp_path / "captions.tsv", rows)
    return tmp_path


def test_rows_of_an_image_are_its_captions(folder):
    train, val = (open_dataset(str(folder), split) for split in ("train", "val"))
    assert (len(train), len(val)) == (5, 1)
    sample = train[2]
    assert sample.captions == ("caption 0 of 2", "caption 1 of 2", "caption 2 of 2")
    assert sample.key == "2.png"
    assert sample.image.size == (40, 30) and np.array(sample.image)[0, 0].tolist() == [80, 10, 10]
    image, caption, key = train.pair(2, 7)
    assert (caption, key, image.size) == ("caption 1 of 2", "2.png", (40, 30))
    assert list(val.texts()) == [f"caption {j} of 5" for j in range(3)]
    assert len(list(train.texts(2))) == 6
    assert not train.skipped and train.skipped.line() == ""


@pytest.mark.parametrize("image", ["image", "filepath", "path", "file"])
@pytest.mark.parametrize("caption", ["caption", "title", "text"])
def test_header_names(image, caption, tmp_path):
    picture(tmp_path / "a.png")
    table(tmp_path / "t.tsv", [["id", caption.upper(), image], ["1", "words", "a.png"]])
    assert open_dataset(str(tmp_path / "t.tsv"))[0].captions == ("words",)


def test_images_beside_the_table_in_a_folder_or_anywhere(tmp_path):
    picture(tmp_path / "beside.png")
    picture(tmp_path / "images" / "inside.png")
    picture(tmp_path / "far" / "away.png")
    names = ["beside.png", "inside.png", str(tmp_path / "far" / "away.png")]
    path = table(tmp_path / "t.tsv", [["image", "caption", "split"]] + [[name, "words", "train"] for name in names])
    assert [sample.key for _, sample in readable(open_dataset(str(path)))] == names
    other = table(tmp_path / "elsewhere" / "t.tsv", [["image", "caption"], ["beside.png", "a"]])
    assert open_dataset(f"{other}?images={tmp_path}")[0].captions == ("a",)


def test_csv_quotes_and_byte_order_mark(tmp_path):
    picture(tmp_path / "a.png")
    text = '\ufefffilepath,title\r\na.png,"a ""red"" ball,\r\non grass"\r\na.png,plain\r\n'
    (tmp_path / "t.csv").write_bytes(text.encode())
    assert open_dataset(str(tmp_path / "t.csv"))[0].captions == ('a "red" ball,\r\non grass', "plain")


def test_tsv_quotes_are_letters(tmp_path):
    picture(tmp_path / "a.png")
    table(tmp_path / "t.tsv", [["image", "caption"], ["a.png", '"quoted'], ["a.png", 'a "b" c']])
    assert open_dataset(str(tmp_path / "t.tsv"))[0].captions == ('"quoted', 'a "b" c')


def test_without_a_split_column_names_decide(tmp_path):
    rows = [["image", "caption"]] + [[f"{i}.png", f"words {i}"] for i in range(2000)]
    path = table(tmp_path / "t.tsv", rows)
    train, val = open_dataset(str(path), "train"), open_dataset(str(path), "val")
    assert len(train) + len(val) == 2000
    assert 20 <= len(val) <= 60
    held = set(val.texts())
    assert not held & set(train.texts())
    # Neither the order of the rows nor what else is in the table moves an image.
    path = table(tmp_path / "u.tsv", [rows[0], *reversed(rows[1:1500])])
    assert set(open_dataset(str(path), "val").texts()) == held & {caption for _, caption in rows[1:1500]}
    assert 150 <= len(open_dataset(f"{path}?val_share=0.2", "val")) <= 450


def test_a_small_table_has_both_parts(tmp_path):
    path = table(tmp_path / "t.tsv", [["image", "caption"], ["a.png", "a"], ["b.png", "b"]])
    assert len(open_dataset(str(path), "train")) == len(open_dataset(str(path), "val")) == 1
    with pytest.raises(DataError, match="no split 'test'"):
        open_dataset(str(path), "test")


def test_names_of_splits(tmp_path):
    rows = [
        ["image", "caption", "split"],
        ["a", "a", "Train"],
        ["b", "b", "validation"],
        ["c", "c", "dev"],
        ["d", "d", "x"],
    ]
    path = table(tmp_path / "t.tsv", rows)
    assert [len(open_dataset(str(path), split)) for split in ("train", "val")] == [1, 2]
    assert open_dataset(str(path)).skipped.counts() == {"unknown split": 1}
    with pytest.raises(DataError, match=r"no usable row for split 'test'; it has: train, val; unknown split 'x'"):
        open_dataset(str(path), "test")


@pytest.mark.parametrize("value, hint", [("trian", "did you mean 'train'"), ("", "there are train, val and test")])
def test_an_unknown_split_is_told(value, hint, tmp_path):
    path = table(tmp_path / "t.tsv", [["image", "split", "caption"], ["a", value, "a"]])
    with pytest.raises(DataError, match=f"unknown split '{value}'; {hint}.*1 x unknown split") as caught:
        open_dataset(str(path))
    assert "it has" not in str(caught.value)


@pytest.mark.parametrize("images", [3, 40])
def test_two_images_are_held_out_where_there_are_three(images, tmp_path):
    rows = [["image", "caption"], ["bad.png", ""]] + [[f"{i}.png", f"words {i}"] for i in range(images)]
    path = table(tmp_path / "t.tsv", rows)
    train, val = (open_dataset(str(path), split) for split in ("train", "val"))
    assert len(val) >= 2 and len(train) >= 1 and len(train) + len(val) == images
    assert not set(train.texts()) & set(val.texts())


def test_a_whole_table_serves_one_split(tmp_path):
    path = table(tmp_path / "t.tsv", [["image", "caption"]] + [[f"{i}.png", "words"] for i in range(5)])
    assert [len(open_dataset(str(path), split, whole=True)) for split in ("train", "val", "test")] == [5, 5, 5]
    path = table(tmp_path / "u.tsv", [["image", "caption", "split"], ["a", "a", "train"], ["b", "b", "val"]])
    assert len(open_dataset(str(path), "val", whole=True)) == 1
    assert len(open_dataset("scenes", "val", whole=True)) == len(open_dataset("scenes", "val"))


def test_sources_open_without_torch(folder):
    code = f"""if True:
        import sys
        from train.data import open_dataset
        assert len(open_dataset({str(folder)!r}, "val")) and len(open_dataset("scenes"))
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_bad_rows_are_counted_by_cause(tmp_path):
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    rows = [
        b"image\tcaption\tsplit",
        b"a.png\tgood\ttrain",
        b"a.png\t\ttrain",
        b"a.png\t   \ttrain",
        b"a.png\tcaf\xe9\ttrain",
        b"a.png\tnull\x00byte\ttrain",
        b"a.png\t" + b"long " * 4000 + b"\ttrain",
        b"a.png\tof two splits\tval",
        b"a.png",
        b"",
        b"\tno image\ttrain",
        b"b.png\t\ttrain",
        b"c.png\tcaf\xc3\xa9\ttrain",
    ]
    (tmp_path / "t.tsv").write_bytes(b"\n".join(rows))
    dataset = open_dataset(str(tmp_path / "t.tsv"))
    assert [sample.captions for _, sample in readable(dataset)] == [("good",), ("café",)]
    assert dataset.skipped.counts() == {
        "empty caption": 3,
        "caption is not UTF-8": 1,
        "caption holds NUL": 1,
        "caption over 10000 characters": 1,
        "image is of another split already": 1,
        "row lacks a column": 1,
        "empty image name": 1,
        "image without a usable caption": 1,
    }
    line = dataset.skipped.line()
    assert "\n" not in line and "3 x empty caption (first: t.tsv:3)" in line


def test_bad_images_are_counted_by_cause_and_stop_nothing(tmp_path):
    picture(tmp_path / "good.png")
    (tmp_path / "words.jpg").write_text("not an image")
    (tmp_path / "half.png").write_bytes((tmp_path / "good.png").read_bytes()[:50])
    names = ["good.png", "words.jpg", "none.jpg", "half.png"]
    rows = [["image", "caption", "split"]] + [[name, "words", "train"] for name in names]
    dataset = open_dataset(str(table(tmp_path / "t.tsv", rows)))
    assert [index for index, _ in readable(dataset)] == [0]
    # A second look counts nothing twice.
    assert [index for index, _ in readable(dataset)] == [0]
    assert dataset.skipped.counts() == {"unreadable image": 2, "missing image": 1}
    with pytest.raises(BadSample) as caught:
        dataset[2]
    assert (caught.value.cause, caught.value.key) == ("missing image", "none.jpg")


def test_damaged_csv_rows_are_counted(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("image,caption\na.png,one\na.png\na.png,two\n")
    dataset = open_dataset(str(tmp_path / "t.csv"))
    assert dataset[0].captions == ("one", "two")
    assert dataset.skipped.counts() == {"row lacks a column": 1}


@pytest.mark.parametrize("rest", ["x.png,plain\n" * 200, 'x.png,"quoted"\n', "x.png,plain\n", "\n"])
def test_an_unclosed_quote_costs_its_line_alone(rest, tmp_path):
    (tmp_path / "t.csv").write_text('image,caption\na.png,"two\nlines"\nb.png,"unclosed\n' + rest + 'c.png,5" nail\n')
    dataset = open_dataset(str(tmp_path / "t.csv"), whole=True)
    captions = rest.replace('"', "").replace("x.png,", "").split()
    assert list(dataset.texts()) == ["two\nlines", *captions, '5" nail']
    assert dataset.skipped.counts() == {"row is not CSV": 1}
    assert "t.csv:4" in dataset.skipped.line()


@pytest.mark.parametrize("suffix, separator", [("tsv", "\t"), ("csv", ",")])
def test_blank_lines_before_the_header_mean_nothing(suffix, separator, tmp_path):
    (tmp_path / f"t.{suffix}").write_text(f"\n\nimage{separator}caption\n\na{separator}words\n")
    assert list(open_dataset(str(tmp_path / f"t.{suffix}")).texts()) == ["words"]


def test_regions_come_with_the_captions_kept(tmp_path):
    picture(tmp_path / "a.png")
    rows = [
        ["image", "caption", "split"],
        ["a.png", "", "train"],
        ["a.png", "a dog", "train"],
        ["a.png", "a cat", "train"],
    ]
    path = table(tmp_path / "captions.tsv", rows)
    regions = [
        {"phrase": "gone", "bbox": [0, 0, 1, 1], "caption": 0},
        {"phrase": "a dog", "bbox": [0.1, 0.2, 0.3, 0.4], "caption": 1},
        {"phrase": "a cat", "bbox": [0.5, 0.5, 0.9, 0.9], "caption": 2},
        {"phrase": "grass", "bbox": [0, 0.5, 1, 1], "caption": -1},
    ]
    with gzip.open(tmp_path / "regions.jsonl.gz", "wt") as file:
        file.write(json.dumps({"image": "a.png", "regions": regions}) + "\n{damaged\n")
    dataset = open_dataset(str(path))
    sample = dataset[0]
    assert [r.caption for r in sample.regions] == [-1, 0, 1, -1]
    assert [r.phrase for r in sample.described(0)] == ["a dog"]
    assert sample.described(1)[0].box == (0.5, 0.5, 0.9, 0.9)
    assert dataset.skipped.counts()["line of regions is damaged"] == 1


BAD_REGIONS = {
    "region is not an object": 7,
    "region without a phrase": {"phrase": None, "bbox": [0, 0, 1, 1]},
    "box of a region is not four numbers": {"phrase": "a", "bbox": ["a", 0, 1, 1]},
    "box of a region is outside its image": {"phrase": "a", "bbox": [0, 0, 10, float("nan")]},
    "box of a region has no area": {"phrase": "a", "bbox": [0.9, 0, 0.9, 1]},
    "box of a region has swapped corners": {"phrase": "a", "bbox": [0.9, 0, 0.1, 1]},
    "caption of a region is not a whole number": {"phrase": "a", "bbox": [0, 0, 1, 1], "caption": None},
}


def test_damaged_regions_stop_nothing(tmp_path):
    picture(tmp_path / "a.png")
    path = table(tmp_path / "captions.tsv", [["image", "caption"], ["a.png", "a dog"]])
    good = {"phrase": "a dog", "bbox": [0, 0, 1, 1], "caption": 0}
    entry = json.dumps({"image": "a.png", "regions": [*BAD_REGIONS.values(), good, {**good, "caption": 3}]}).encode()
    lines = [b"[" * 100_000, b'{"image": [], "regions": []}', b'{"image": "a.png", "regions": 3}', b"\xff", entry]
    (tmp_path / "regions.jsonl").write_bytes(b"\n".join(lines))
    dataset = open_dataset(str(path))
    assert [(r.phrase, r.caption) for r in dataset[0].regions] == [("a dog", 0), ("a dog", -1)]
    assert dataset.skipped.counts() == {**dict.fromkeys(BAD_REGIONS, 1), "line of regions is damaged": 4}


@pytest.mark.parametrize(
    "damage", [b"not gzip", gzip.compress(b"{}\n" * 9999)[:-20] + b"\xff" * 20], ids=["no gzip", "broken gzip"]
)
def test_a_damaged_file_of_regions_stops_nothing(damage, tmp_path):
    picture(tmp_path / "a.png")
    path = table(tmp_path / "captions.tsv", [["image", "caption"], ["a.png", "a dog"]])
    (tmp_path / "regions.jsonl.gz").write_bytes(damage)
    dataset = open_dataset(str(path))
    assert dataset[0].regions is None
    assert dataset.skipped.counts()["file of regions is damaged"] == 1


WRONG = {
    "": "empty",
    "scene": "did you mean 'scenes'?",
    "Scenes": "did you mean 'scenes'?",
    "scenes?cuont=5": "unknown option 'cuont'; did you mean 'count'?",
    "scenes?count=many": "option count=many is not a whole number of at least 1",
    "scenes?count=0": "option count=0 is not a whole number of at least 1",
    "scenes?count=99999999999999999999": "is not a whole number of at least 1",
    "scenes?count": "option 'count' is not KEY=VALUE",
    "{}/caption.tsv": "did you mean '{}/captions.tsv'?",
    "{}/captions.tvs": "did you mean '{}/captions.tsv'?",
    "{}/captions.tsv?val_shar=0.1": "did you mean 'val_share'?",
    "{}/captions.tsv?val_share=2": "val_share=2 is not a number between 0 and 1",
    "{}/captions.tsv?images={}/imagse": "did you mean '{}/images'?",
    "{}/images": "no captions.tsv in folder '{}/images'",
    "{}/nothing": "empty folder '{}/nothing'",
    "{}/nothing/deep/er.tsv": "the nearest existing path is '{}/nothing'",
    "{}/zero.tsv": "empty file",
    "{}/header.tsv": "a header and no rows",
    "{}/commas.tsv": "separated by tabs",
    "{}/other.tsv": "no column of the header ['id', 'captoin'] is called image or filepath or path or file",
    "{}/notes.txt": "is of no known kind",
    "scenes=0.7,{}/captoins.tsv=0.3": "did you mean '{}/captions.tsv'?",
    "scenes=0.7,{}/captions.tsv=0": "the weight of '{}/captions.tsv' is not above 0",
}


@pytest.mark.parametrize("spec, message", WRONG.items(), ids=[s or "empty" for s in WRONG])
def test_wrong_specifications_are_told_in_one_line(spec, message, folder):
    (folder / "nothing").mkdir()
    (folder / "zero.tsv").touch()
    (folder / "header.tsv").write_text("image\tcaption\n\n")
    (folder / "commas.tsv").write_text("image,caption\na.png,words\n")
    (folder / "other.tsv").write_text("id\tcaptoin\n1\t2\n")
    (folder / "notes.txt").write_text("image\tcaption\na\tb\n")
    spec, message = spec.replace("{}", str(folder)), message.replace("{}", str(folder))
    for check in (check_source, open_dataset):
        with pytest.raises(DataError) as caught:
            check(spec)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, ValueError)


def test_a_wrong_split_is_told():
    with pytest.raises(DataError, match="no split 'training'"):
        open_dataset("scenes", "training")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_table_is_told(folder):
    (folder / "captions.tsv").chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        check_source(str(folder))


@pytest.mark.parametrize(
    "refused", ["pathlib.Path.exists", "pathlib.Path.is_file", "pathlib.Path.iterdir", "builtins.open"]
)
def test_what_the_system_refuses_is_told(refused, folder, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    (folder / "nothing").mkdir()
    monkeypatch.setattr(refused, refuse)
    path = folder / "nothing" if refused.endswith("iterdir") else folder
    with pytest.raises(DataError, match=rf"^data source '{path}[^\n]*': Permission denied$"):
        open_dataset(str(path))


def test_names_too_long_for_the_system_are_told(folder):
    for spec in ("a" * 5000, f"{folder}/captions.tsv?images={'a' * 5000}"):
        with pytest.raises(DataError, match="File name too long"):
            open_dataset(spec)
    path = table(folder / "long.tsv", [["image", "caption", "split"], ["a" * 5000, "words", "train"]])
    assert not list(readable(open_dataset(str(path))))


def test_right_specifications(folder):
    assert parse_spec("scenes?count=10&fresh=false&seed=3").options == {"count": 10, "fresh": False, "seed": 3}
    assert check_source(str(folder)).path == folder / "captions.tsv"
    odd = table(folder / "a?b=c,d=1.tsv", [["image", "caption"], ["0.png", "words"]])
    assert check_source(str(odd)).path == odd


def test_the_check_is_quick_and_needs_no_torch(folder):
    code = f"""if True:
        import sys, time
        begin = time.process_time()
        from train.data import DataError, check_source
        check_source({str(folder)!r})
        try:
            check_source({str(folder / "caption.tsv")!r})
        except DataError:
            print(time.process_time() - begin)
        heavy = {{"torch", "numpy", "PIL", "tokenizers"}} & set(sys.modules)
        assert not heavy, heavy
    """
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        times.append(float(done.stdout))
    assert min(times) < 0.3


def test_a_large_table_opens_quickly(tmp_path):
    rows = [["image", "caption"]] + [[f"{i // 5}.jpg", f"caption number {i}"] for i in range(50_000)]
    path = table(tmp_path / "t.tsv", rows)
    begin = time.process_time()
    assert len(open_dataset(str(path))) > 9_000
    assert time.process_time() - begin < 2
