"""Shards: what lies in a tar, what damage costs, what an index knows, and what comes over a network that fails."""

import contextlib
import http.server
import io
import json
import pickle
import tarfile
import threading

import numpy as np
import pytest
import torch

from tests.train.data.folders import captions, pixels, sample_members, write_tar
from tests.train.data.test_data_loader import FORM, TOKENIZER, same, take
from train.data import DataError, batches, fetch, open_dataset, readable
from train.data.braces import expand
from train.data.prepare import main as prepare
from train.data.shard_cache import ShardCache


def tars(folder, shards=3, each=10):
    for s in range(shards):
        members = [m for n in range(s * each, (s + 1) * each) for m in sample_members(n)]
        write_tar(folder / f"{s:03d}.tar", members)
    return folder


def test_braces():
    assert expand("a{08..10}b") == ["a08b", "a09b", "a10b"] and expand("{8..10}") == ["8", "9", "10"]
    assert expand("{a,b{1..2}}-{x,y}") == ["a-x", "a-y", "b1-x", "b1-y", "b2-x", "b2-y"]
    assert expand("plain") == ["plain"] and expand("{one}") == ["{one}"] and expand("{2..1}") == ["2", "1"]


def test_a_sample_is_an_image_and_its_captions(tmp_path):
    rows = [
        ("a/one.jpg.png", b"other"),
        ("a/one.png", pixels(1)),
        ("a/one.txt", b"first\nsecond\n"),
        ("a/two.PNG", pixels(2)),
        ("a/two.json", json.dumps({"captions": ["x", "", "y"], "key": "named"}).encode()),
        ("three.json", b'{"caption": "from json"}'),
        # Members of one sample need not stand together.
        ("a/one.cls", b"7"),
        ("three.png", pixels(3)),
        ("four.png", pixels(4)),
        ("four.json", b"{broken"),
        ("four.txt", b"plain"),
    ]
    path = write_tar(tmp_path / "x.tar", rows)
    source = open_dataset(str(path), whole=True)
    found = {sample.key: sample for _, sample in readable(source)}
    assert {key: sample.captions for key, sample in found.items()} == {
        "a/one": ("first", "second"),
        "named": ("x", "y"),
        "three": ("from json",),
        "four": ("plain",),
    }
    assert found["three"].image.size == (26, 20)
    assert source.encoded(0) == (pixels(1), "png")
    assert source.skipped.counts() == {"empty caption": 1, "JSON of a sample is damaged": 1}


def test_members_are_never_unpickled(tmp_path):
    class Planted:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    planted = pickle.dumps(Planted())
    members = [
        (f"1.{ending}", planted) for ending in ("pyd", "pickle", "pkl", "pth", "pt", "npy", "npz", "json", "txt")
    ]
    path = write_tar(tmp_path / "x.tar", [*sample_members(0), *members, ("1.png", planted), ("2.png", pixels(2))])
    source = open_dataset(str(path), whole=True)
    assert [sample.key for _, sample in readable(source)] == ["00000"]
    take(1, source, global_batch=1)
    assert not (tmp_path / "executed").exists()
    assert source.skipped.counts()["missing caption"] == 1


def damaged(path, how):
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        fifth = tar.getmembers()[8]
    if how == "header":
        data[fifth.offset : fifth.offset + 512] = bytes(range(256)) * 2
    elif how == "cut":
        data = data[: fifth.offset_data + 100]
    elif how == "html":
        data = b"<html>" + b"not found " * 500
    elif how == "empty":
        data = b""
    path.write_bytes(data)


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("how, good", [("header", 9), ("cut", 4), ("html", 0), ("empty", 0), ("gone", 0)])
def test_damage_costs_what_it_hits_and_is_counted(how, good, indexed, tmp_path):
    folder = tars(tmp_path / "s")
    spec = f"{folder}/{{000..002}}.tar"
    if indexed:
        assert prepare(["--index", spec, str(folder / "index.json"), "--workers", "1"]) == 0
    if how == "gone":
        if not indexed:
            return
        (folder / "001.tar").unlink()
        spec = str(folder)
    else:
        damaged(folder / "001.tar", how)
    source = open_dataset(spec, whole=True)
    samples = dict(readable(source))
    assert len(samples) == 20 + good
    assert len(samples) + len(source.skipped.samples) == len(source)
    assert source.skipped and source.skipped.line()
    if indexed:
        assert len(source) == 30
        assert sum(
            count for cause, count in source.skipped.counts().items() if cause.startswith(("lost", "missing"))
        ) == (10 - good)
    for sample in samples.values():
        assert np.array_equal(np.array(sample.image), np.array(open_png(int(sample.key))))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_workers_find_in_shards_reaches_the_account_of_the_run(workers, tmp_path):
    # Two folders whose shards and samples are named alike.
    for folder in ("a", "b"):
        members = [m for n in range(12) for m in sample_members(n)]
        members[4] = ("00002.png", b"")
        path = write_tar(tmp_path / folder / "000.tar", members)
        assert prepare(["--index", str(path), str(path.parent / "index.json"), "--workers", "1"]) == 0
        members[1] = ("00000.txt", b"good\n\n \nalso good")
        members[6:8] = [("00003.png", pixels(3)[:150]), ("00003.txt", b"words"), ("00003.txt", b"again")]
        write_tar(path, members[:-4])
    mixture = open_dataset(f"{tmp_path}/a=0.5,{tmp_path}/b=0.5", whole=True)
    parts = [open_dataset(str(tmp_path / folder), whole=True) for folder in ("a", "b")]
    for source in (mixture, *parts):
        accounts = []
        for rank in range(2):
            # Four passes, since a mixture shows no pass of a source whole in an epoch.
            loader = batches(source, TOKENIZER, global_batch=4, world=2, rank=rank, epochs=4, workers=workers, **FORM)
            accounts.append((loader, {i for batch in loader for i in batch.ids.tolist()}))
        account = accounts[0][0].skipped
        account.add(accounts[1][0].skipped)
        good = accounts[0][1] | accounts[1][1]
        both = len(source) // 12
        assert len(good) == 8 * both and len(good) + len(account.samples) == len(source)
        assert account.counts() == {
            "empty file": both,
            "unreadable image": both,
            "lost: no longer in its shard": 2 * both,
            "duplicate key": both,
            "empty caption": 2 * both,
        }


