import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sycoca import __main__ as program
from sycoca.commands import doctor, retrieve, self_check
from sycoca.generate import generate
from sycoca.images import load_images
from tests.sycoca.commands.conftest import build

ROOT = Path(__file__).resolve().parents[3]


def test_captions_are_those_of_the_model_with_their_paths(sycoca, model_folder, photos, tokenizer):
    ran = sycoca("caption", photos, "--model", model_folder, "--batch-size", 5, "--max-length", 7)
    assert ran.code == 0 and "skipped 3 of 15: 3 x unreadable image" in ran.err
    lines = [line.split("\t") for line in ran.out.splitlines()]
    assert [os.path.basename(path) for path, _ in lines][:4] == ["00.jpg", "01.jpg", "02.jpg", "03.jpg"]
    images = load_images([path for path, _ in lines], 32)
    assert [said for _, said in lines] == generate(build(), tokenizer, images, max_length=7)


def test_captions_as_json_drawn_and_repeatable(sycoca, model_folder, photos):
    command = ("caption", photos / "00.jpg", "--model", model_folder, "--temperature", 1, "--num-return", 3, "--json")
    first = sycoca(*command, "--seed", 5)
    rows = [json.loads(line) for line in first.out.splitlines()]
    assert first.code == 0 and len(rows) == 3
    assert all(row["path"].endswith("00.jpg") and row["caption"] and row["score"] < 0 for row in rows)
    assert sycoca(*command, "--seed", 5).out == first.out
    assert sycoca(*command, "--seed", 6).out != first.out


def test_a_path_of_any_bytes_keeps_to_its_line(model_folder, photos, tmp_path, capfdbinary):
    odd = os.fsencode(tmp_path) + b"/a\nb\tc\xff.jpg"
    Path(os.fsdecode(odd)).write_bytes((photos / "00.jpg").read_bytes())
    assert program.main(["caption", str(tmp_path), "--model", model_folder]) == 0
    path, tab, _ = capfdbinary.readouterr().out.partition(b"\t")
    assert path.endswith(b"/a\\nb\\tc\xff.jpg") and tab


def test_what_the_system_refuses_is_one_line(sycoca, model_folder, photos, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device", "f.npy.part")

    monkeypatch.setattr("os.fsync", full)
    ran = sycoca("embed", photos, "--model", model_folder, "--out", "f.npy")
    assert ran.code == 2 and ran.err == "error: f.npy.part: No space left on device\n"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--top-k", 5], "--top-k needs a --temperature"),
        (["--num-return", 2], "--num-return=2 needs at least as many --num-beams, or a --temperature"),
        (["--num-beams", 2, "--temperature", 1], "--num-beams searches, --temperature draws; give one of them"),
        (["--min-length", 9, "--max-length", 4], "--min-length must lie in 0..4, got 9"),
        (["--max-length", 900], "--max-length must lie in 1..16, got 900"),
        (["--top-p", "1.5", "--temperature", 1], "--top-p must lie in (0, 1], got 1.5"),
        (["--batch-size", "none"], "--batch-size: must be an integer of at least 1, got none"),
        (["--top-k", "many", "--temperature", 1], "--top-k: must be an integer, got many"),
        (["--length-penalty", "nan"], "--length-penalty must lie in -10..10, got nan"),
        (["--prompt", "a red square " * 9], "leaves no room within 16"),
        (["--config", "coca_base"], "for a weight file alone"),
        (["--image-size", 33], "33"),
        (["--device", "tpu9"], "--device tpu9"),
        (["--beams", 3], "--beams: unknown option; did you mean '--num-beams'?"),
    ],
)
def test_options_that_cannot_be_are_one_line(sycoca, model_folder, photos, options, told):
    ran = sycoca("caption", photos / "00.jpg", "--model", model_folder, *options)
    assert ran.code == 2 and told in ran.err and ran.err.startswith("error: ") and ran.err.count("\n") == 1


def test_a_model_that_is_not_there_is_one_line(sycoca, model_folder, photos):
    for model in ("no/such/folder", str(photos), model_folder + "/model.safetensors"):
        ran = sycoca("caption", photos / "00.jpg", "--model", model)
        assert ran.code == 2 and ran.err.count("\n") == 1 and "Traceback" not in ran.err, ran.err
    assert "there is none under runs/" in sycoca("caption", photos / "00.jpg").err


