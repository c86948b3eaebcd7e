"""A study of small rows, from the command line to its table; called again it trains nothing."""

import json

import pytest

from tests.runs.faults import SMALL

pytestmark = pytest.mark.run
ROWS = {
    "oracle": 'mask_by = "oracle"\ndrop_by = "oracle"\n',
    "SyCoCa": "",
    "SyCoCa + regions": 'objectives = ["itc", "ic", "tgmim", "itm", "bbox"]\nfusion.depth = 1\nfusion.heads = 2\n'
    "local_depth = 1\nregion_batch = 8\nwhole_share = 0.0\n",
}


def test_rows_become_a_table(command, tmp_path):
    keys = dict(option.removeprefix("--").split("=", 1) for option in SMALL)
    common = "".join(f"{key} = {value}\n" for key, value in keys.items() if key != "data")
    rows = "".join(f'[rows."{name}"]\n{changes}' for name, changes in ROWS.items())
    (tmp_path / "two.toml").write_text(
        f'base = "tiny"\nclaims = [["oracle", "SyCoCa"]]\n[common]\ndata.train = "{keys["data"]}"\ntrain.steps = 6\n'
        f'evaluate_every = 1\nprecision = "fp32"\n{common}{rows}',
        encoding="utf-8",
    )
    (tmp_path / "page.md").write_text("<!-- study: two -->\n<!-- /study: two -->\n", encoding="utf-8")
    line = f"python -m train.study {tmp_path / 'two.toml'} --out {tmp_path / 'study'}"
    done = command(line)
    assert done.code == 0, done.out + done.err
    table = json.loads((tmp_path / "study" / "two" / "table.json").read_text(encoding="utf-8"))
    for row in table["rows"]:
        assert row["seeds"] == 1 and row["steps"] == 6 and row["step_cpu_ms"] > 0 and row["wall_s"] > 0
        assert row["track"]["step"] == [1, 2, 3, 4, 5, 6] and 0 < row["equal_steps"]["recall"]["mean"] <= 1
        assert row["equal_steps"]["nats"]["mean"] > 0 and "recall" in row["equal_compute"]
    # The oracle's masks need no score: there is none whose coverage could be told.
    assert "coverage" not in table["rows"][0]["equal_steps"] and "coverage" in table["rows"][1]["equal_steps"]
    assert {"coverage", "boxes"} <= table["rows"][2]["equal_steps"].keys()
    assert "boxes" not in table["rows"][1]["equal_steps"]
    assert {claim["equal_steps"]["verdict"] for claim in table["claims"]} == {"one seed, no ordering"}
    again = command(f"{line} --page {tmp_path / 'page.md'}")
    assert again.code == 0 and "3 runs, 3 done" in again.out and "done in" not in again.out, again.out + again.err
    assert "| SyCoCa | 1 of 1 |" in (tmp_path / "page.md").read_text(encoding="utf-8")
    assert (tmp_path / "page_two.png").stat().st_size > 10_000