def open_png(number):
    from PIL import Image

    return Image.open(io.BytesIO(pixels(number)))


def test_faults_of_samples_are_counted_by_cause(tmp_path):
    members = [m for n in range(8) for m in sample_members(n)]
    members[0] = ("00000.png", pixels(0)[:150])
    members[2] = ("00001.png", b"")
    members[5] = ("00002.txt", b"caf\xe9")
    members[7] = ("00003.txt", b"")
    members[9] = ("00004.text", b"words")
    members[10] = ("00005.pdf", b"words")
    members += [("00006.jpg", pixels(1)), ("00006.txt", b"again")]
    source = open_dataset(str(write_tar(tmp_path / "x.tar", members)), whole=True)
    assert [sample.key for _, sample in readable(source)] == ["00006", "00007"]
    assert source.skipped.counts() == {
        "unreadable image": 1,
        "empty file": 1,
        "caption is not UTF-8": 1,
        "empty caption": 1,
        "missing caption": 1,
        "missing image": 1,
        "duplicate key": 2,
    }


def test_shards_without_splits_hold_a_part_out(tmp_path):
    spec = f"{tars(tmp_path)}/{{000..002}}.tar?val_share=0.2"
    train, val = open_dataset(spec), open_dataset(spec, "val")
    assert len(train) + len(val) == len(open_dataset(spec, whole=True)) == 30 and 2 <= len(val) <= 14
    keys = [{sample.key for _, sample in readable(source)} for source in (train, val)]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 30
    with pytest.raises(DataError, match="no index names a split 'test'"):
        open_dataset(spec, "test")