def test_without_a_name_the_newest_run_is_taken(sycoca, model_folder, coca_folder, photos, tmp_path):
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "new").mkdir()
    os.symlink(coca_folder, tmp_path / "runs" / "old" / "model")
    os.symlink(model_folder, tmp_path / "runs" / "new" / "model")
    os.utime(Path(coca_folder) / "config.json", (1, 1))
    ran = sycoca("caption", photos / "00.jpg")
    assert ran.code == 0 and "model: runs/new/model" in ran.err


def test_retrieval_ranks_as_the_features_do(sycoca, model_folder, photos, tokenizer):
    ran = sycoca("retrieve", photos, "--model", model_folder, "--text", "a red square", "--top", 4, "--json")
    rows = [json.loads(line) for line in ran.out.splitlines()]
    assert ran.code == 0 and [row["rank"] for row in rows] == [1, 2, 3, 4]
    paths = [str(p) for p in sorted([*photos.glob("[01][0-9].jpg"), *photos.glob("more/*.png")])]
    model = build()
    with torch.no_grad():
        images = model.encode_image(load_images(paths, 32)).features
        text = model.encode_text(tokenizer.encode(["a red square"], 16)).features[0]
    best = (images @ text).sort(descending=True)
    assert [row["path"] for row in rows] == [paths[i] for i in best.indices[:4]]
    assert np.allclose([row["score"] for row in rows], best.values[:4], atol=1e-5)


def test_an_image_is_its_own_best_match_and_stored_features_give_the_same(sycoca, model_folder, photos):
    query = ("--model", model_folder, "--image", photos / "04.jpg", "--top", 3, "--json")
    fresh = sycoca("retrieve", photos, *query)
    assert json.loads(fresh.out.splitlines()[0])["path"] == str(photos / "04.jpg")
    sycoca("embed", photos, "--model", model_folder, "--out", "f.npy")
    assert sycoca("retrieve", "f.npy", *query).out == fresh.out


def test_texts_are_found_for_an_image_and_told_as_they_are(sycoca, model_folder, photos):
    Path("captions.txt").write_text("a <b>red</b> square & more\nnothing much\n\x1b[31m evil\n")
    ran = sycoca("retrieve", "captions.txt", "--model", model_folder, "--image", photos / "00.jpg", "--sheet", "s.html")
    assert ran.code == 0 and "\x1b" not in ran.out and "a <b>red</b> square & more" in ran.out
    page = Path("s.html").read_text()
    assert "a &lt;b&gt;red&lt;/b&gt; square &amp; more" in page and "<b>red" not in page and "\x1b" not in page


@pytest.mark.parametrize("suffix", ["html", "png"])
def test_contact_sheets_show_every_query(sycoca, model_folder, photos, suffix):
    queries = ("--text", "costs $5 or $6", "--image", photos / "02.jpg")
    ran = sycoca("retrieve", photos, "--model", model_folder, *queries, "--top", 7, "--sheet", f"s.{suffix}")
    assert ran.code == 0 and f"contact sheet: s.{suffix}" in ran.err
    if suffix == "png":
        with Image.open("s.png") as sheet:
            assert sheet.size[0] > 1000 and sheet.size[1] > 700
    else:
        page = Path("s.html").read_text()
        assert page.count("<article>") == 2 and page.count("data:image/jpeg") == 7 + 7 + 1


def test_more_is_asked_for_than_there_is(sycoca, model_folder, photos):
    ran = sycoca("retrieve", photos / "00.jpg", "--model", model_folder, "--text", "x", "--top", 50, "--json")
    assert ran.code == 0 and len(ran.out.splitlines()) == 1


def test_equal_scores_keep_their_order():
    features = torch.ones(5, 2)
    assert [row for row, _ in retrieve._best(features[:1], features, 3)[0]] == [0, 1, 2]


