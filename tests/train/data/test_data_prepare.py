"""Shards out of every source: the same samples back, whatever stopped the work and however often it is started."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.train.data.folders import karpathy, pixels, sample_members, write_coco, write_images, write_table, write_tar
from tests.train.data.test_data_loader import same, take
from tests.train.data.test_data_sources import assert_same_content
from train.data import open_dataset, readable
from train.data.inspect import main as inspect
from train.data.prepare import main as prepare

ROOT = Path(__file__).parents[3]


def made(spec, out, *more):
    assert prepare([str(spec), str(out), "--workers", "1", "--shard-samples", "4", *more]) == 0
    return out


@pytest.mark.parametrize("kind", ["table", "coco", "karpathy", "shards", "classes", "scenes", "mixture"])
def test_samples_come_back_from_every_source(kind, tmp_path):
    table = write_table(tmp_path / "table", 9, 3)
    write_images(tmp_path / "classes" / "dog", range(4))
    (tmp_path / "k.json").write_text(json.dumps(karpathy(9, 3)))
    specs = {
        "table": str(table),
        "coco": str(write_coco(tmp_path / "coco", 9, 3)),
        "karpathy": f"{tmp_path / 'k.json'}?images={table / 'images'}",
        "shards": str(write_tar(tmp_path / "w.tar", [m for n in range(9) for m in sample_members(n)])),
        "classes": str(tmp_path / "classes"),
        "scenes": "scenes?count=6&fresh=false",
        "mixture": f"{table}=1,{table}/captions.tsv=2",
    }
    out = made(specs[kind], tmp_path / "out", "--splits", "train")
    assert_same_content(open_dataset(specs[kind]), open_dataset(str(out)))


def test_regions_come_back(tmp_path):
    spec = "scenes?count=6&fresh=false"
    out = made(spec, tmp_path / "out", "--splits", "train")
    for (_, mine), (_, theirs) in zip(readable(open_dataset(spec)), readable(open_dataset(str(out))), strict=True):
        assert [r[:3] for r in mine.regions] == [r[:3] for r in theirs.regions]
        assert mine.described() and len(mine.described()) == len(theirs.described())


def test_batches_are_those_of_the_source(tmp_path):
    table = write_table(tmp_path / "table", 21, 3)
    coco = write_coco(tmp_path / "coco", 21, 3)
    out = made(table, tmp_path / "out")
    sources = [open_dataset(str(path)) for path in (table, coco, out)]
    first, second, third = (take(6, source) for source in sources)
    assert all(map(same, first, third))
    assert all(a[:4][i].equal(b[:4][i]) for a, b in zip(first, second) for i in range(4))


def test_the_index_counts_sizes_and_hashes(tmp_path, capsys):
    from hashlib import sha256

    table = write_table(tmp_path / "table", 9, 3)
    (table / "images" / "2.png").unlink()
    (table / "images" / "3.png").write_bytes(pixels(3)[:99])
    out = made(table, tmp_path / "out")
    index = json.loads((out / "index.json").read_text())
    assert [(s["split"], s["samples"]) for s in index["shards"]] == [
        ("train", 2),
        ("train", 4),
        ("train", 1),
        ("val", 3),
    ]
    for entry in index["shards"]:
        data = (out / entry["file"]).read_bytes()
        assert entry["bytes"] == len(data) and entry["sha256"] == sha256(data).hexdigest()
    assert index["left_out"] == {"missing image": 1, "unreadable image": 1}
    told = capsys.readouterr().out
    assert "train: 7 samples, 3 shards" in told and "1 x missing image (first: 2.png)" in told
    assert [len(open_dataset(str(out), split)) for split in ("train", "val")] == [7, 3]


def test_workers_change_nothing_and_finished_work_is_kept(tmp_path, capsys):
    table = write_table(tmp_path / "table", 30, 3)
    one, two = made(table, tmp_path / "one"), made(table, tmp_path / "two", "--workers", "3")
    shards = sorted(path.name for path in one.glob("*.tar"))
    assert len(shards) == 9
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in shards)
    before = {name: (one / name).stat().st_mtime_ns for name in shards}
    whole = (one / "index.json").read_text()
    # As if it had been killed in the middle: a shard that is not whole, one without a record, no index.
    (one / shards[2]).write_bytes(b"half")
    (one / ".parts" / f"{shards[4]}.json").unlink()
    (one / "index.json").unlink()
    capsys.readouterr()
    made(table, one)
    assert "7 shards were there already" in capsys.readouterr().out
    assert (one / "index.json").read_text() == whole
    changed = [name for name in shards if (one / name).stat().st_mtime_ns != before[name]]
    assert changed == [shards[2], shards[4]]


def test_another_work_in_the_same_folder_is_refused(tmp_path, capsys):
    table = write_table(tmp_path / "table", 9, 3)
    out = made(table, tmp_path / "out")
    assert prepare([str(table), str(out), "--shard-samples", "5"]) == 2
    assert "begun with another shard_samples (4, not 5)" in capsys.readouterr().err
    with (table / "captions.tsv").open("a") as file:
        file.write("8.png\tone more\ttrain\n")
    assert prepare([str(table), str(out), "--shard-samples", "4"]) == 2
    assert "begun with another source" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    assert prepare([str(table), str(tmp_path / "full")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_killed_start_is_continued(tmp_path):
    table = write_table(tmp_path / "table", 60, 3)
    line = [sys.executable, "-m", "train.data.prepare", str(table), str(tmp_path / "out"), "--shard-samples", "2"]
    process = subprocess.Popen([*line, "--workers", "2"], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list((tmp_path / "out").glob("*.tar")) and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    time.sleep(0.1)
    assert prepare(line[3:]) == 0
    assert_same_content(open_dataset(str(table)), open_dataset(str(tmp_path / "out")))


def test_large_images_are_brought_down(tmp_path):
    (tmp_path / "images").mkdir()
    for name, size in (("wide.png", (90, 60)), ("small.png", (20, 30))):
        Image.new("RGB", size, (9, 99, 200)).save(tmp_path / "images" / name)
    (tmp_path / "captions.tsv").write_text("image\tcaption\tsplit\nwide.png\tw\ttrain\nsmall.png\ts\ttrain\n")
    out = made(tmp_path, tmp_path / "out", "--image-size", "40")
    assert [sample.image.size for _, sample in readable(open_dataset(str(out)))] == [(60, 40), (20, 30)]


def test_inspect_tells_and_accounts_for_every_sample(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = write_table(tmp_path / "table", 30, 3)
    (table / "images" / "2.png").unlink()
    assert inspect([str(table), "--all", "--image-size", "16"]) == 0
    told = capsys.readouterr().out
    assert "train: 30 samples; opened 30: 29 good, 1 left out" in told and "val: 3 samples" in told
    for words in (
        "captions an image   1 / 2 / 3 / 3",
        "words a caption     4 / 4",
        "width in pixels     26",
        "images/s",
    ):
        assert words in told
    sheet = np.array(Image.open(tmp_path / "contact_sheet.png"))
    assert sheet.shape[2] == 3 and (sheet < 250).any(axis=2).mean() > 0.02
    assert inspect([str(tmp_path / "tabel")]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert inspect([str(table), "--sheet", "sheet"]) == 2
    told = capsys.readouterr()
    assert told.err == "error: --sheet sheet: a picture's name ends in .png, .jpg, .jpeg\n" and not told.out
