"""Studies: plans refused in one line, runs that are skipped and continued, tables from results made by hand."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sycoca.config import ConfigError
from train.command_line import apply_overrides, split_overrides
from train.config import PRESETS
from train.recipe import chosen
from train.study import listed
from train.study_page import beside, fill, places, rendered
from train.study_plan import FOLDER, digest, plans, read_plan
from train.study_results import measures, read_result, result_path
from train.study_runs import carry_out, command_of, folder_of
from train.study_table import ABSENT, AGAINST, HOLDS, ONE_SEED, OPEN, markdown, tabulate

ROOT = Path(__file__).resolve().parents[2]
PLAN = """
base = "tiny"
seeds = [0, 1]
claims = [["masked", "plain"]]
[common]
train.steps = 10
[rows.plain]
tgmim_weight = 0.0
masking.drop_ratio = 0.0
[rows.masked]
"""


@pytest.fixture
def plan_of(tmp_path):
    def make(text=PLAN, name="mine", **options):
        path = tmp_path / f"{name}.toml"
        path.write_text(text, encoding="utf-8")
        return read_plan(str(path), **options)

    return make


# --- plans


def test_rows_and_seeds_become_whole_configurations(plan_of):
    plan = plan_of()
    assert [(run.row, run.seed) for run in plan.runs] == [("plain", 0), ("plain", 1), ("masked", 0), ("masked", 1)]
    plain, masked = plan.runs[1].config, plan.runs[2].config
    assert not plain.model.selects and masked.model.selects
    assert (plain.train.steps, plain.train.seed, plain.train.epochs) == (10, 1, None)
    assert masked.optimizer == PRESETS["tiny"].optimizer
    assert len({run.key for run in plan.runs}) == 4 and all(run.key == digest(run.config) for run in plan.runs)
    # What a plan is called and where else a run occurs does not matter.
    assert [run.key for run in plan_of(name="other").runs] == [run.key for run in plan.runs]


def test_runs_keep_their_names_when_keys_are_added():
    """Results lie under these digests; a key that comes later must not change them at the value that it had before."""
    held = {run.row: run.key for run in read_plan("main", seeds=[0]).runs}
    assert (held["CoCa"], held["SyCoCa, local"]) == ("6cae1425154d", "9524e9ddab1f")
    late = read_plan("main", seeds=[0], overrides={"masking.tgmim_start": 0.1})
    assert not {run.key for run in late.runs} & set(held.values())


def test_the_command_of_a_run_makes_its_configuration(plan_of, tmp_path):
    for run in plan_of(PLAN.replace("[common]", "[common]\ndata.crop_scale = [0.5, 1.0]\nwandb = 'x'")).runs:
        command = command_of(plan_of(), run, tmp_path)
        given = command[command.index("--preset") + 2 : command.index("--run-dir")]
        base = chosen("tiny", False)
        assert digest(apply_overrides(base, split_overrides(given, base))) == run.key


def test_overrides_seeds_and_rows_of_the_command_line(plan_of):
    plan = plan_of(only=["masked"], seeds=[7], overrides={"train.steps": 3})
    assert [(run.row, run.seed, run.config.train.steps) for run in plan.runs] == [("masked", 7, 3)]
    assert plan.claims == ()


WRONG = {
    PLAN.replace('"tiny"', '"tyni"'): "base: tyni: unknown; did you mean 'tiny'?",
    PLAN.replace("tgmim_weight", "tgmim_wait"): "row 'plain': tgmim_wait: unknown key; did you mean",
    PLAN.replace("drop_ratio = 0.0", "drop_ratio = 1.5"): "row 'plain': model.masking.drop_ratio: must lie in 0..1",
    PLAN.replace("train.steps = 10", 'train.steps = "ten"'): "train.steps",
    PLAN.replace("[0, 1]", "[0, 0]"): "seeds: [0, 0], needs different whole numbers",
    PLAN.replace("[0, 1]", "[-1]"): "seeds: [-1], needs different whole numbers",
    PLAN.replace('["masked", "plain"]', '["masked", "plane"]'): "claims: no row 'plane'; did you mean 'plain'?",
    PLAN.replace('["masked", "plain"]', '["masked"]'): "claims: ['masked'], needs pairs",
    PLAN + "\ntrain.seed = 3\n": "row 'masked': train.seed: the study's seeds are a key of their own",
    PLAN.replace("[rows", "[row"): "row: unknown key; did you mean 'rows'?",
    'base = "tiny"\nrows = {}': "rows: {}, needs rows",
    'base = "tiny"': "rows: missing, needs rows",
    "rows = 3\nbase = ": "not TOML",
    "minutes = 0\n" + PLAN: "minutes: 0, needs to be a number above 0",
}


@pytest.mark.parametrize("text, message", WRONG.items())
def test_a_wrong_plan_is_told_in_one_line(plan_of, text, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        plan_of(text)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", plans())
def test_shipped_plans_are_valid_and_alike(name, tmp_path):
    plan = read_plan(name)
    assert plan.about and f"python -m train.study {name}\n" in (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    assert len(listed(plan, tmp_path)) == len(plan.runs) == len(plan.rows) * len(plan.seeds)
    # Rows that two plans have in common are trained once: what all rows share is the same everywhere.
    main = read_plan("main")
    shared = {run.key for run in plan.runs} & {run.key for run in main.runs}
    assert any(run.key in shared for run in plan.of("CoCa"))
    # Only the texts with boxes, which a row may take beside its pairs, and the average that it learns from are its own.
    alike = [replace(run.config.train, region_batch=0, ema=None) for run in plan.runs if run.seed == 0]
    assert all(train == main.runs[0].config.train for train in alike)
    assert len({run.key for run in plan.runs}) == len(plan.runs), "two rows are one"


def test_the_main_plan_is_the_study_of_the_issue():
    plan = read_plan("main")
    assert len(plan.runs) == 33 and len(plan.seeds) == 3
    spaces = {run.config.model.masking.score_space for run in plan.runs if run.row.startswith("SyCoCa")}
    assert spaces == {"itc", "value", "local"}
    for run in plan.runs:
        model = run.config.model
        assert model.scores == (run.row.startswith(("SyCoCa", "attentive IC", "MIM attentive")))
        assert (model.image_decoder.guide == "none") == run.row.startswith("MIM")
        assert model.learns("ic") == (run.row != "ITC")


def test_rows_with_regions_change_nothing_else():
    plan, main = read_plan("regions"), read_plan("main")
    assert len(plan.seeds) == 3
    for row, other in (("CoCa", "CoCa"), ("SyCoCa", "SyCoCa, local")):
        assert [run.key for run in plan.of(row)] == [run.key for run in main.of(other)]
        for plain, taught in zip(plan.of(row), plan.of(f"{row} + regions"), strict=True):
            model = taught.config.model
            assert model.learns("itm") and model.learns("bbox") and model.fuses and model.text.kind == "causal"
            assert taught.overrides.keys() - plain.overrides.keys() == {
                "model.objectives",
                "model.fusion.depth",
                "model.fusion.heads",
                "model.fusion.mlp_ratio",
                "model.vision.local_depth",
                "train.region_batch",
                "data.whole_share",
                "data.region_crop",
            }
            assert plain.overrides.items() <= taught.overrides.items()


def test_a_row_may_have_a_group_that_the_base_has_not(plan_of, tmp_path):
    """A fusion encoder, named by its fields; its command line makes the same configuration."""
    plan = plan_of(PLAN + '[rows.fused]\nobjectives = ["itc", "ic", "itm"]\nfusion.depth = 1\nmodel.fusion.heads = 2\n')
    run = plan.of("fused")[0]
    assert run.config.model.fusion.heads == 2
    command = command_of(plan, run, tmp_path)
    given = command[command.index("--preset") + 2 : command.index("--run-dir")]
    assert "model.fusion.depth=1" in given
    base = chosen("tiny", False)
    assert digest(apply_overrides(base, split_overrides(given, base))) == run.key
    for wrong, message in (
        ("fusion.depth = 1", "model.fusion.heads: missing"),
        ("fusion.dept = 1", "fusion.dept: unknown key; did you mean 'model.fusion.depth'?"),
        ('fusion.depth = "one"\nfusion.heads = 2', "model.fusion.depth: input should be a valid integer"),
    ):
        with pytest.raises(ConfigError) as caught:
            plan_of(PLAN + f"[rows.fused]\n{wrong}\n")
        assert message in str(caught.value)


def test_runs_that_were_made_keep_their_keys():
    """A key of the configuration that is added later would make every finished run a new one."""
    first = read_plan("main").runs[0]
    assert (first.row, first.seed, first.key) == ("CoCa", 0, "6cae1425154d")


def test_a_wrong_plan_is_refused_before_torch():
    code = "import sys; from train import study; study.main(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "mian"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "did you mean 'main'?" in done.stderr and done.stdout.strip() == "False"


# --- runs

# What stands for a training: it writes what a run leaves, or waits to be told to end, or fails.
FAKE = """
import json, pathlib, signal, sys, time
folder, how, out = pathlib.Path(sys.argv[1]), sys.argv[2], {"retrieval": None, "tgmim": None, "selection": None}
folder.mkdir(parents=True, exist_ok=True)
(folder / "began").write_text("x" * (1 + ((folder / "began").exists() and len((folder / "began").read_text()))))
if how == "fail":
    print("error: a bad day"); sys.exit(3)
