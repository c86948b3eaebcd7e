import io
import os

import numpy as np
import pytest

from sycoca.commands import inputs
from sycoca.commands.inputs import Skipped, UserError, decoded, expand, texts
from sycoca.images import decode


def names(paths):
    return [os.path.basename(path) for path in paths]


def test_folders_are_walked_in_order_and_hidden_and_other_files_left_out(photos):
    found = names(expand([str(photos)]))
    assert found[:3] == ["00.jpg", "01.jpg", "02.jpg"] and found[-2:] == ["10.png", "11.png"]
    assert len(found) == 15 and "notes.md" not in found and ".hidden.jpg" not in found


def test_files_and_globs_name_a_path_once(photos):
    first = str(photos / "00.jpg")
    assert expand([first, str(photos / "0[01].jpg"), first]) == [first, str(photos / "01.jpg")]
    assert names(expand([str(photos / "**/*.png")])) == ["05-text.png", "10.png", "11.png"]
    assert names(expand([str(photos / "mor*")])) == ["10.png", "11.png"]


def test_a_file_with_magic_characters_in_its_name_is_that_file(tmp_path, photos):
    odd = tmp_path / "a[1].jpg"
    odd.write_bytes((photos / "00.jpg").read_bytes())
    assert expand([str(odd)]) == [str(odd)]


def test_standard_input_lists_paths(monkeypatch, photos):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{photos / '01.jpg'}\n\n{photos / 'with space.jpg'}\n"))
    assert names(expand(["-"])) == ["01.jpg", "with space.jpg"]


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("00.jgp", "no such file or folder; did you mean '00.jpg'?"),
        ("nowhere/00.jpg", "no such file or folder"),
        ("*.webp", "nothing matches"),
        ("empty", "no image below the folder"),
    ],
)
def test_a_pattern_that_names_nothing_is_an_error_before_any_work(photos, tmp_path, pattern, told):
    if pattern == "empty":
        pattern = str(tmp_path)
    with pytest.raises(UserError, match="IMAGES: ") as caught:
        expand([os.path.join(photos, pattern)], "IMAGES")
    assert told in str(caught.value)


def test_images_come_in_order_and_broken_ones_are_told_of(photos):
    said = []
    skipped = Skipped(said.append)
    paths = expand([str(photos)])
    got = list(decoded(paths, inputs.square(32), skipped, workers=3))
    assert [path for path, _ in got] == [p for p in paths if not any(word in p for word in ("cut", "text", "empty"))]
    assert np.array_equal(got[4][1], inputs.square(32)(got[4][0]))
    assert skipped.total == 3 and len(said) == 3 and all(line.endswith("unreadable image") for line in said)
    assert skipped.line(15) == "skipped 3 of 15: 3 x unreadable image"


def test_reading_stays_a_few_images_ahead(photos):
    """Memory must not grow with the number of images."""
    started = []

    def read(path):
        started.append(path)
        return decode(path)

    stream = decoded((str(photos / "00.jpg") for _ in range(1000)), read, Skipped(), workers=2)
    next(stream)
    stream.close()
    assert len(started) <= 9


def test_many_broken_files_are_not_all_named():
    said = []
    skipped = Skipped(said.append)
    for number in range(1000):
        skipped.add(f"{number}.jpg", "unreadable image")
    assert len(said) == 21 and skipped.total == 1000


def test_texts_keep_their_place_and_may_start_later(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_bytes("\ufeffa dog\r\n\n  a cat \nein Bär\u2028im Wald".encode())
    skipped = Skipped([].append)
    assert list(texts([str(file)], skipped)) == [
        (f"{file}:1", "a dog"),
        (f"{file}:3", "a cat"),
        (f"{file}:4", "ein Bär\u2028im Wald"),
    ]
    assert skipped.total == 1
    assert [text for _, text in texts([str(file)], Skipped(), start=2)] == ["a cat", "ein Bär\u2028im Wald"]


def test_texts_that_are_no_text(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_bytes(b"a dog\n\xff\xfe\n")
    with pytest.raises(UserError, match="not a UTF-8 text file"):
        list(texts([str(file)], Skipped()))
    with pytest.raises(UserError, match="cannot be mixed"):
        inputs.are_texts(["a.txt", "b.jpg"])
