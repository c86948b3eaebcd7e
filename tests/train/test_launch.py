"""Command line, DeepSpeed JSON and preset: who wins, and what a mistake is answered with."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sycoca.config import ConfigError, to_dict
from train.config import PRESETS
from train.launch import effective, parse

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "train" / "pretrain.py"


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Parses a command line in an empty folder; `config` is written as the DeepSpeed JSON."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, config=None, world=1, has_cuda=False):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        name = "ds_zero2.json"
        if config is not None:
            name = str(tmp_path / "user.json")
            Path(name).write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
        return parse(["--config", name, *argv], script=SCRIPT, has_cuda=has_cuda)

    return run


def test_default_preset_follows_the_hardware(launch):
    assert launch().config.preset == "tiny"
    on_gpu = launch(has_cuda=True)
    assert on_gpu.config.preset == "small"
    assert on_gpu.deepspeed["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert "torch_autocast" not in launch().deepspeed


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_round_trip_through_json(name):
    config = PRESETS[name]
    assert json.loads(json.dumps(to_dict(config)))["preset"] == name
    assert dataclasses.is_dataclass(config)


def test_json_wins_over_the_preset(launch):
    config = {
        "train_batch_size": 48,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95]}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 7, "total_num_steps": 70}},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8},
    }
    result = launch("local_group=1", config=config, world=3)
    assert (result.config.train.micro_batch, result.config.train.accumulation) == (8, 2)
    assert (result.config.optimizer.lr, result.config.optimizer.betas) == (3e-4, (0.9, 0.95))
    assert (result.config.schedule.name, result.config.schedule.warmup_steps) == ("linear", 7)
    assert result.config.train.steps == 70
    assert result.deepspeed["train_batch_size"] == 48
    assert "optimizer" not in result.deepspeed and "scheduler" not in result.deepspeed
    assert result.config.train.global_batch == 48
    assert any("48 pairs in 2 micro batches a rank, contrasted as one batch" in note for note in result.notes)


@pytest.mark.parametrize(
    ("argv", "batch"), [(["micro_batch=16"], (16, 2)), (["accumulation=4"], (8, 4)), ([], (32, 1))]
)
def test_the_batch_of_the_json_is_solved_for_what_is_left_open(launch, argv, batch):
    train = launch("local_group=1", *argv, config={"train_batch_size": 64}, world=2).config.train
    assert (train.micro_batch, train.accumulation) == batch


@pytest.mark.parametrize(
    ("argv", "world", "batch"),
    [
        (["global_batch=256"], 2, (32, 4)),
        (["global_batch=256", "micro_batch=64"], 1, (64, 4)),
        (["global_batch=256", "accumulation=2"], 1, (128, 2)),
        (["accumulation=2"], 2, (32, 2)),
    ],
)
def test_micro_batch_and_global_batch_are_all_that_is_set(launch, argv, world, batch):
    result = launch(*argv, world=world)
    train = result.config.train
    assert (train.micro_batch, train.accumulation) == batch
    assert train.global_batch == batch[0] * batch[1] * world == result.deepspeed["train_batch_size"]
    assert result.deepspeed["gradient_accumulation_steps"] == batch[1]


def test_auto_means_from_the_preset_for_the_keys_the_preset_owns(launch):
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "auto", "params": {"warmup_num_steps": "auto"}},
        "bf16": {"enabled": "auto"},
    }
    assert launch(config=config).config == launch().config


def test_an_agreeing_override_is_no_conflict(launch):
    assert (
        launch("lr=3e-4", config={"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}}).config.optimizer.lr == 3e-4
    )


def test_shortened_keys_and_tuples(launch):
    config = launch("steps=7", "betas=0.8,0.9", "objectives=itc,ic", "gradient_checkpointing=true").config
    assert (config.train.steps, config.optimizer.betas) == (7, (0.8, 0.9))
    assert config.model.objectives == ("itc", "ic") and config.model.gradient_checkpointing


BAD = {
    "typo of an override": (["model.vision.dept=3"], None, "model.vision.depth"),
    "typo of a short override": (["lrr=1"], None, "optimizer.lr"),
    "ambiguous override": (["depth=3"], None, "model.text.depth"),
    "not key=value": (["lr"], None, "key=value"),
    "wrong type": (["steps=many"], None, "train.steps"),
    "fraction for an integer": (["steps=1.5"], None, "train.steps"),
    "no steps": (["steps=0"], None, "train.steps"),
    "negative rate": (["lr=-1"], None, "optimizer.lr"),
    "rate of no number": (["lr=NaN"], None, "optimizer.lr"),
    "rate beyond a float": (["lr=1e400"], None, "optimizer.lr"),
    "epochs of no number": (["train.epochs=NaN"], None, "train.epochs"),
    "beta of one": (["betas=0.9,1"], None, "optimizer.betas"),
    "no epsilon": (["eps=0"], None, "optimizer.eps"),
    "negative decay": (["weight_decay=-1"], None, "optimizer.weight_decay"),
    "crop upside down": (["crop_scale=1,0.5"], None, "data.crop_scale"),
    "crop of nothing": (["crop_scale=0,0.5"], None, "data.crop_scale"),
    "decay beyond the run": (["decay_share=1.5"], None, "schedule.decay_share"),
    "negative end of the schedule": (["final_share=-0.1"], None, "schedule.final_share"),
    "no patience": (["timeout_s=0"], None, "train.timeout_s"),
    "infinite weight of a loss": (["itc_weight=Infinity"], None, "model.loss.itc_weight"),
    "negative seed": (["train.seed=-1"], None, "train.seed"),
    "no length": (["train.steps=none"], None, "train.steps"),
    "clipping of no number": ([], '{"gradient_clipping": NaN}', "NaN"),
    "clipping beyond a float": ([], '{"gradient_clipping": 1e400}', "gradient_clipping"),
    "negative clipping": ([], {"gradient_clipping": -1}, "gradient_clipping"),
    "steps and epochs": (["train.steps=3", "train.epochs=1"], None, "train.epochs"),
    "typo of an option": (["--preste", "tiny"], None, "--preste: unknown option; did you mean '--preset'?"),
    "typo of an option with a value": (["--preste=tiny"], None, "did you mean '--preset'?"),
    "shortened option": (["--pre", "tiny"], None, "--pre: unknown option"),
    "option without its value": (["--preset"], None, "--preset"),
    "too few samples": (["--data", "scenes?count=40", "micro_batch=41"], None, "40 samples do not fill a batch"),
    "vocabulary below the bytes": (["model.text.vocab_size=258"], None, "model.text.vocab_size"),
    "printed configuration of missing data": (["--print-config", "--data", "captions.tsv"], None, "captions.tsv"),
    "unknown preset": (["--preset", "tinny"], None, "tiny"),
    "unknown objective": (["objectives=itc,icc"], None, "ic"),
    "missing data": (["--data", "captions.tsv"], None, "captions.tsv"),
    "data given twice": (["--data", "scenes", "data.train=other"], None, "data.train"),
    "unknown tokenizer": (["data.tokenizer=none.json"], None, "none.json"),
    "run to resume is missing": (["--resume", "--run-dir", "nowhere"], None, "nowhere"),
    "name too long for a run": (["--run-dir", "x" * 300], None, "File name too long"),
    "name too long to resume": (["--resume", "--run-dir", "x" * 300], None, "File name too long"),
    "name too long for a JSON": (["--config", "x" * 300], None, "File name too long"),
    "nothing to resume": (["--resume"], None, "no checkpoint"),
    "restart of no run": (["--restart"], None, "--restart: name the run with --run-dir"),
    "restart and resume": (["--restart", "--resume"], None, "give one of them"),
    "no such JSON": (["--config", "ds_zero9.json"], None, "ds_zero"),
    "not JSON": ([], "{", "not valid JSON"),
    "a list": ([], "[]", "object"),
    "key twice": ([], '{"gradient_clipping": 1, "gradient_clipping": 2}', "gradient_clipping"),
    "typo at the top": ([], {"zero_optimisation": {}}, "zero_optimization"),
    "second typo at the top": ([], {"gradient_cliping": 1.0}, "gradient_clipping"),
    "typo inside": ([], {"zero_optimization": {"stag": 2}}, "stage"),
    "stage of a wrong type": ([], {"zero_optimization": {"stage": "2"}}, "stage"),
    "unknown stage": ([], {"zero_optimization": {"stage": 4}}, "stage"),
    "auto where no preset owns it": ([], {"gradient_clipping": "auto"}, "gradient_clipping"),
    "clipping of a wrong type": ([], {"gradient_clipping": "1"}, "gradient_clipping"),
    "feature that is not used": ([], {"autotuning": {"enabled": True}}, "autotuning"),
    "batch product": ([], {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4}, "train_batch_size"),
    "batch of nothing": ([], {"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu"),
    "unknown optimizer": ([], {"optimizer": {"type": "Adamm"}}, "AdamW"),
    "two precisions": ([], {"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16"),
    "rate in JSON and override": (["lr=1"], {"optimizer": {"type": "AdamW", "params": {"lr": 2.0}}}, "optimizer.lr"),
    "batch in JSON and override": (["micro_batch=8"], {"train_micro_batch_size_per_gpu": 4}, "train.micro_batch"),
    "precision in JSON and override": (["precision=fp32"], {"bf16": {"enabled": True}}, "bf16.enabled: true"),
    "schedule in JSON and override": (["schedule.name=wsd"], {"scheduler": {"type": "WarmupLR"}}, '"WarmupLR"'),
    "total and a part that does not divide it": (["micro_batch=7"], {"train_batch_size": 64}, "train.micro_batch=7"),
    "total and both parts": (["micro_batch=8", "accumulation=2"], {"train_batch_size": 64}, "train_batch_size: 64"),
    "total, part and override": (
        ["micro_batch=8"],
        {"train_batch_size": 64, "gradient_accumulation_steps": 2},
        "train.micro_batch=8, gradient_accumulation_steps: 2",
    ),
    "global batch that does not divide": (
        ["global_batch=100"],
        None,
        "train.micro_batch 32 x 1 rank(s); near: 96, 128",
    ),
    "global batch below the micro batch": (["global_batch=16"], None, "near: 32"),
    "global batch and both parts": (
        ["global_batch=64", "micro_batch=8", "accumulation=2"],
        None,
        "train.global_batch 64 is not train.micro_batch 8 x train.accumulation 2 x 1 rank(s), 16",
    ),
    "global batch in JSON and override": (
        ["global_batch=128"],
        {"train_batch_size": 64},
        "train_batch_size: 64, but the command line says train.global_batch=128",
    ),
    "no global batch": (["global_batch=0"], None, "train.global_batch"),
    "groups that parts would cut": (["accumulation=2", "local_group=3"], None, "local_group 3 does not divide"),
    "override twice": (["lr=1", "optimizer.lr=2"], None, "optimizer.lr is given twice"),
    "steps in JSON and epochs": (
        ["epochs=2"],
        {"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 70}}},
        "scheduler.params.total_num_steps: 70, but the command line says train.epochs=2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_line_that_names_the_key(launch, case):
    argv, config, expected = BAD[case]
    with pytest.raises(ConfigError) as caught:
        launch(*argv, config=config)
    message = str(caught.value)
    assert expected in message and "\n" not in message


@pytest.fixture
def stopped(launch, tmp_path):
    """The folder of a run that stopped after step 5, its configuration as the run wrote it."""
    started = launch("--run-dir", "runs/run", "steps=10", "micro_batch=4", "local_group=1", world=2)
    (tmp_path / "runs" / "run" / "checkpoints" / "step_00000005").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "config.json").write_text(json.dumps(effective(started)))
    return tmp_path / "runs" / "run"


NO_RESUME = {
    "model": (["model.vision.depth=1"], 2, "model.vision.depth is 4"),
    "objectives": (["objectives=itc"], 2, "model.objectives"),
    "source": (["--data", "scenes?count=100"], 2, "data.train"),
    "held-out source": (["data.val=scenes"], 2, "data.val"),
    "tokenizer": (["data.tokenizer=clip"], 2, "data.tokenizer"),
    "seed": (["train.seed=1"], 2, "train.seed is 0 in the run and cannot become 1"),
    "batch": (["micro_batch=8"], 2, "train.micro_batch"),
    "accumulation": (["accumulation=2"], 2, "train.accumulation"),
    "ranks": ([], 1, "train_batch_size 8 on 2 rank(s)"),
    "end before the checkpoint": (["steps=4"], 2, "train.steps"),
}


@pytest.mark.parametrize("case", NO_RESUME)
def test_a_change_that_makes_another_run_is_no_resume(launch, stopped, case):
    argv, world, expected = NO_RESUME[case]
    with pytest.raises(ConfigError, match="--resume") as caught:
        launch("--resume", "--run-dir", "runs/run", *argv, world=world)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_another_zero_stage_is_no_resume(launch, stopped):
    with pytest.raises(ConfigError, match=r"the run has ZeRO stage 2, .* asks for stage 3"):
        launch("--resume", "--run-dir", "runs/run", config={"zero_optimization": {"stage": 3}}, world=2)


def test_a_resumed_run_may_be_longer_and_learn_otherwise(launch, stopped):
    argv = ["steps=20", "log_every=1", "save_every=2", "keep_last=1", "workers=0", "lr=1e-4", "micro_batch=4"]
    config = launch("--resume", *argv, world=2).config
    assert (config.train.steps, config.train.keep_last, config.optimizer.lr) == (20, 1, 1e-4)
    assert launch("--resume", "epochs=3", world=2).config.train.steps is None
    with pytest.raises(ConfigError, match=r"train\.epochs 0\.0001 end at step 0"):
        launch("--resume", "epochs=0.0001", world=2)


@pytest.mark.parametrize("name", ["step_5", "step_00000005.tmp", "step_000000050"])
def test_only_complete_checkpoints_are_resumed(launch, stopped, name):
    (stopped / "checkpoints" / "step_00000005").rename(stopped / "checkpoints" / name)
    with pytest.raises(ConfigError, match="no checkpoint"):
        launch("--resume", world=2)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable to root")
@pytest.mark.parametrize("option", ["--run-dir", "--config"])
def test_unreadable_folder_is_one_line(launch, tmp_path, option):
    (tmp_path / "shut").mkdir(mode=0)
    with pytest.raises(ConfigError, match=r"shut.*Permission denied"):
        launch(option, "shut/inner/name")


def test_samples_are_counted_over_all_ranks(launch):
    argv = ["--data", "scenes?count=40", "micro_batch=20", "local_group=1"]
    assert launch(*argv, world=2).config.train.micro_batch == 20
    with pytest.raises(ConfigError, match="do not fill"):
        launch(*argv, world=3)


def test_groups_of_the_local_term_are_those_of_one_process(launch):
    assert launch("micro_batch=16").config.model.masking.local_group == 32
    with pytest.raises(
        ConfigError, match=r"local_group 32 does not divide train\.micro_batch 16: 2 rank\(s\).*local_group=16"
    ):
        launch("micro_batch=16", world=2)
    assert launch("micro_batch=16", "objectives=itc", world=2).config.model.local_weight == 0


def test_table_without_enough_held_out_samples_is_refused(launch, tmp_path):
    rows = "".join(f"{i}.png\tcaption {i}\t{split}\n" for i, split in enumerate(["train"] * 40 + ["val"]))
    (tmp_path / "captions.tsv").write_text("image\tcaption\tsplit\n" + rows)
    with pytest.raises(ConfigError, match="held"):
        launch("--data", "captions.tsv")


def test_tokenizer_that_is_no_json_is_refused(launch, tmp_path):
    for content in (b"{", b"\xff\xfe"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"data\.tokenizer=tokenizer\.json: not a JSON file"):
            launch("data.tokenizer=tokenizer.json")
    with pytest.raises(ConfigError, match="directory"):
        launch("data.tokenizer=.")


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_prints_the_configuration(launch, monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(SystemExit) as stop:
        launch("--print-config", world=2)
    printed = capsys.readouterr()
    assert not stop.value.code and not printed.err
    assert (json.loads(printed.out)["run"]["preset"] == "tiny") if rank == 0 else (printed.out == "")


def test_run_folder_that_holds_a_run_is_refused(launch, stopped):
    with pytest.raises(ConfigError, match="already holds a run; add --resume"):
        launch("--run-dir", "runs/run")
    with pytest.raises(ConfigError, match="already holds a run; use --resume"):
        launch("--restart", "--run-dir", "runs/run")


def test_a_run_without_a_checkpoint_is_started_anew_only_when_asked(launch, tmp_path):
    (tmp_path / "runs" / "old" / "checkpoints" / ".partial").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds other files; name another folder"):
        launch("--restart", "--run-dir", "runs/old")
    (tmp_path / "runs" / "old" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"ended before its first checkpoint; add --restart"):
        launch("--run-dir", "runs/old")
    for named in ((), ("--run-dir", "runs/old")):
        with pytest.raises(ConfigError, match=r"no checkpoint in runs/old, .* --restart --run-dir runs/old starts it"):
            launch("--resume", *named)
    started = launch("--restart", "--run-dir", "runs/old")
    assert (started.run_dir, started.restart, started.resume) == (Path("runs/old"), True, False)
    assert launch("--restart", "--run-dir", "fresh").run_dir == Path("fresh")


def test_file_in_place_of_the_run_folder_is_refused(launch, tmp_path):
    (tmp_path / "file").write_text("")
    for path in ("file", "file/run"):
        with pytest.raises(ConfigError, match="file"):
            launch("--run-dir", path)


def test_fresh_runs_do_not_share_a_folder(launch, tmp_path):
    assert launch().run_dir == Path("runs/tiny")
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    assert launch().run_dir == Path("runs/tiny-2")


def _processor_s() -> float:
    """Seconds that finished child processes have computed: what else runs on the machine does not count."""
    times = os.times()
    return times.children_user + times.children_system


@pytest.mark.parametrize(
    ("script", "argv", "named"),
    [
        ("pretrain", ["lrr=1"], "optimizer.lr"),
        ("pretrain", ["--preset", "tinny"], "tiny"),
        ("pretrain", ["--data", "captions.tsv"], "captions.tsv"),
        ("pretrain", ["--resume", "--run-dir", "nowhere"], "nowhere"),
        ("finetune", ["retrievel"], "retrieval"),
        ("evaluate", ["retrieval", "lmit=3"], "limit"),
    ],
)
def test_scripts_stop_within_three_seconds_and_before_torch(tmp_path, script, argv, named):
    path = SCRIPT.with_name(f"{script}.py")
    config = [] if script == "evaluate" else ["--config", "ds_zero2.json"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    model = [] if script == "pretrain" else ["--model", "model"]
    probe = (
        f"import sys, runpy; sys.argv = {[path.name, *argv, *config, *model]!r};"
        f"sys.path.insert(0, {str(path.parent)!r})\n"
        f"try: runpy.run_path({str(path)!r}, run_name='__main__')\n"
        "except SystemExit as stop: print('torch' in sys.modules, stop.code)"
    )
    before = _processor_s()
    done = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.stdout.split() == ["False", "2"], done
    assert done.stderr.count("\n") == 1 and named in done.stderr
    assert _processor_s() - before < 3


def test_all_mistakes_are_found_within_three_seconds_of_the_start(tmp_path):
    """Each on its own costs a start of Python and its own line of the table; here one start serves all."""
    probe = f"""