def end(*_):
    (folder / "checkpoints" / "step_00000005").mkdir(parents=True, exist_ok=True); sys.exit(75)
if how == "wait" and not (folder / "checkpoints").exists():
    signal.signal(signal.SIGTERM, end); (folder / "ready").touch(); time.sleep(60)
out["captioning"] = {"nats_per_token": 2.0}
row = out | {"captioning": {"nats_per_token": 3.0}, "step": 5, "step_cpu_s": 0.5}
(folder / "config.json").write_text(json.dumps({"run": {"train": {"steps": 10}}}))
(folder / "evaluations.jsonl").write_text(json.dumps(row) + "\\n")
(folder / "eval.json").write_text(json.dumps(out))
"""


def faking(how):
    """Commands that only pretend, each run in the manner that its row is given."""
    return lambda plan, run, out: [sys.executable, "-c", FAKE, str(folder_of(out, run)), how.get(run.row, "well")]


def begun(out, run):
    path = folder_of(out, run) / "began"
    return len(path.read_text()) if path.exists() else 0


def test_what_is_done_is_skipped_and_what_failed_is_tried_again(plan_of, tmp_path):
    plan, told = plan_of(), []
    missing = carry_out(plan, tmp_path, jobs=2, ended=told.append, command=faking({"masked": "fail"}))
    assert missing == 2 and sum(end.reason is None for end in told) == 2
    assert all("exit code 3: a bad day" in end.reason for end in told if end.reason)
    result = read_result(tmp_path, plan.runs[0])
    assert result["final"] == {"nats": 2.0} and result["track"] == [{"step": 5, "nats": 3.0}]
    assert result["step_cpu_s"] == 0.5 and result["steps"] == 10 and result["wall_s"] > 0
    assert carry_out(plan, tmp_path, jobs=2, command=faking({})) == 0
    assert [begun(tmp_path, run) for run in plan.runs] == [1, 1, 2, 2]
    # Another plan finds what it shares.
    other = plan_of(name="other", seeds=[1, 2])
    assert carry_out(other, tmp_path, jobs=1, command=faking({})) == 0
    assert [begun(tmp_path, run) for run in other.runs] == [1, 1, 2, 1]


def test_a_study_that_is_stopped_goes_on(plan_of, tmp_path):
    plan, told = plan_of(only=["plain"], seeds=[0]), []
    ready = folder_of(tmp_path, plan.runs[0]) / "ready"
    options = {"jobs": 1, "ended": told.append, "command": faking({"plain": "wait"})}
    assert carry_out(plan, tmp_path, stopped=ready.exists, **options) == 1
    assert told[-1].reason == "stopped; the same command goes on with it"
    assert "--resume" in command_of(plan, plan.runs[0], tmp_path)
    assert carry_out(plan, tmp_path, **options) == 0
    assert told[-1].reason is None and read_result(tmp_path, plan.runs[0])["wall_s"] is None
    assert not (folder_of(tmp_path, plan.runs[0]) / "checkpoints").exists()


def test_time_that_is_up_stops_a_run_or_the_study(plan_of, tmp_path):
    told = []
    options = {"jobs": 1, "ended": told.append, "command": faking({"plain": "wait"})}
    assert carry_out(plan_of(only=["plain"], seeds=[0]), tmp_path, limit_s=0.3, **options) == 1
    assert told[-1].reason.startswith("the study's time is up")
    slow = plan_of("minutes = 0.005\n" + PLAN, only=["plain"], seeds=[1])
    assert carry_out(slow, tmp_path, **options) == 1
    assert told[-1].reason.startswith("over 0.005 minutes")


@pytest.mark.skipif(sys.platform != "linux", reason="a death that takes others along is Linux's")
def test_a_study_that_is_killed_takes_its_runs_along(plan_of, tmp_path):
    run = plan_of(only=["plain"], seeds=[0]).runs[0]
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.train.test_study import faking
from train.study_plan import read_plan
from train.study_runs import carry_out
plan = read_plan({str(tmp_path / "mine.toml")!r}, only=["plain"], seeds=[0])
carry_out(plan, Path({str(tmp_path)!r}), jobs=1, command=faking({{"plain": "wait"}}))
"""
    study = subprocess.Popen([sys.executable, "-c", code])
    folder, deadline = folder_of(tmp_path, run), time.monotonic() + 60
    while not (folder / "ready").exists() and study.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(study.pid, signal.SIGKILL)
    study.wait()
    while not (folder / "checkpoints").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (folder / "checkpoints").exists()


