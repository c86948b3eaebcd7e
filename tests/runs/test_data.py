"""The page about own data, word for word, on a folder laid out as COCO; equal losses from JSON, shards, a table."""

import os
import re
import shlex
from functools import partial
from pathlib import Path

import pytest

from tests.runs.faults import Run, finished, rows
from tests.runs.test_readme import SHORT
from tests.train.data.folders import sample_members, write_coco, write_table, write_tar
from train.data.inspect import main as inspect
from train.data.prepare import main as prepare

pytestmark = pytest.mark.run
PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "own_data.md"
COMMANDS = {
    "python -m train.data.inspect ": inspect,
    "python -m train.data.prepare ": prepare,
    "deepspeed train/pretrain.py --config ds_zero2.json ": None,
}


def losses(folder: Path, name: str, options: list[str]) -> list[dict]:
    """The rows of a short run that is started in a folder."""
    run = finished(Run(folder / "runs" / name, *options, *shlex.split(SHORT), prepare=partial(os.chdir, folder)))
    assert "left out:" not in run.text
    return rows(run.run_dir)


def test_the_page_word_for_word(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    write_coco(tmp_path / "coco", 12, 6)
    for number in range(2):
        members = [m for n in range(20 * number, 20 * number + 20) for m in sample_members(n)]
        write_tar(tmp_path / "made" / f"{number:03d}.tar", members)
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) >= 7
    found = []
    for line in lines:
        start = next(start for start in COMMANDS if line.startswith(start))
        options = shlex.split(line.removeprefix(start))
        if COMMANDS[start]:
            assert COMMANDS[start](options) == 0, line
            said = capfd.readouterr().out
            assert "left out:" not in said and not re.search("[1-9][0-9]* left out", said), said
        else:
            found.append(losses(tmp_path, str(len(found)), options))
    assert (tmp_path / "coco.png").stat().st_size > 0
    # The images are small, so the shards hold them as they are.
    assert len(found) == 3 and found[0] == found[1] and len(found[0]) == 2
    table = write_table(tmp_path / "table", 12, 6)
    assert losses(tmp_path, "table", ["--preset", "small", "--data", str(table)]) == found[0]
