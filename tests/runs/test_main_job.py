"""The command on the README's first page, whole, and what it must reach."""

import json
import re

import pytest

from tests.runs.conftest import metric_rows

pytestmark = pytest.mark.run


def test_leaves_what_the_readme_says(main_job):
    run_dir, done, _ = main_job
    for name in ("config.json", "metrics.jsonl", "tokenizer.json", "eval.json", "overview.png"):
        assert (run_dir / name).stat().st_size > 0, name
    assert list((run_dir / "tensorboard").iterdir()) and list((run_dir / "checkpoints").glob("step_*"))
    assert "Traceback" not in done.err and "Warning" not in done.out + done.err


def test_reaches_its_bars(main_job):
    figures = json.loads((main_job[0] / "eval.json").read_text())
    print(json.dumps({key: value for key, value in figures.items() if key != "examples"}, indent=1))
    retrieval = figures["retrieval"]["pairs"]
    assert retrieval["images"] == retrieval["texts"] == 256
    for direction in ("image_to_text", "text_to_image"):
        assert retrieval[direction]["r@1"] >= 20 / 256
    captioning = figures["captioning"]
    assert captioning["nats_per_token_shuffled"] - captioning["nats_per_token"] >= 0.3
    tgmim = figures["tgmim"]
    assert tgmim["l1"] < tgmim["l1_median_colour"] and tgmim["l1"] <= 0.97 * tgmim["l1_shuffled"]
    selection = figures["selection"]
    assert selection["described_share"] >= 0.75 and selection["described_share_shuffled"] <= 0.6


def test_losses_fall_and_every_step_has_a_row(main_job):
    rows = metric_rows(main_job[0])
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    # TG-MIM's does not have to: its masks begin to follow the score, and hide what is hard, in the middle of the run.
    for name in ("itc", "caption", "local"):
        assert sum(row[name] for row in rows[-10:]) < 0.8 * sum(row[name] for row in rows[:10])


def test_prints_plain_lines_where_there_is_no_terminal(main_job):
    lines = [line for line in main_job[1].out.splitlines() if line.startswith("step ")]
    assert len(lines) >= 10 and "\r" not in main_job[1].out
    for word in ("itc", "caption", "tgmim", "lr", "|g|", "pairs/s", "data wait", "GiB", "eta"):
        assert word in lines[-1]
    assert re.match(r"step +\d+/\d+ ", lines[0])