def test_a_damaged_result_is_named(plan_of, tmp_path):
    run = plan_of().runs[0]
    result_path(tmp_path, run).parent.mkdir()
    result_path(tmp_path, run).write_text('{"key": "another"}')
    with pytest.raises(ConfigError, match="not the result of this run; remove it"):
        read_result(tmp_path, run)


# --- tables

ENVIRONMENT = {"machine": "M", "python": "3", "torch": "2", "deepspeed": "0", "commit": "abc"}


def result(key, recall, nats, *, cost, track=()):
    final = {"recall": recall, "mTR": recall, "mIR": recall, "nats": nats}
    track = [{"step": step, "recall": value, "nats": 9.0} for step, value in track]
    return {"key": key, "steps": 100, "step_cpu_s": cost, "wall_s": 1.0, "final": final, "track": track} | {
        "environment": ENVIRONMENT
    }


def by_hand(plan, plain, masked, **masked_form):
    found = {run.key: result(run.key, *value, cost=1.0) for run, value in zip(plan.of("plain"), plain)}
    return found | {run.key: result(run.key, *value, **masked_form) for run, value in zip(plan.of("masked"), masked)}


def test_mean_deviation_and_the_figures_at_equal_compute(plan_of):
    plan = plan_of()
    form = {"cost": 2.5, "track": [(25, 0.1), (50, 0.2)]}
    table = tabulate(plan, by_hand(plan, [(0.2, 3.0), (0.3, 2.0)], [(0.4, 1.0), (0.6, 1.2)], **form))
    plain, masked = table["rows"]
    assert table["cheapest"] == "plain" and table["budget_cpu_s"] == 100
    assert plain["equal_steps"]["recall"]["mean"] == pytest.approx(0.25)
    assert plain["equal_steps"]["recall"]["sd"] == pytest.approx(0.1 / 2**0.5)
    # The cheapest row has spent the budget at its end.
    assert plain["equal_compute"]["recall"] == plain["equal_steps"]["recall"]
    # 100 s at 2.5 s a step are 40 steps: three fifths of the way from 0.1 to 0.2.
    assert masked["equal_compute"]["step"] == 40
    assert masked["equal_compute"]["recall"]["mean"] == pytest.approx(0.16)
    assert masked["step_cpu_ms"] == 2500 and masked["track"]["step"] == [25, 50, 100]
    assert masked["track"]["recall"] == pytest.approx([0.1, 0.2, 0.5])
    text = markdown(table, "figures.png")
    assert "| plain | 2 of 2 | 0.250 ± 0.071 | 0.250 ± 0.071 |" in text
    assert "| masked | 2 of 2 | 0.500 ± 0.141 | 0.160 ± 0.000 |" in text
    assert "4 of 4 runs of `mine`, 2 seeds" in text and "100 s of processor time that plain takes" in text


