"""Every command of the README is executed: as it stands, or with the options named here that make it short."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from train.run_folder import checkpoint_steps

ROOT = Path(__file__).resolve().parents[2]
SHORT = (
    " train.steps=2 micro_batch=4 local_group=4 val_pairs=4 warmup_steps=1 data.workers=0 model.vision.depth=1"
    " model.text.depth=1 model.caption_decoder.depth=1 model.image_decoder.depth=1"
)
# Command -> what is added to it; None: shown by the test or the job that is named beside it.
COMMANDS = {
    "make train": None,  # the set-up of continuous integration, then tests/runs/test_main_job.py
    "make test": None,  # continuous integration itself
    "deepspeed train/pretrain.py --config ds_zero2.json": None,  # tests/runs/test_main_job.py
    "deepspeed train/pretrain.py --config ds_zero2.json --preset small --data captions.tsv": SHORT,
    "deepspeed train/pretrain.py --config ds_zero2.json --print-config": "",
    "deepspeed train/pretrain.py --config ds_zero3.json train.steps=20 model.vision.depth=2": SHORT.replace(
        "train.steps=2", ""
    ).replace("model.vision.depth=1", ""),
    "deepspeed --num_gpus 2 train/pretrain.py --config ds_zero1.json train.steps=20": SHORT.replace(
        "train.steps=2", ""
    ),
    "deepspeed train/pretrain.py --config ds_zero2.json --resume --run-dir runs/tiny": "two steps more",
    "deepspeed train/pretrain.py --config ds_zero2.json --preset xvlm_tiny": None,  # tests/runs/test_xvlm.py
    "python train/evaluate.py zeroshot": None,  # tests/runs/test_tasks.py
    "deepspeed train/finetune.py retrieval --config ds_zero2.json": None,  # tests/runs/test_tasks.py
    # the next six: tests/runs/test_docs.py
    "python -m sycoca caption photos/ --model runs/tiny": None,
    "python -m sycoca embed photos/ --model runs/tiny --out photos.npy": None,
    'python -m sycoca retrieve photos/ --model runs/tiny --text "a red disc" --sheet found.html': None,
    'python -m sycoca overlay photo.jpg --caption "a red disc" --model runs/tiny --out overlay.html': None,
    'python -m sycoca locate photo.jpg "a red square" --model runs/xvlm_tiny': None,
    "python -m sycoca doctor": None,
    "pytest bench/ --benchmark-only": None,  # tests/runs/test_bench.py
    "python -m bench.step": None,  # tests/runs/test_bench.py
}


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_every_command_of_the_readme_is_accounted_for():
    assert set(readme_commands()) <= COMMANDS.keys()


def test_the_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    whole = [block for block in blocks if block.startswith("import")]
    assert whole
    for block in whole:
        done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def captions(checkout):
    """A small table of captions and images beside the README, as a reader would have."""
    import numpy as np
    from PIL import Image

    (checkout / "images").mkdir(exist_ok=True)
    rows = ["image\tcaption\tsplit"]
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (150, 140, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(checkout / "images" / f"{number}.jpg")
        split = "val" if number >= 8 else "train"
        rows += [f"{number}.jpg\ta picture, number {number}, seen {times} times\t{split}" for times in range(2)]
    (checkout / "captions.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.mark.run
@pytest.mark.parametrize("line", [line for line in readme_commands() if COMMANDS[line] is not None])
def test_command_of_the_readme_runs(line, command, checkout, captions):
    added = COMMANDS[line]
    if added == "two steps more":
        shutil.rmtree(checkout / "runs" / "tiny", ignore_errors=True)
        command(f"python train/pretrain.py --config ds_zero2.json --run-dir runs/tiny{SHORT}")
        added = f" train.steps={checkpoint_steps(checkout / 'runs' / 'tiny')[-1] + 2}"
    done = command(line + added)
    assert done.code == 0, done.out[-1500:] + done.err[-3000:]
