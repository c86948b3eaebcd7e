"""COCO and Karpathy JSON, class folders, mixtures: what each gives, and what each leaves out and counts."""

import json

import numpy as np
import pytest

from tests.train.data.folders import captions, karpathy, pixels, write_coco, write_images, write_table
from tests.train.data.test_data_loader import Numbers, same, take
from train.data import DataError, open_dataset, parse_spec, readable
from train.data.mixture import PERIOD, Mixture


def content(source):
    return [(sample.key.rpartition("/")[2], sample.captions, np.array(sample.image)) for _, sample in readable(source)]


def assert_same_content(a, b):
    a, b = content(a), content(b)
    assert [x[:2] for x in a] == [x[:2] for x in b]
    assert all(np.array_equal(x[2], y[2]) for x, y in zip(a, b))


@pytest.mark.parametrize("kind", ["coco folder", "coco file", "karpathy", "karpathy prefix"])
def test_json_gives_what_a_table_gives(kind, tmp_path):
    table = write_table(tmp_path / "table", 9, 3)
    if kind.startswith("coco"):
        folder = write_coco(tmp_path / "coco", 9, 3)
        spec = str(folder)
        if kind == "coco file":
            files = {s: f"{folder}/annotations/captions_{s}2017.json" for s in ("train", "val")}
    else:
        (table / "dataset.json").write_text(json.dumps(karpathy(9, 3)))
        spec = f"{'karpathy:' if 'prefix' in kind else ''}{table / 'dataset.json'}"
    for split in ("train", "val"):
        source = open_dataset(files[split], split, whole=True) if kind == "coco file" else open_dataset(spec, split)
        assert_same_content(source, open_dataset(str(table), split))
        assert not source.skipped


def test_a_coco_file_alone_holds_a_part_out(tmp_path):
    folder = write_coco(tmp_path, 40, 2)
    spec = f"{folder}/annotations/captions_train2017.json?val_share=0.2"
    train, val = open_dataset(spec), open_dataset(spec, "val")
    assert len(train) + len(val) == 40 and 2 <= len(val) <= 16
    assert not set(train.texts()) & set(val.texts())


def test_a_year_is_chosen(tmp_path):
    folder = write_coco(tmp_path, 4, 2)
    (folder / "annotations" / "captions_val2014.json").write_text("{}")
    assert len(open_dataset(str(folder))) == 4
    with pytest.raises(DataError, match="no captions of split 'train'; there are val"):
        open_dataset(f"{folder}?year=2014")
    with pytest.raises(DataError, match="no captions of year 2015; there are 2014, 2017"):
        open_dataset(f"{folder}?year=2015")
    with pytest.raises(DataError, match="no captions of split 'test'; there are train, val"):
        open_dataset(str(folder), "test")


def test_faults_of_coco_are_counted_by_cause(tmp_path):
    folder = write_coco(tmp_path, 8, 2)
    path = folder / "annotations" / "captions_train2017.json"
    data = json.loads(path.read_text())
    data["images"] += [
        {"id": 1000, "file_name": "other.png"},
        {"id": 5000, "file_name": "0.png"},
        {"file_name": "1.png"},
        {"id": 6000},
        {"id": 7000, "file_name": "absent.png"},
        {"id": 8000, "file_name": "silent.png"},
        {"id": 9000, "file_name": "\ud800.png"},
        7,
    ]
    data["annotations"] += [
        {"image_id": 1001, "caption": ""},
        {"image_id": 1001, "caption": None},
        {"image_id": 1002, "caption": "\ud800 broken"},
        {"image_id": 1002, "caption": "b@d"},
        {"image_id": 99, "caption": "of nothing"},
        {"image_id": [1], "caption": "of a list"},
        {"image_id": 7000, "caption": "of an absent image"},
        {"image_id": 9000, "caption": "of a name that is none"},
        "words",
    ]
    path.write_bytes(json.dumps(data).encode().replace(b"b@d", b"b\xe9d"))
    (folder / "train2017" / "3.png").write_bytes(pixels(3)[:200])
    (folder / "train2017" / "4.png").write_bytes(b"")
    (folder / "train2017" / "5.png").write_bytes(b"<html>not found</html>")
    source = open_dataset(str(folder))
    good = list(readable(source))
    assert source.skipped.counts() == {
        "duplicate key": 2,
        "image without an id": 2,
        "empty image name": 1,
        "empty caption": 2,
        "caption is not UTF-8": 2,
        "caption of an image that is not listed": 3,
        "image without a usable caption": 1,
        "missing image": 1,
        "unreadable image": 3,
        "empty file": 1,
    }
    assert len(good) + len(source.skipped.samples) == 11 and len(good) == 5