def test_a_claim_at_equal_compute_has_the_budget_of_its_two_rows(plan_of):
    plan = plan_of(PLAN + "[rows.cheap]\nlr = 1e-4\n")
    found = by_hand(plan, [(0.2, 3.0), (0.3, 2.0)], [(0.4, 1.0), (0.6, 1.2)], cost=2.5, track=[(25, 0.1), (50, 0.2)])
    found |= {run.key: result(run.key, 0.1, 1.0, cost=0.3) for run in plan.of("cheap")}
    table = tabulate(plan, found)
    assert table["cheapest"] == "cheap" and table["rows"][1]["equal_compute"]["step"] == pytest.approx(12)
    # Against the plain row's 100 s: 40 steps.
    claim = table["claims"][0]["equal_compute"]
    assert claim["difference"] == pytest.approx(0.16 - 0.25) and claim["verdict"] == AGAINST


def test_nothing_is_made_up_before_the_first_evaluation(plan_of):
    plan = plan_of()
    table = tabulate(plan, by_hand(plan, [(0.2, 3.0)], [(0.4, 1.0)], cost=10.0, track=[(25, 0.1)]))
    assert table["rows"][1]["equal_compute"] == {"step": 10.0}
    assert "| masked | 1 of 2 | 0.400 | - |" in markdown(table)