import sys, time
started = time.process_time()
sys.path.insert(0, {str(ROOT)!r})
import json, os
from pathlib import Path
from train.launch import parse
from sycoca.config import ConfigError
start_s, cases = time.process_time() - started, json.loads(sys.stdin.read())
longest_s = 0.0
for argv, config in cases:
    name = "ds_zero2.json"
    if config is not None:
        name = "user.json"
        Path(name).write_text(config if isinstance(config, str) else json.dumps(config))
    started = time.process_time()
    try:
        parse(["--config", name, *argv], script=Path({str(SCRIPT)!r}), has_cuda=False)
    except ConfigError:
        longest_s = max(longest_s, time.process_time() - started)
    else:
        sys.exit(f"accepted: {{argv}}")
print(json.dumps([start_s + longest_s, len(cases), "torch" in sys.modules]))
"""
    cases = json.dumps([(argv, config) for argv, config, _ in BAD.values()])
    done = subprocess.run(
        [sys.executable, "-c", probe], input=cases, cwd=tmp_path, capture_output=True, text=True, env=os.environ
    )
    assert not done.returncode, done.stderr[-2000:]
    longest_s, number, has_torch = json.loads(done.stdout.splitlines()[-1])
    print(f"{number} configurations, the slowest {longest_s:.2f} s after the start")
    assert number >= 30 and longest_s < 3 and not has_torch


def test_schema_agrees_with_the_installed_deepspeed():
    """Run in a process of its own: importing DeepSpeed is slow and changes global state."""
    probe = """
