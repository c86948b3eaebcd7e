"""The page about own data, word for word, on a folder laid out as COCO; equal losses from JSON, shards, a table."""

import re
import shutil
from pathlib import Path

import pytest

from tests.runs.conftest import free_port, metric_rows
from tests.runs.test_readme import SHORT
from tests.train.data.folders import sample_members, write_coco, write_table, write_tar

pytestmark = pytest.mark.run
PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "own_data.md"


def test_the_page_word_for_word(command, checkout, tmp_path):
    write_coco(checkout / "coco", 12, 6)
    for number in range(2):
        members = [m for n in range(20 * number, 20 * number + 20) for m in sample_members(n)]
        write_tar(checkout / "made" / f"{number:03d}.tar", members)
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) >= 7
    rows = []
    for line in lines:
        added = ""
        if line.startswith("deepspeed"):
            line = line.replace("deepspeed", f"deepspeed --master_port {free_port()}")
            added = f"{SHORT} --run-dir {tmp_path}/{len(rows)}"
        done = command(line + added)
        assert done.code == 0, line + done.out[-1500:] + done.err[-3000:]
        assert "left out:" not in done.out
        if added:
            rows.append(metric_rows(tmp_path / str(len(rows))))
    assert (checkout / "coco.png").stat().st_size > 0
    # The images are small, so the shards hold them as they are.
    assert len(rows) == 3 and rows[0] == rows[1] and len(rows[0]) == 2
    table = write_table(tmp_path / "table", 12, 6)
    line = (
        f"python train/pretrain.py --config ds_zero2.json --preset small --data {table} --run-dir {tmp_path}/table-run"
    )
    done = command(line + SHORT)
    assert done.code == 0, done.err[-3000:]
    assert metric_rows(tmp_path / "table-run") == rows[0]
    for place in ("coco", "made", "shards"):
        shutil.rmtree(checkout / place)