@pytest.mark.parametrize(
    "plain, masked, recall, nats",
    [
        ([(0.2, 3.0), (0.3, 2.9)], [(0.6, 1.0), (0.7, 1.1)], HOLDS, HOLDS),
        ([(0.6, 1.0), (0.7, 1.1)], [(0.2, 3.0), (0.3, 2.9)], AGAINST, AGAINST),
        ([(0.2, 3.0), (0.3, 2.0)], [(0.25, 2.4), (0.35, 2.4)], OPEN, OPEN),
        ([(0.2, 3.0)], [(0.6, 1.0)], ONE_SEED, ONE_SEED),
        ([], [(0.6, 1.0)], ABSENT, ABSENT),
    ],
)
def test_a_claim_needs_more_than_one_standard_deviation(plan_of, plain, masked, recall, nats):
    plan = plan_of()
    claims = tabulate(plan, by_hand(plan, plain, masked, cost=1.0))["claims"]
    found = [(claim["measure"], claim["equal_steps"]["verdict"]) for claim in claims]
    assert found == [("recall", recall), ("nats", nats)]
    # Rows of one cost have spent the same at the end.
    assert all(claim["equal_compute"] == claim["equal_steps"] for claim in claims)


def test_what_a_seed_does_to_both_rows_is_seen(plan_of):
    plan = plan_of()
    table = tabulate(plan, by_hand(plan, [(0.1, 1.0), (0.5, 2.0)], [(0.2, 0.9), (0.6, 2.2)], cost=1.0))
    recall, nats = (claim["equal_steps"] for claim in table["claims"])
    assert recall["by_seed"] == pytest.approx(0.0, abs=1e-12) and recall["verdict"] == "within one standard deviation"
    assert nats["by_seed"] == pytest.approx(0.3 / 2**0.5)
    lacking = by_hand(plan, [(0.1, 1.0)], [(0.2, 0.9), (0.6, 2.2)], cost=1.0)
    assert tabulate(plan, lacking)["claims"][0]["equal_steps"]["by_seed"] is None


