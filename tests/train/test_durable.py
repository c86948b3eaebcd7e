"""Damage of any file of a checkpoint is seen; writing leaves the old file or the new one."""

import json
import random

import pytest

from train.durable import MANIFEST, Fault, faults, read_manifest, record, write_atomically, write_manifest

FILES = {"a.pt": b"x" * 1000, "deep/b.pt": bytes(range(256)) * 40, "one": b"1"}


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_manifest(tmp_path, {"step": 7}, {name: record(tmp_path / name) for name in FILES})
    return tmp_path


def test_a_whole_folder_has_no_faults(folder):
    assert faults(folder) == []
    assert read_manifest(folder)["step"] == 7


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["emptied", "halved", "a byte short"])
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_truncated_file_is_named(folder, name, share):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: min(len(content) - 1, int(share * len(content)))])
    assert [fault.file for fault in faults(folder)] == [name]


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_every_flipped_bit_is_seen(folder, name):
    content, draw = (folder / name).read_bytes(), random.Random(0)
    bits = range(8 * len(content)) if len(content) < 300 else draw.sample(range(8 * len(content)), 200)
    for bit in bits:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(damaged)
        assert [fault.file for fault in faults(folder)] == [name], bit
    (folder / name).write_bytes(content)
    assert faults(folder) == []


def test_a_file_too_many_or_too_few_is_named(folder):
    (folder / "one").unlink()
    (folder / "planted.pt").write_bytes(b"")
    assert faults(folder) == [Fault("planted.pt", "not in the manifest"), Fault("one", "missing")]


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"body": 3}', '{"body": {"files": {}}}', "[" * 100_000], ids=lambda text: text[:12]
)
def test_a_manifest_of_another_form_is_a_fault(folder, text):
    (folder / MANIFEST).write_text(text)
    assert [fault.file for fault in faults(folder)] == [MANIFEST]


def test_a_manifest_signed_for_other_facts_is_a_fault(folder):
    held = json.loads((folder / MANIFEST).read_text())
    held["body"]["step"] = 8
    (folder / MANIFEST).write_text(json.dumps(held, sort_keys=True) + "\n")
    assert faults(folder) == [Fault(MANIFEST, "its own digest differs")]


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    write_atomically(tmp_path / "latest", "old\n")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "latest", "new\n")
    assert (tmp_path / "latest").read_text() == "old\n"