def test_faults_of_karpathy_are_counted_by_cause(tmp_path):
    write_images(tmp_path, range(4))
    data = karpathy(4, 0)
    data["images"] += [data["images"][0], {"split": "train"}, {"filename": "x.png", "split": "train"}, 3]
    data["images"] += [{"filename": "y.png", "split": "trian", "sentences": [{"raw": "words"}]}]
    data["images"][1]["sentences"] += [{"tokens": []}, "words"]
    (tmp_path / "k.json").write_text(json.dumps(data))
    source = open_dataset(str(tmp_path / "k.json"))
    assert len(list(readable(source))) == 4
    assert source.skipped.counts() == {
        "duplicate key": 1,
        "empty image name": 2,
        "image without a usable caption": 1,
        "unknown split": 1,
        "empty caption": 2,
    }


JSON_WRONG = {
    "": "empty file",
    "{": "not a JSON file",
    "[]": "no list 'images'; it is no object",
    '{"pictures": []}': "no list 'images'; its keys are pictures",
    '{"images": [], "annotations": 3}': "no list 'annotations'",
    '{"images": [], "annotations": []}': "no usable row for split 'train'",
}


@pytest.mark.parametrize("text, message", JSON_WRONG.items())
def test_json_of_another_kind_is_told_in_one_line(text, message, tmp_path):
    (tmp_path / "captions.json").write_text(text)
    with pytest.raises(DataError) as caught:
        open_dataset(str(tmp_path / "captions.json"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_classes_become_captions(tmp_path):
    for split, numbers in (("train", range(6)), ("val", range(6, 8))):
        for n in numbers:
            write_images(tmp_path / split / ("tabby_cat" if n % 2 else "dog"), [n])
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no image")
    train, val = open_dataset(str(tmp_path)), open_dataset(f"classes:{tmp_path}?template=one {{}}", "val")
    assert [s.captions for _, s in readable(train)] == [("a photo of a dog",)] * 3 + [("a photo of a tabby cat",)] * 3
    assert [s.captions[0] for _, s in readable(val)] == ["one dog", "one tabby cat"]
    assert train.skipped.counts() == {"file is no image": 1}
    flat = open_dataset(f"{tmp_path / 'train'}", whole=True)
    assert len(flat) == 6 and flat[0].key == "dog/0.png"


WRONG = {
    "coco:{}/t": "folder '{}/t' holds no source of kind 'coco'",
    "karpathi:{}/t/captions.tsv": "did you mean 'karpathy'?",
    "{}/t?images=x&year=1": "unknown option 'year'",
    "{}/c/x-{000..003}.tar": "no file '{}/c/x-000.tar'",
    "{}/c/x-{000..003.tar": "a brace is not closed",
    "{}/c/{a,b}.txt": "shards end in .tar",
    "classes:{}/c?template=cat": "template=cat is not a caption with {} in it",
    "{}/z.tar.gz": "compressed",
    "scenes=1,{}/t=0.00001": "below 1/4096 of all",
}


@pytest.mark.parametrize("spec, message", WRONG.items())
def test_wrong_specifications_are_told_in_one_line(spec, message, tmp_path):
    write_table(tmp_path / "t", 3, 2)
    write_images(tmp_path / "c" / "cat", [1])
    (tmp_path / "z.tar.gz").touch()
    where = str(tmp_path)
    with pytest.raises(DataError) as caught:
        open_dataset(spec.replace("{}/", f"{where}/"))
    assert message.replace("{}/", f"{where}/") in str(caught.value) and "\n" not in str(caught.value)


def test_mixtures_are_parsed():
    parsed = parse_spec("scenes?count=5=0.7,http://h/a/{000..002}.tar?x=1=0.2,pipe:aws s3 cp s3://b/{a,b}.tar -=0.1")
    assert parsed.weights == (0.7, 0.2, 0.1)
    assert [len(part.shards) for part in parsed.parts] == [0, 3, 2]
    assert parsed.parts[1].shards[1] == "http://h/a/001.tar?x=1"
    assert parsed.parts[2].shards == ("pipe:aws s3 cp s3://b/a.tar -", "pipe:aws s3 cp s3://b/b.tar -")


class Named(Numbers):
    def __init__(self, size, name, **options):
        super().__init__(size, **options)
        self.name = name

    def pair(self, index, pick):
        image, caption, key = super().pair(index, pick)
        return image, caption, f"{self.name}{key}"


def test_a_mixture_holds_its_shares_and_shows_every_sample_before_any_again():
    mixture = Mixture([Named(30, "a"), Named(700, "b")], [3, 1], "mixture")
    made = np.concatenate([mixture.order(epoch, np.arange(730), 5) for epoch in range(13)])
    samples = mixture.identities(made)
    shares = [(samples[s : s + PERIOD] < 30).mean() for s in (0, PERIOD)]
    assert shares == [0.75, 0.75]
    for mine, size in ((samples[samples < 30], 30), (samples[samples >= 30], 700)):
        passes = [mine[begin : begin + size].tolist() for begin in range(0, len(mine) - size, size)]
        assert len(passes) > 2 and all(len(set(shown)) == size for shown in passes)
        assert passes[0] != passes[1]
    other = np.concatenate([mixture.order(epoch, np.arange(730), 6) for epoch in range(2)])
    assert not np.array_equal(made[: len(other)], other)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixture_is_the_same_for_ranks_workers_and_from_any_place(workers):
    def make():
        return Mixture([Named(30, "a", bad=(3,)), Named(50, "b", fresh=True)], [1, 2], "mixture")

    whole = take(25, make())
    per_epoch = 80 // 8
    for done in (3, 10, 17):
        epoch, start = divmod(done, per_epoch)
        assert all(map(same, whole[done:], take(25 - done, make(), epoch=epoch, start=start, workers=workers)))
    parts = [take(25, make(), rank=rank, world=2) for rank in range(2)]
    assert all(batch.keys == a.keys + b.keys for batch, a, b in zip(whole, *parts))
    # The same sample has the same id, another sample of a fresh source another one.
    ids = {}
    for batch in whole:
        for key, number in zip(batch.keys, batch.ids.tolist()):
            assert ids.setdefault(key, number) == number
    assert len(set(ids.values())) == len(ids) > 100


def test_mixtures_serve_every_command(tmp_path):
    write_table(tmp_path / "t", 6, 2)
    source = open_dataset(f"scenes?count=10=0.5,{tmp_path / 't'}=0.5")
    assert len(source) == 16 and source.repeats
    assert len(list(readable(source))) == 16
    assert source[10].captions == tuple(captions(0))
    parts = [list(open_dataset(spec).texts(6)) for spec in ("scenes?count=10", str(tmp_path / "t"))]
    assert list(source.texts(12)) == parts[0] + parts[1]
    val = open_dataset(f"scenes=0.5,{tmp_path / 't'}=0.5", "val")
    assert len(val) == len(open_dataset("scenes", "val")) + 2