def test_a_table_without_any_run(plan_of):
    table = tabulate(plan_of(), {})
    assert "| plain | 0 of 2 | - | - |" in markdown(table) and table["cheapest"] is None


def test_measures_of_an_evaluation():
    recalls = {"r@1": 0.1, "r@5": 0.2, "r@10": 0.6}
    block = {"image_to_text": recalls, "text_to_image": {name: 2 * value for name, value in recalls.items()}}
    block["chance"] = {way: dict.fromkeys(recalls, 0.01) for way in ("image_to_text", "text_to_image")}
    figures = {"retrieval": {"pairs": block, "captions": None}, "captioning": None}
    figures["selection"] = {"described_share": 0.7, "described_share_random": 0.5, "described_share_shuffled": 0.4}
    figures["selection"]["auc"] = None
    found = measures(figures)
    assert found["mTR"] == pytest.approx(0.3) and found["mIR"] == pytest.approx(0.6)
    assert found["recall"] == pytest.approx(0.45) and found["recall_chance"] == pytest.approx(0.01)
    assert found["coverage"] == 0.7 and found["auc"] is None and "nats" not in found and "boxes" not in found
    found = measures(figures | {"grounding": {"acc@0.5": 0.3, "best_box": 0.2}})
    assert (found["boxes"], found["boxes_best"]) == (0.3, 0.2)


def test_a_table_shows_boxes_where_a_row_learns_them(plan_of):
    plan = plan_of()
    found = by_hand(plan, [(0.2, 3.0)], [(0.4, 1.0)], cost=1.0)
    assert "Acc@0.5" not in markdown(tabulate(plan, found))
    found[plan.of("masked")[0].key]["final"] |= {"boxes": 0.3, "boxes_best": 0.2}
    text = markdown(tabulate(plan, found))
    assert "| Acc@0.5 of boxes (an image's best box 0.200) |" in text and "| 1.000 | - | 0.300 |" in text
    assert len({line.count("|") for line in text.split("\n\n")[1].splitlines()}) == 1


# --- pages


def test_a_page_takes_a_table_between_its_marks_alone(plan_of, tmp_path):
    plan = plan_of()
    table = tabulate(plan, by_hand(plan, [(0.2, 3.0)], [(0.4, 1.0)], cost=1.0))
    (tmp_path / "figures.png").write_bytes(b"picture")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- study: mine -->\nold\n<!-- /study: mine -->\nafter\n")
    fill(page, table, tmp_path)
    fill(page, table, tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("-->\nafter\n") and "old" not in text
    assert places(text)["mine"] == rendered(page, json.loads(beside(page, "mine", "json").read_text()))
    assert beside(page, "mine", "png").read_bytes() == b"picture" and "](page_mine.png)" in text
    with pytest.raises(ConfigError, match="has no '<!-- study: other -->'"):
        fill(page, table | {"name": "other"}, tmp_path)


def test_the_page_of_the_study_says_what_its_data_say():
    page = ROOT / "docs" / "study.md"
    held = places(page.read_text(encoding="utf-8"))
    assert held.keys() == plans().keys()
    for name, text in held.items():
        data = beside(page, name, "json")
        if data.exists():
            table = json.loads(data.read_text(encoding="utf-8"))
            assert text == rendered(page, table)
            assert [row["name"] for row in table["rows"]] == list(read_plan(name).rows)
        else:
            assert text == "\nNot run yet.\n\n"