def test_retrieval_without_a_query_or_with_a_foreign_file_is_one_line(sycoca, model_folder, photos):
    np.save("wide.npy", np.ones((2, 99), np.float32))
    Path("wide.keys.jsonl").write_text('{"key": "a"}\n{"key": "b"}\n')
    for gallery, query, told in (
        (photos, [], "at least one query"),
        (photos, ["--text", " "], "--text: empty"),
        ("wide.npy", ["--text", "x"], "width 99, the model makes 16"),
        ("none.npy", ["--text", "x"], "no such file"),
        (photos, ["--image", photos / "05-text.png"], "none of the queries could be read"),
    ):
        ran = sycoca("retrieve", gallery, "--model", model_folder, *query)
        assert ran.code == 2 and told in ran.err, ran.err


def test_overlay_page_and_figure(sycoca, model_folder, photos):
    ran = sycoca("overlay", photos, "--model", model_folder, "--out", "o.html", "--batch-size", 5)
    assert ran.code == 0 and "o.html: 12 images" in ran.err and "skipped 3 of 15" in ran.err
    assert Path("o.html").read_text().count("<article") == 12
    two = [photos / "00.jpg", photos / "more/10.png"]
    said = ("--caption", "a red square", "--caption", "a blue disc")
    assert sycoca("overlay", *two, *said, "--model", model_folder, "--out", "o.png").code == 0
    with Image.open("o.png") as figure:
        assert figure.size[0] > 1200
    ran = sycoca("overlay", *two, "--caption", "a", "--caption", "b", "--caption", "c", "--out", "o.png")
    assert ran.code == 2 and "--caption: given 3 times for 2 images" in ran.err
    assert sycoca("overlay", photos, "--out", "o.gif").err.startswith("error: --out: o.gif must end in .html or .png")
    assert "folder" in sycoca("overlay", photos, "--out", "none/o.png").err


def test_doctor_is_content_here(sycoca):
    ran = sycoca("doctor")
    assert ran.code == 0 and "all is well" in ran.out
    for operator in ("fused_itc_loss", "attentive_select", "masked_patch_loss"):
        assert f"{operator}" in ran.out
    assert "not triton: needs CUDA" in ran.out or torch.cuda.is_available()
    seconds = float(ran.out.rsplit("(", 1)[1].split(" s")[0])
    assert seconds < 10


def test_doctor_finds_a_wrong_gradient(sycoca, monkeypatch):
    monkeypatch.setattr(self_check, "gradient_errors", lambda: iter([("fused_itc_loss", 0.3), ("other", float("nan"))]))
    ran = sycoca("doctor")
    assert ran.code == 1 and "gradients of fused_itc_loss, other are wrong here" in ran.out


def test_another_package_named_kernels_is_told_in_one_line(tmp_path):
    """As pip would leave it behind: a package of the same name earlier on the path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from kernels.utils import get_kernel\n")
    (tmp_path / "kernels" / "utils.py").write_text("def get_kernel(): ...\n")
    for command in (["doctor"], ["caption", str(ROOT / "README.md"), "--model", "x"]):
        done = subprocess.run(
            [sys.executable, "-c", f"import sycoca.__main__ as m, sys; sys.exit(m.main({command!r}))"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
            capture_output=True,
            text=True,
        )
        told = done.stdout + done.stderr
        assert done.returncode in (1, 2) and told.count("\n") == 1, told
        assert "shadows ours" in told and str(tmp_path / "kernels") in told
    assert doctor.shadowed() is None


def test_help_shows_an_example_and_loads_no_torch():
    code = (
        "import sys; from sycoca.__main__ import parser; p = parser()\n"
        "commands = next(a for a in p._actions if a.dest == 'command').choices\n"
        "assert all('python -m sycoca ' + name in sub.format_help() for name, sub in commands.items())\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_mistyped_command_and_a_bare_call(sycoca):
    assert "did you mean 'caption'?" in sycoca("captoin").err
    with pytest.raises(SystemExit):
        sycoca()


def test_an_interrupt_is_one_word(sycoca, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("sycoca.commands.doctor.run", interrupt)
    ran = sycoca("doctor")
    assert ran.code == 130 and ran.err.strip() == "interrupted"
    assert program.COMMANDS == ("caption", "embed", "retrieve", "locate", "overlay", "doctor")


@pytest.mark.run
def test_a_reader_that_has_seen_enough_is_no_error(model_folder, photos):
    shell = f"{sys.executable} -m sycoca caption {photos} --model {model_folder} --batch-size 1 | head -1"
    done = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and "Traceback" not in done.stderr and "Broken" not in done.stderr