import os; os.environ["DS_ACCELERATOR"] = "cpu"
import sys; sys.path.insert(0, ".")
from train.engine import import_deepspeed
import_deepspeed()
from dataclasses import fields
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from train import deepspeed_json as ours
for mine, theirs in ((ours.ZeroOptimization, DeepSpeedZeroConfig), (ours.OffloadParam, DeepSpeedZeroOffloadParamConfig),
                     (ours.OffloadOptimizer, DeepSpeedZeroOffloadOptimizerConfig), (ours.Fp16, DeepSpeedFP16Config),
                     (ours.Bf16, DeepSpeedBF16Config)):
    known = {field.alias or name for name, field in theirs.model_fields.items()}
    for field in fields(mine):
        assert field.name in known, (mine, field.name)
import deepspeed.runtime.constants as constants
words = {value for value in vars(constants).values() if isinstance(value, str)}
for field in fields(ours.DeepSpeedJson):
    assert field.name in words or field.name in ("zero_optimization", "comms_logger", "fp16", "bf16"), field.name
print("agrees")
"""
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip().endswith("agrees"), done.stderr[-2000:]


def test_the_oracle_needs_boxes_that_follow_the_picture(launch, tmp_path):
    assert launch("mask_by=oracle").config.model.needs_boxes
    with pytest.raises(ConfigError, match=r"data\.crop_scale: the oracle's boxes .*; data\.crop_scale=none"):
        launch("mask_by=oracle", "crop_scale=0.9,1.0")
    with pytest.raises(ConfigError, match=r"data\.flip: .*; data\.flip=0"):
        launch("mask_by=oracle", "flip=0.5")
    from PIL import Image

    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    rows = ["image\tcaption\tsplit", "a.png\ta thing\ttrain", "b.png\ta thing\tval", "c.png\ta thing\tval"]
    (tmp_path / "t.tsv").write_text("\n".join(rows) + "\n")
    with pytest.raises(ConfigError, match="needs boxes, and it has none"):
        launch("mask_by=oracle", "--data", str(tmp_path / "t.tsv"), "micro_batch=1", "local_group=1")


def test_augmentation_of_colours_spares_captions_that_name_them(launch, tmp_path):
    left_out = launch("--preset", "xvlm_base")
    assert left_out.config.data.randaugment is None
    assert any("data.randaugment left out: captions of scenes name exact colours" in note for note in left_out.notes)
    with pytest.raises(ConfigError, match=r"data\.randaugment: captions of scenes name exact colours"):
        launch("data.randaugment=2,7")
    with pytest.raises(ConfigError, match=r"data\.randaugment: 0,7\.0, needs at least 1 operation of a strength"):
        launch("data.randaugment=0,7")
    table = tmp_path / "t.tsv"
    table.write_text("image\tcaption\n" + "".join(f"{n}.png\ta dog\n" for n in range(2000)), encoding="utf-8")
    plain = launch("--preset", "xvlm_base", "--data", str(table), "--run-dir", str(tmp_path / "run"))
    assert plain.config.data.randaugment == (2, 7) and not plain.notes
    with pytest.raises(ConfigError, match="name exact colours"):
        launch("--data", f"{table}=0.5,scenes=0.5", "data.randaugment=2,7")
