"""Metrics of a run: one JSON line a step, TensorBoard events, and a progress display.

Device tensors are kept as they are and read together every few steps, so that a step never waits for the device.
"""

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from sycoca.config import ModelConfig
from train.durable import write_atomically
from train.exits import StopRun
from train.together import agree

# Terms on the progress line, those of fine-tuning behind those of pre-training.
_SHOWN = (
    "itc",
    "caption",
    "tgmim",
    "itm",
    "mlm",
    "region_itc",
    "region_itm",
    "l1",
    "giou",
    "answer",
    "label",
    "reward",
    "greedy",
)
LOSS_NAMES = ("loss", "itc", "caption", "tgmim", "local", "mask_overlap")
# Those of `sycoca.xvlm.XLosses`.
XVLM_LOSS_NAMES = (
    *LOSS_NAMES,
    "itm",
    "mlm",
    "region_itc",
    "region_itm",
    "region_mlm",
    "l1",
    "giou",
    "matched",
)


@dataclass
class Timing:
    """Host-side facts of one step: seconds waited for data, seconds in all, pairs over all ranks."""

    wait_s: float
    step_s: float
    pairs: int


class RunLog:
    """Collects what every rank measures and lets rank 0 write and show it.

    Args:
        run_dir: the run's folder, existing.
        losses: names of those that are trained, of `names`; the others are left out.
        total_steps: length of the run.
        first_step: where this process starts; later rows of an earlier one are dropped.
        every: steps between two readings of the device.
        group: process group over which losses are averaged, or None for this process alone.
        names: of the values of a step, in their order.
        spikes: tells losses that leap; None notes none.
        wandb: project at Weights & Biases that gets the figures too; None for none.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        losses: Sequence[str],
        total_steps: int,
        first_step: int,
        every: int,
        group=None,
        names: Sequence[str] = LOSS_NAMES,
        spikes=None,
        wandb: str | None = None,
    ):
        self.losses, self.names = losses, names
        self.total_steps, self.every, self.group = total_steps, every, group
        self.writes = group is None or dist.get_rank(group) == 0
        self._pending: list[tuple[int, torch.Tensor, dict, Sequence]] = []
        self._spikes = spikes
        self._timing: list[Timing] = []
        self._started, self._first_step = time.perf_counter(), first_step
        self._display = Display(total_steps, first_step) if self.writes else None
        self._jsonl = self._events = self._wandb = None
        self._run_dir, self._rows = run_dir, run_dir / "metrics.jsonl"
        self.failure: str | None = None
        if self.writes:
            with self._attempt(self._rows):
                truncate_after(self._rows, first_step)
                self._jsonl = self._rows.open("a", encoding="utf-8")
            if wandb is not None:
                with self._attempt(run_dir / "wandb_id"):
                    self._wandb = wandb_run(wandb, run_dir)
        self._end_if_failed()

    def step(self, step: int, values: torch.Tensor, scalars: dict, timing: Timing, places: Sequence = ()) -> None:
        """Takes one finished step: values fp32 in the order of `names`, host scalars, timing, its batches."""
        self._pending.append((step, values, scalars, places))
        self._timing.append(timing)
        if (step + 1) % self.every == 0 or step + 1 == self.total_steps:
            self.flush()

    def flush(self) -> None:
        """Reads the pending steps from the device, averages them over the ranks and writes them."""
        if not self._pending:
            return
        losses = torch.stack([values for _, values, _, _ in self._pending])
        if self.group is not None:
            dist.all_reduce(losses, group=self.group)
            losses /= dist.get_world_size(self.group)
        losses = losses.tolist()
        wait = sum(t.wait_s for t in self._timing) / max(1e-9, sum(t.step_s for t in self._timing))
        rate = sum(t.pairs for t in self._timing) / max(1e-9, sum(t.step_s for t in self._timing))
        pending, self._pending, self._timing = self._pending, [], []
        if not self.writes or self.failure:
            return
        lines = []
        for (step, _, scalars, places), values in zip(pending, losses, strict=True):
            named = dict(zip(self.names, values, strict=True))
            if self._spikes is not None and self._spikes.leaps(named["loss"]):
                self.say(f"loss leaps to {named['loss']:.3f} at step {step + 1}: {'; '.join(map(str, places))}")
            last = row = {"step": step + 1, **{name: _finite(named[name]) for name in self.losses}}
            row.update((name, _finite(value)) for name, value in scalars.items())
            lines.append(json.dumps(row) + "\n")
        memory = memory_gib()
        done = last["step"] - self._first_step
        remaining_s = (time.perf_counter() - self._started) / max(1, done) * (self.total_steps - last["step"])
        shown = {**last, "pairs_per_s": rate, "data_wait": wait, "memory_gib": memory, "eta_s": remaining_s}
        with self._attempt(self._rows):
            self._jsonl.write("".join(lines))
            self._jsonl.flush()
        with self._attempt(self._run_dir / "tensorboard"):
            self._write_events(shown)
        self._display.show(shown)

    @contextlib.contextmanager
    def _attempt(self, path: Path) -> Iterator[None]:
        """Notes what the system refuses: only rank 0 writes, and the others wait for it in their next collective."""
        try:
            yield
        except OSError as error:
            self.failure = self.failure or f"{path}: {error.strerror or error}"

    def check(self, failed: float) -> None:
        """Ends a run whose figures cannot be written.

        Args:
            failed: how many ranks have a `failure`.

        Raises:
            StopRun: any.
        """
        if failed:
            raise StopRun(self.failure or "rank 0 cannot write its figures")

    def _end_if_failed(self) -> None:
        if failure := self.failure if self.group is None else agree(self.failure):
            raise StopRun(failure)

    def _write_events(self, row: dict) -> None:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            _hush_tensorboard()
            self._events = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=row["step"])
        for name, value in row.items():
            if name not in ("step", "eta_s") and value is not None:
                self._events.add_scalar(f"train/{name}", value, row["step"])
        self._events.flush()
        if self._wandb is not None:
            self._wandb.log({f"train/{k}": v for k, v in row.items() if v is not None}, step=row["step"])

    def say(self, text: str) -> None:
        """A line for people, above the progress display."""
        if self._display is not None:
            self._display.say(text)

    def close(self) -> None:
        """Writes what is left and ends the display. All ranks call it.

        Raises:
            StopRun: something could not be written; on all ranks alike.
        """
        self.flush()
        if self.writes:
            self._display.close()
            if self._jsonl is not None:
                with self._attempt(self._rows):
                    self._jsonl.close()
            if self._events is not None:
                with self._attempt(self._run_dir / "tensorboard"):
                    self._events.close()
            if self._wandb is not None:
                self._wandb.finish()
        self._end_if_failed()


def _hush_tensorboard() -> None:
    """What its thread cannot write comes out of the next call as well, and is told there."""
    before = threading.excepthook

    def hook(args) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            before(args)

    threading.excepthook = hook


def wandb_run(project: str, run_dir: Path):
    """The run at Weights & Biases that belongs to a run's folder: a resumed one goes on where it was."""
    import wandb

    path = run_dir / "wandb_id"
    if not path.exists():
        write_atomically(path, wandb.util.generate_id() + "\n")
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    run_id = path.read_text(encoding="utf-8").strip()
    return wandb.init(
        project=project, id=run_id, resume="allow", name=run_dir.name, dir=str(run_dir), config=config["run"]
    )


