"""The site is built without a warning, and whatever it and the README show is run.

Lines that begin with `python -m sycoca` and blocks of Python run one after another in a single process, which spares
the import of torch; that these commands run as processes is held by tests/sycoca/commands.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs.test_readme import COMMANDS, ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))
BRIEF = " train.steps=2 micro_batch=2 limit=8 warmup_steps=1"
# Commands of the site that are no command of the README -> what makes them short; None: as the comment says.
ELSEWHERE: dict[str, str | None] = {
    "python -m train.study main": None,  # an hour; a small plan of the same kind: tests/runs/test_study.py
    "deepspeed train/finetune.py captioning --config ds_zero2.json --model runs/tiny --run-dir runs/captioning": BRIEF,
    "deepspeed train/finetune.py captioning --config ds_zero2.json --model runs/tiny --data captions.tsv": BRIEF,
    "deepspeed train/finetune.py captioning --config ds_zero2.json --model runs/captioning --run-dir runs/scst"
    " scst=true": BRIEF,
    "python train/evaluate.py captioning --model runs/captioning": " limit=8",
    "deepspeed --hostfile hosts train/pretrain.py --config ds_zero2.json --preset base_16 --data /shared/captions.tsv"
    " --run-dir /shared/runs/base": None,  # needs two machines; the page says that it has not been run
    # likewise
    "torchrun --nnodes 2 --node_rank 0 --nproc_per_node 8 --master_addr node1 --master_port 29500 train/pretrain.py"
    " --config ds_zero2.json --preset base_16 --data /shared/captions.tsv --run-dir /shared/runs/base": None,
    # test_two_hosts_of_a_hostfile_train_together
    "deepspeed --hostfile hosts --no_ssh --node_rank 0 --master_addr node1 train/pretrain.py --config ds_zero2.json"
    " --preset base_16 --data /shared/captions.tsv --run-dir /shared/runs/base": None,
    # the next two: the script under a stand-in for SLURM, and one host of two, in tests/runs/test_two_hosts.py
    "sbatch --export=ALL,RUN=/shared/runs/base train/slurm.sh --config ds_zero2.json --preset base_16"
    " --data /shared/captions.tsv": None,
    "deepspeed --num_gpus 8 train/pretrain.py --config ds_zero2.json --resume --reshape"
    " --run-dir /shared/runs/base": None,
    # tests/runs/test_two_pass.py, at a size of seconds
    "deepspeed --num_gpus 2 train/pretrain.py --config ds_zero1.json micro_batch=32 global_batch=256"
    " train.steps=20": None,
}
# What the page of fine-tuning makes is not there when the pages are run.
LATER = "python -m sycoca caption photos/ --model runs/captioning"
OURS = "python -m sycoca "
RUNNER = """
import json, shlex, sys
from pathlib import Path
from sycoca.__main__ import main
before = set(Path().iterdir())
for page, kind, text in json.load(open(sys.argv[1])):
    if kind == "page":
        # Every page begins in a folder of a reader who has read no other.
        for left in set(Path().iterdir()) - before:
            left.unlink()
        continue
    print(f"### {page}: {text}", flush=True)
    if kind == "python":
        exec(compile(text, page, "exec"), {"__name__": "__main__"})
    elif code := main(shlex.split(text)[3:]):
        sys.exit(f"exit code {code}: {text}")
"""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> list[str]:
    lines = [line.split(" #")[0].strip() for block in blocks(page, "bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_every_command_of_the_site_is_accounted_for():
    for page in PAGES:
        # tests/train/tasks/test_tasks_guide.py, tests/runs/test_data.py
        if page.name in ("tasks.md", "own_data.md"):
            continue
        unknown = [c for c in commands(page) if not c.startswith(OURS) and c not in COMMANDS.keys() | ELSEWHERE.keys()]
        assert not unknown, (page.name, unknown)


def test_nothing_shown_is_forgotten_here():
    shown = {command for page in PAGES for command in commands(page)}
    assert shown >= ELSEWHERE.keys()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder as a reader would have it: a model, photographs, captions."""
    import numpy as np
    import torch
    from PIL import Image

    from sycoca.model import SyCoCa
    from sycoca.tokenizer import Tokenizer
    from sycoca.xvlm import XVLM
    from tests.sycoca.commands.conftest import BOXES, CAPTIONS, CONFIG

    place = tmp_path_factory.mktemp("reader")
    torch.manual_seed(0)
    model = SyCoCa(CONFIG).eval()
    model.save_pretrained(place / "runs" / "tiny" / "model", tokenizer=Tokenizer.train(CAPTIONS, 280))
    torch.manual_seed(0)
    found = Tokenizer.train_wordpiece(CAPTIONS, 80)
    XVLM(BOXES).eval().save_pretrained(place / "runs" / "xvlm_tiny" / "model", tokenizer=found)
    (place / "photos").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "photos" / f"{number}.jpg")
    Image.fromarray(pixels).save(place / "photo.jpg")
    (place / "captions.txt").write_text("a red disc\ntwo green squares\na photograph\n", encoding="utf-8")
    return place


@pytest.mark.run
def test_what_the_pages_show_runs(place):
    steps = []
    for page in (ROOT / "README.md", *PAGES):
        steps.append((page.name, "page", ""))
        for language, block in re.findall(r"```(bash|python)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            if language == "python" and re.match(r"import|from", block):
                steps.append((page.name, "python", block))
            elif language == "bash":
                lines = [line.split(" #")[0] for line in block.splitlines() if line.startswith(OURS) and line != LATER]
                steps += [(page.name, "shell", line) for line in lines]
    (place / "steps.json").write_text(json.dumps(steps), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, "steps.json"],
        cwd=place,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert sum(kind != "page" for _, kind, _ in steps) > 15


@pytest.mark.full
def test_fine_tuning_as_its_page_shows_it(place, command, checkout):
    rows = [f"{number}.jpg\ta picture of number {number}\t{'val' if number > 2 else 'train'}" for number in range(4)]
    for number in range(4):
        shutil.copy(place / "photos" / f"{number}.jpg", place)
    (place / "captions.tsv").write_text("\n".join(["image\tcaption\tsplit", *rows]) + "\n", encoding="utf-8")
    for line, added in ELSEWHERE.items():
        if added is not None:
            line = line.replace("train/", f"{checkout}/train/") + added
            done = command(line, cwd=place)
            assert done.code == 0, done.out[-1500:] + done.err[-3000:]
    assert command(LATER, cwd=place, env={"PYTHONPATH": str(checkout)}).code == 0


@pytest.mark.run
def test_the_site_is_built_without_a_warning_and_loads_nothing(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-3000:]
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES) - 1
    for page in pages:
        loaded = re.findall(
            r"<(?:script|img|link)[^>]+(?:src|href)=[\"']?(https?:)?//", page.read_text(encoding="utf-8")
        )
        assert not loaded, page.name
    use = (tmp_path / "site" / "guides" / "use.html").read_text(encoding="utf-8")
    assert "--num-beams" in use and "help: " not in use
    reference = (tmp_path / "site" / "reference" / "kernels.html").read_text(encoding="utf-8")
    assert "fused_itc_loss" in reference and "scratch_bytes" in reference


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
