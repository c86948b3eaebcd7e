import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sycoca.commands import embed, rows
from sycoca.images import load_images
from tests.sycoca.commands.conftest import build

ROOT = Path(__file__).resolve().parents[3]


def keys(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_the_models_features_in_order(sycoca, model_folder, photos, tmp_path):
    ran = sycoca("embed", photos, "--model", model_folder, "--out", "f.npy", "--batch-size", 5)
    assert ran.code == 0 and "skipped 3 of 15: 3 x unreadable image" in ran.err and ran.out == ""
    features, named = np.load("f.npy"), keys(tmp_path / "f.keys.jsonl")
    assert features.shape == (12, 16) and features.dtype == np.float32
    assert [os.path.basename(row["key"]) for row in named[:4]] == ["00.jpg", "01.jpg", "02.jpg", "03.jpg"]
    images = load_images([row["key"] for row in named], 32)
    with torch.no_grad():
        assert np.abs(build().encode_image(images).features.numpy() - features).max() < 1e-6
    assert sorted(os.listdir()) == ["f.keys.jsonl", "f.npy"]


def test_parquet_holds_the_same(sycoca, model_folder, photos):
    import pyarrow.parquet as pq

    sycoca("embed", photos, "--model", model_folder, "--out", "f.npy")
    ran = sycoca("embed", photos, "--model", model_folder, "--out", "f.parquet", "--dtype", "float16")
    assert ran.code == 0
    table = pq.read_table("f.parquet").to_pydict()
    assert [{"key": key} for key in table["key"]] == keys(Path("f.keys.jsonl"))
    assert np.allclose(np.array(table["embedding"]), np.load("f.npy"), atol=1e-3)


def test_texts_have_their_words_beside_their_place(sycoca, model_folder):
    Path("captions.txt").write_text("a red square\n\na blue disc\n")
    ran = sycoca("embed", "captions.txt", "--model", model_folder, "--out", "t.npy")
    assert ran.code == 0 and "1 x empty text" in ran.err
    assert keys(Path("t.keys.jsonl"))[1] == {"key": "captions.txt:3", "text": "a blue disc"}
    assert np.allclose(np.linalg.norm(np.load("t.npy"), axis=1), 1, atol=1e-5)


def interrupted(monkeypatch, after):
    """Lets `Rows.add` fail as an interruption would, behind so many batches."""
    add, calls = rows.Rows.add, []

    def once(self, *arguments):
        if len(calls) == after:
            monkeypatch.setattr(rows.Rows, "add", add)
            raise KeyboardInterrupt
        calls.append(1)
        return add(self, *arguments)

    monkeypatch.setattr(rows.Rows, "add", once)


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("damage", ["nothing", "half a row more", "half a line more", "a row less"])
def test_what_was_interrupted_goes_on_to_the_same_bytes(sycoca, model_folder, photos, monkeypatch, after, damage):
    command = ("embed", photos, "--model", model_folder, "--batch-size", 3, "--out")
    assert sycoca(*command, "whole.npy").code == 0
    interrupted(monkeypatch, after)
    stopped = sycoca(*command, "f.npy")
    assert stopped.code == 130 and f"interrupted after {3 * after} rows" in stopped.err
    assert not Path("f.npy").exists()
    part, journal = Path("f.npy.part"), Path("f.npy.journal")
    if damage == "half a row more":
        part.write_bytes(part.read_bytes() + b"x" * 30)
    elif damage == "half a line more":
        journal.write_text(journal.read_text() + '{"records": [{"key": "')
    elif damage == "a row less" and after:
        part.write_bytes(part.read_bytes()[:-64])
    ran = sycoca(*command, "f.npy")
    assert ran.code == 0 and "skipped 3 of 15" in ran.err
    assert ("going on after" in ran.err) == (after > (damage == "a row less"))
    assert Path("f.npy").read_bytes() == Path("whole.npy").read_bytes()
    assert Path("f.keys.jsonl").read_bytes() == Path("whole.keys.jsonl").read_bytes()
    assert not part.exists() and not journal.exists()


def test_texts_go_on_behind_the_lines_that_were_read(sycoca, model_folder, monkeypatch):
    Path("captions.txt").write_text("".join(f"line {i}\n" if i % 3 else "\n" for i in range(20)))
    command = ("embed", "captions.txt", "--model", model_folder, "--batch-size", 4, "--out")
    sycoca(*command, "whole.npy")
    interrupted(monkeypatch, 2)
    assert sycoca(*command, "t.npy").code == 130
    ran = sycoca(*command, "t.npy")
    assert ran.code == 0 and "skipped 7 of 20: 7 x empty text" in ran.err
    assert Path("t.npy").read_bytes() == Path("whole.npy").read_bytes()


def test_another_model_or_other_inputs_do_not_continue_a_file(sycoca, model_folder, coca_folder, photos, monkeypatch):
    interrupted(monkeypatch, 1)
    sycoca("embed", photos, "--model", model_folder, "--batch-size", 3, "--out", "f.npy")
    other = sycoca("embed", photos, "--model", coca_folder, "--out", "f.npy")
    assert other.code == 2 and "begun with another model" in other.err and "--restart" in other.err
    fewer = sycoca("embed", photos / "00.jpg", "--model", model_folder, "--out", "f.npy")
    assert fewer.code == 2 and "begun with another list of inputs" in fewer.err
    assert sycoca("embed", photos / "00.jpg", "--model", model_folder, "--out", "f.npy", "--restart").code == 0


def test_a_finished_file_is_not_touched_unasked(sycoca, model_folder, photos):
    sycoca("embed", photos / "00.jpg", "--model", model_folder, "--out", "f.npy")
    before = Path("f.npy").read_bytes()
    ran = sycoca("embed", photos, "--model", model_folder, "--out", "f.npy")
    assert ran.code == 2 and "--overwrite" in ran.err and Path("f.npy").read_bytes() == before
    assert sycoca("embed", photos, "--model", model_folder, "--out", "f.npy", "--overwrite").code == 0
    assert len(np.load("f.npy")) == 12


def test_nothing_usable_leaves_no_file_and_a_code(sycoca, model_folder, photos):
    ran = sycoca("embed", photos / "05-text.png", "--model", model_folder, "--out", "f.npy")
    assert ran.code == 1 and "none of the images could be used" in ran.err and not Path("f.npy").exists()


def test_parquet_without_pyarrow_is_one_line(sycoca, model_folder, photos, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find(name))
    ran = sycoca("embed", photos, "--model", model_folder, "--out", "f.parquet")
    assert ran.code == 2 and "pyarrow" in ran.err and ran.err.count("\n") == 1


def test_fingerprints_tell_models_apart():
    model = build()
    before = embed.fingerprint(model)
    assert before == embed.fingerprint(build())
    with torch.no_grad():
        model.text.sequence.pos[3, 2] += 1e-3
    assert embed.fingerprint(model) != before


@pytest.mark.run
def test_killed_in_the_middle_it_goes_on_and_ctrl_c_is_quiet(sycoca, model_folder, photos, tmp_path):
    """A process that is killed without warning, and one that is asked to stop, at a place that chance chooses."""
    for number in range(400):
        os.symlink(photos / f"{number % 10:02d}.jpg", tmp_path / f"{number:04d}.jpg")
    command = [sys.executable, "-m", "sycoca", "embed", str(tmp_path), "--model", model_folder, "--batch-size", "2"]

    def start(out):
        return subprocess.Popen(
            [*command, "--out", out],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )

    def stop(process, number):
        journal = tmp_path / "f.npy.journal"
        while not journal.exists() or len(journal.read_text().splitlines()) < number:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL if number < 50 else signal.SIGINT)
        return process.wait(10), process.stderr.read()

    out = str(tmp_path / "f.npy")
    assert stop(start(out), 20)[0] == -signal.SIGKILL
    code, said = stop(start(out), 60)
    assert code == 130 and "Traceback" not in said and "the same command goes on" in said
    last = start(out)
    said = last.communicate(timeout=60)[1]
    assert last.returncode == 0 and "going on after" in said
    assert sycoca(*command[3:], "--out", tmp_path / "whole.npy").code == 0
    assert (tmp_path / "f.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