def truncate_after(path: Path, step: int) -> None:
    """Drops rows behind `step`, which a resumed run will write again."""
    if not path.exists():
        return
    rows = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [row for row in rows if _is_row(row) and json.loads(row)["step"] <= step]
    write_atomically(path, "".join(row + "\n" for row in kept))


def _is_row(line: str) -> bool:
    try:
        row = json.loads(line)
        return isinstance(row, dict) and "step" in row
    except ValueError:
        return False


def loss_names(config: ModelConfig) -> tuple[str, ...]:
    """Names of what a model of this configuration returns, in that order."""
    return LOSS_NAMES if config.fusion is None else XVLM_LOSS_NAMES


def trained_losses(config: ModelConfig, regions: bool = False) -> tuple[str, ...]:
    """Names, of `loss_names`, that mean something for a model of this configuration, with or without region batches."""
    trained = {
        "loss": True,
        "itc": config.learns("itc"),
        "caption": config.learns("ic"),
        "tgmim": config.num_masked > 0,
        "local": config.local_weight > 0,
        "mask_overlap": config.scores,
        "itm": config.learns("itm"),
        "mlm": config.learns("mlm"),
        "region_itc": regions and config.learns("itc"),
        "region_itm": regions and config.learns("itm"),
        "region_mlm": regions and config.learns("mlm"),
        "l1": regions and config.learns("bbox"),
        "giou": regions and config.learns("bbox"),
        "matched": config.learns("itm"),
    }
    return tuple(name for name in loss_names(config) if trained[name])


def _finite(value) -> float | None:
    """JSON has no NaN: a value that is not finite, or not known, is null."""
    return float(value) if value is not None and math.isfinite(value) else None


def memory_gib() -> float:
    """Peak device memory on CUDA, else the resident memory of this process, in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import psutil

    return psutil.Process().memory_info().rss / 2**30


class Display:
    """A progress bar with a line of figures on a terminal, plain lines elsewhere."""

    def __init__(self, total_steps: int, first_step: int):
        self._live = None
        self._total = total_steps
        if sys.stdout.isatty():
            from rich.console import Group
            from rich.live import Live
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.text import Text

            columns = TextColumn("training"), BarColumn(bar_width=None), MofNCompleteColumn()
            self._bar = Progress(*columns, TimeRemainingColumn(compact=True), expand=True)
            self._task = self._bar.add_task("train", total=total_steps, completed=first_step)
            self._figures = Text("waiting for the first figures")
            self._live = Live(Group(self._bar, self._figures), refresh_per_second=4)
            self._live.start()

    def show(self, row: dict) -> None:
        figures = format_figures(row)
        if self._live is not None:
            self._bar.update(self._task, completed=row["step"])
            self._figures.plain = figures
        else:
            width = len(str(self._total))
            eta = timedelta(seconds=round(row["eta_s"]))
            print(f"step {row['step']:{width}d}/{self._total}  {figures}  eta {eta}", flush=True)

    def say(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, markup=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def format_figures(row: dict) -> str:
    """The figures of one row in one line."""
    figures = [f"{name} {_number(row[name], '.3f')}" for name in _SHOWN if name in row]
    figures += [f"lr {row['lr']:.1e}", f"|g| {_number(row['grad_norm'], '.2f')}", f"{row['pairs_per_s']:.0f} pairs/s"]
    figures += [f"data wait {row['data_wait']:.0%}", f"{row['memory_gib']:.1f} GiB"]
    return "  ".join(figures)


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)