def test_webdataset_writes_what_is_read_and_reads_what_is_written(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as sink:
        for n in range(5):
            sink.write({"__key__": f"{n:03d}", "png": pixels(n), "txt": captions(n)[0], "cls": n})
    source = open_dataset(str(tmp_path / "w.tar"), whole=True)
    assert [(s.key, s.captions) for _, s in readable(source)] == [(f"{n:03d}", (captions(n)[0],)) for n in range(5)]
    assert prepare([str(tmp_path / "w.tar"), str(tmp_path / "out"), "--workers", "1", "--splits", "train"]) == 0
    written = webdataset.WebDataset(str(tmp_path / "out" / "train-000000.tar"), shardshuffle=False)
    train = open_dataset(str(tmp_path / "w.tar"))
    for (_, mine), theirs in zip(readable(train), written, strict=True):
        assert theirs["txt"].decode() == mine.captions[0] and json.loads(theirs["json"])["key"] == mine.key
        assert theirs["png"] == pixels(int(mine.key))


class Failing(http.server.BaseHTTPRequestHandler):
    """Serves a folder; of each file the first requests fail in turn: refused, cut short, cut short, then whole."""

    folder, faults, seen = None, (), {}

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.seen[name] = self.seen.get(name, 0) + 1
        path = self.folder / name
        fault = dict(enumerate(self.faults, 1)).get(self.seen[name])
        if (fault is not None and isinstance(fault, int)) or not path.exists():
            self.send_error(fault or 404)
            return
        data = path.read_bytes()
        begin = int(self.headers["Range"][6:-1]) if "Range" in self.headers else 0
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        rest = data[begin:]
        self.wfile.write(rest[: len(rest) // 2] if fault == "cut" else rest)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(folder, faults=()):
    handler = type("Handler", (Failing,), {"folder": folder, "faults": faults, "seen": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler.seen
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(fetch, "FIRST_WAIT_S", 0.001)


def indexed(folder, shards=6, each=10):
    tars(folder, shards, each)
    pattern = f"{{000..{shards - 1:03d}}}.tar"
    assert prepare(["--index", f"{folder}/{pattern}", str(folder / "index.json"), "--workers", "1"]) == 0
    return pattern


def test_a_failing_server_is_asked_again_from_where_it_stopped(tmp_path, hasty):
    pattern = indexed(tmp_path / "s")
    local = open_dataset(str(tmp_path / "s"), whole=True)
    with serving(tmp_path / "s", (503, "cut", "cut", 429)) as (url, seen):
        source = open_dataset(f"{url}/{pattern}?cache={tmp_path / 'cache'}", whole=True)
        found = [sample for _, sample in readable(source)]
        assert seen == {"index.json": 5} | {f"{s:03d}.tar": 5 for s in range(6)}
    assert [s.key for s in found] == [s.key for _, s in readable(local)] and not source.skipped
    assert all(np.array_equal(np.array(s.image), np.array(open_png(int(s.key)))) for s in found)


@pytest.mark.parametrize("fault", ["absent", "other bytes"])
def test_a_shard_that_does_not_come_is_lost_and_counted(fault, tmp_path, hasty, monkeypatch):
    monkeypatch.setattr(fetch, "ATTEMPTS", 3)
    pattern = indexed(tmp_path / "s")
    path = tmp_path / "s" / "002.tar"
    path.unlink() if fault == "absent" else path.write_bytes(b"x" * path.stat().st_size)
    with serving(tmp_path / "s") as (url, seen):
        source = open_dataset(f"{url}/{pattern}", whole=True)
        assert len(list(readable(source))) == 50 and len(source) == 60
        cause = "HTTP 404" if fault == "absent" else "hash differs from the index, 3 attempts"
        assert source.skipped.counts() == {f"lost: shard did not come ({cause})": 10}
        assert seen["002.tar"] == (1 if fault == "absent" else 3)
        # Training goes on with others in its place.
        made = take(12, source, workers=1)
        assert all(len(batch.keys) == 8 for batch in made)


def test_remote_batches_are_the_same_for_workers_ranks_and_from_any_place(tmp_path):
    pattern = indexed(tmp_path / "s")
    with serving(tmp_path / "s") as (url, _):
        spec = f"{url}/{pattern}?window=2&cache={tmp_path / 'cache'}"
        whole = take(16, open_dataset(spec, whole=True))
        for done in (3, 7, 9):
            epoch, start = divmod(done, 7)
            rest = take(16 - done, open_dataset(spec, whole=True), epoch=epoch, start=start, workers=2)
            assert all(map(same, whole[done:], rest))
        parts = [take(16, open_dataset(spec, whole=True), rank=rank, world=2) for rank in range(2)]
        assert all(batch.keys == a.keys + b.keys for batch, a, b in zip(whole, *parts))
    shown = torch.cat([batch.ids for batch in whole[:7]]).tolist()
    assert len(set(shown)) == 56
    # Two shards at a time: the first 20 samples of an epoch are those of two shards.
    assert len({number // 10 for number in shown[:20]}) == 2


@pytest.mark.parametrize("workers", [0, 3])
def test_without_a_cache_a_shard_is_fetched_about_once_an_epoch(workers, tmp_path):
    pattern = indexed(tmp_path / "s", shards := 40, 2)
    with serving(tmp_path / "s") as (url, seen):
        source = open_dataset(f"{url}/{pattern}?window=2", whole=True)
        loader = batches(source, TOKENIZER, global_batch=2, seed=1, workers=workers, epochs=2, **FORM)
        made = list(loader)
        loader.close()
        fetched = sum(seen.values()) - seen["index.json"]
    for epoch in range(2):
        assert len({key for batch in made if batch.epoch == epoch for key in batch.keys}) == shards * 2
    # Less where the folder still holds some, more by what was asked for of a third epoch.
    assert not loader.skipped and fetched <= 2.25 * shards


def test_a_file_that_another_process_deletes_is_fetched_again(tmp_path, monkeypatch):
    pattern = indexed(tmp_path / "s")
    path, gone = ShardCache.path, []

    def deleted(cache, shard):
        file = path(cache, shard)
        if len(gone) % 2 == 0:
            file.unlink()
        gone.append(file)
        return file

    monkeypatch.setattr(ShardCache, "path", deleted)
    with serving(tmp_path / "s") as (url, seen):
        source = open_dataset(f"{url}/{pattern}", whole=True)
        assert len(list(readable(source))) == 60 and not source.skipped
        assert all(seen[f"{s:03d}.tar"] == 2 for s in range(6))


def test_a_pipe_is_a_command(tmp_path, hasty):
    indexed(tmp_path / "s", 2)
    flag = tmp_path / "tried"
    # Its first start fails.
    spec = f"pipe:test -e {flag} || exec touch {flag} /nothing/there; cat {tmp_path}/s/{{000..001}}.tar"
    out = tmp_path / "pipes.json"
    assert prepare(["--index", spec, str(out), "--workers", "1"]) == 0
    source = open_dataset(f"shards:{out}", whole=True)
    assert len(list(readable(source))) == 20 and not source.skipped
    assert len(open_dataset(f"{spec}?index={out}", whole=True)) == 20
    with pytest.raises(DataError, match="not in an index of shards"):
        open_dataset("pipe:cat a.tar")
