"""Rows, averages and what a resumed run drops."""

import json
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.sycoca.micro import micro
from train.exits import StopRun
from train.health import Place, Spikes
from train.metrics import LOSS_NAMES, RunLog, Timing, format_figures, trained_losses, truncate_after


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def values(start: float):
    return torch.arange(len(LOSS_NAMES)) + start


def test_every_step_has_a_row_and_the_device_is_read_every_few(tmp_path, capsys):
    log = RunLog(tmp_path, losses=LOSS_NAMES, total_steps=5, first_step=0, every=2)
    for step in range(5):
        log.step(step, values(step), {"lr": 0.1, "grad_norm": torch.tensor(2.0)}, Timing(0.1, 0.4, 8))
    log.close()
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert found[2] == {"step": 3, **dict(zip(LOSS_NAMES, range(2, 8), strict=True)), "lr": 0.1, "grad_norm": 2.0}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "20 pairs/s" in lines[0] and "data wait 25%" in lines[0]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_loss_that_is_not_finite_is_null_and_does_not_stop_the_run(tmp_path, capsys):
    log = RunLog(tmp_path, losses=("loss", "itc"), total_steps=1, first_step=0, every=1)
    broken = torch.full((len(LOSS_NAMES),), float("nan"))
    log.step(0, broken, {"lr": 0.1, "grad_norm": None}, Timing(0.0, 1.0, 4))
    log.close()
    assert rows(tmp_path) == [{"step": 1, "loss": None, "itc": None, "lr": 0.1, "grad_norm": None}]
    assert "itc n/a" in capsys.readouterr().out


def test_only_trained_losses_are_named():
    assert trained_losses(micro()) == LOSS_NAMES
    coca = micro(masking={"drop_ratio": 0.0}, loss={"tgmim_weight": 0.0})
    assert trained_losses(coca) == ("loss", "itc", "caption")


def test_rows_behind_the_resumed_step_are_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    truncate_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_losses_are_averaged_over_the_ranks_and_written_once(tmp_path):
    def work(rank, world):
        log = RunLog(
            tmp_path, losses=LOSS_NAMES, total_steps=1, first_step=0, every=1, group=torch.distributed.group.WORLD
        )
        log.step(0, values(10.0 * rank), {"lr": 1.0, "grad_norm": 1.0}, Timing(0.0, 1.0, 4))
        log.close()

    run_ranks(work, 2)
    (row,) = rows(tmp_path)
    assert row["loss"] == pytest.approx(5.0) and row["local"] == pytest.approx(9.0)


def test_a_loss_that_leaps_is_told_with_its_batches(tmp_path, capsys):
    log = RunLog(tmp_path, losses=("loss",), total_steps=66, first_step=0, every=66, spikes=Spikes(2.0))
    for step in range(66):
        loss = torch.full((len(LOSS_NAMES),), 5.0 if step == 64 else 1.0)
        log.step(step, loss, {"lr": 0.1, "grad_norm": 1.0}, Timing(0.0, 1.0, 4), [Place(0, step, ("a", "b"))])
    log.close()
    told = [line for line in capsys.readouterr().out.splitlines() if "leaps" in line]
    assert told == ["loss leaps to 5.000 at step 65: batch 64 of epoch 0 (a, b)"]


def test_rows_that_cannot_be_written_end_the_run_on_all_ranks(tmp_path):
    def work(rank, world):
        log = RunLog(
            tmp_path, losses=LOSS_NAMES, total_steps=4, first_step=0, every=1, group=torch.distributed.group.WORLD
        )
        if rank == 0:
            log._jsonl.close()
            log._jsonl = Path("/dev/full").open("a")  # noqa: SIM115
        heard = []
        for step in range(2):
            log.step(step, values(float(step)), {"lr": 1.0, "grad_norm": 1.0}, Timing(0.0, 1.0, 4))
            heard.append(log.failure)
        for end in (lambda: log.check(1.0), log.close):
            try:
                end()
            except StopRun as stop:
                heard.append(str(stop))
        return heard

    full = f"{tmp_path / 'metrics.jsonl'}: No space left on device"
    assert run_ranks(work, 2) == [[full, full, full, full], [None, None, "rank 0 cannot write its figures", full]]


def test_the_line_of_figures_names_what_it_shows():
    row = {"itc": 1.0, "caption": 2.0, "tgmim": 0.5, "lr": 1e-3, "grad_norm": 3.0, "pairs_per_s": 90.0}
    line = format_figures(row | {"data_wait": 0.01, "memory_gib": 0.5})
    assert line == "itc 1.000  caption 2.000  tgmim 0.500  lr 1.0e-03  |g| 3.00  90 pairs/s  data wait 1%  0.5 GiB"


def test_weights_and_biases_gets_the_figures_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    import sys
    import types

    started, logged, ended = [], [], []

    class Run:
        def log(self, figures, step):
            logged.append((step, figures))

        def finish(self):
            ended.append(True)

    fake = types.SimpleNamespace(
        init=lambda **options: started.append(options) or Run(),
        util=types.SimpleNamespace(generate_id=lambda: f"id{len(started)}"),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "config.json").write_text('{"run": {"preset": "tiny"}, "deepspeed": {}}')
    for first in (0, 2):
        log = RunLog(tmp_path, losses=("loss",), total_steps=4, first_step=first, every=1, wandb="project")
        for step in (first, first + 1):
            figures = torch.full((len(LOSS_NAMES),), float(step))
            log.step(step, figures, {"lr": 0.1, "grad_norm": 1.0}, Timing(0.0, 1.0, 8))
        log.close()
    assert [options["id"] for options in started] == ["id0", "id0"] and len(ended) == 2
    assert started[0]["project"] == "project" and started[0]["config"] == {"preset": "tiny"}
    assert [(step, figures["train/loss"]) for step, figures in logged] == [(s + 1, float(s)) for s in range(4)]
    assert "train/step" in logged[0][1]
