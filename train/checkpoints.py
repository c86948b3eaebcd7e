"""Checkpoints of a run: written beside, renamed into place by all ranks or none; the newest sound one is read.

A checkpoint is DeepSpeed's (any ZeRO stage) plus the integers that the data order and the schedules need, plus a
manifest. The folder of a run has to be visible to all ranks.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from train.checkpoint_files import CheckpointError, DurableFiles, read
from train.config import TrainConfig
from train.durable import MANIFEST, Fault, faults, read_manifest, record, sync, write_atomically, write_manifest
from train.run_folder import checkpoint_steps
from train.together import agree, together

_PARTIAL = ".partial"
_UNIVERSAL = ".universal"


def tag(step: int) -> str:
    return f"step_{step:08d}"


def prepare(engine: Any, *, trusted: bool = False) -> None:
    """Makes a DeepSpeed engine write and read its files as this module needs them."""
    engine.checkpoint_engine = DurableFiles(engine._config, trusted=trusted)
    # A checkpoint holds data; train.export makes weights of it, without a script that lies beside them.
    engine._copy_recovery_script = lambda folder: None


class Kept(NamedTuple):
    """Which checkpoints stay: the last `last` ones, and every one whose step `every` divides."""

    last: int
    every: int | None = None

    def dropped(self, steps: list[int]) -> list[int]:
        """Of ascending steps, those that go."""
        return [step for step in steps[: -self.last] if not (self.every and step % self.every == 0)]


def save_checkpoint(
    engine: Any,
    run_dir: Path,
    *,
    step: int,
    kept: Kept,
    facts: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Saves the engine after `step` optimizer steps and drops older checkpoints. All ranks call it.

    Args:
        engine: DeepSpeed's, after `prepare`.
        run_dir: the run's folder.
        step: optimizer steps taken.
        kept: which earlier checkpoints stay.
        facts: plain data for the manifest.
        say: takes a line about what failed beside the checkpoint.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: it could not be written; on all ranks alike, and earlier checkpoints are as they were.
    """
    folder, name = run_dir / "checkpoints", tag(step)
    partial, first, files = folder / _PARTIAL, dist.get_rank() == 0, engine.checkpoint_engine
    files.start()
    if first:
        with _noted(files):
            for left in (partial, folder / _UNIVERSAL):
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir(parents=True)
            sync(run_dir)
    if not agree(files.failure):
        engine.save_checkpoint(str(partial), tag=name, client_state={"step": step}, save_latest=False)
    parts: list[Any] = [None] * dist.get_world_size()
    written = {path.relative_to(partial / name).as_posix(): record for path, record in files.written.items()}
    dist.all_gather_object(parts, (written, files.failure))
    if first and not any(failure for _, failure in parts):
        with _noted(files):
            everything = {file: record for part, _ in parts for file, record in part.items()}
            for file in everything:
                if not (partial / name / file).is_file():
                    raise OSError(f"{file} of another rank is not in {partial.parent}: is the run folder shared?")
            body = {"step": step, "ranks": len(parts), "stage": engine.zero_optimization_stage(), **(facts or {})}
            write_manifest(partial / name, body, everything)
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(partial / name, folder / name)
            sync(folder)
    if first:
        shutil.rmtree(partial, ignore_errors=True)
    if failure := agree(files.failure):
        raise CheckpointError(f"checkpoint {name} could not be written: {failure}")
    if first:
        # The checkpoint is whole, whatever happens to what lies beside it.
        with _told(say, f"checkpoints/latest does not name {name}"):
            write_atomically(folder / "latest", name + "\n")
        # Steps behind this one belong to damaged checkpoints that training will write anew.
        for old in kept.dropped([known for known in checkpoint_steps(run_dir) if known <= step]):
            with _told(say, f"checkpoint {tag(old)} could not be removed"):
                shutil.rmtree(folder / tag(old))
    return folder / name


@contextlib.contextmanager
def _told(say: Callable[[str], None], what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        say(f"warning: {what}: {error.strerror or error}")


@contextlib.contextmanager
def _noted(files: DurableFiles):
    try:
        yield
    except OSError as error:
        files.failure = files.failure or error.strerror or str(error)


class Chosen(NamedTuple):
    """A sound checkpoint, how it was written, and what was found wrong with newer ones."""

    step: int
    ranks: int
    stage: int
    facts: dict[str, Any]
    damaged: dict[int, list[Fault]]


def newest_sound(run_dir: Path) -> Chosen:
    """The newest checkpoint whose files are those that were written.

    Raises:
        CheckpointError: the run has none; names what is wrong with each.
    """
    damaged: dict[int, list[Fault]] = {}
    for step in reversed(checkpoint_steps(run_dir)):
        folder = run_dir / "checkpoints" / tag(step)
        found = faults(folder)
        if not found:
            facts = read_manifest(folder)
            if facts.get("step") == step:
                return Chosen(step, facts["ranks"], facts["stage"], facts, damaged)
            found = [Fault("manifest.json", f"is that of step {facts.get('step')}")]
        damaged[step] = found
    if not damaged:
        raise CheckpointError(f"{run_dir} holds no checkpoint")
    raise CheckpointError(f"{run_dir}: every checkpoint is damaged, nothing is resumed: " + told(damaged))


def told(damaged: dict[int, list[Fault]]) -> str:
    """Damaged checkpoints in one line: the first file of each and how many more."""
    return "; ".join(
        f"{tag(step)}/{found[0]}" + (f" and {len(found) - 1} more" if len(found) > 1 else "")
        for step, found in damaged.items()
    )


def choose(run_dir: Path) -> Chosen:
    """Rank 0's choice of a checkpoint, the same on all ranks. All ranks call it.

    Raises:
        StopRun: as `newest_sound`, on all ranks alike.
    """
    found: list[Any] = [None]
    with together():
        if dist.get_rank() == 0:
            found = [newest_sound(run_dir)]
    dist.broadcast_object_list(found)
    return found[0]


def load_checkpoint(engine: Any, run_dir: Path, step: int) -> None:
    """Loads weights and optimizer state of the checkpoint at `step` into the engine. All ranks call it.

    Raises:
        CheckpointError: it holds more than data, or DeepSpeed found nothing to load.
    """
    _load(engine, run_dir / "checkpoints", tag(step), step)


def _load(engine: Any, folder: Path, name: str, step: int) -> None:
    # One rank that refuses a file must not leave the others in DeepSpeed's barriers.
    failure = None
    try:
        path, state = engine.load_checkpoint(str(folder), tag=name)
        if path is None or state.get("step") != step:
            failure = f"{folder / name} could not be loaded"
    except CheckpointError as error:
        failure = str(error)
    # Whatever DeepSpeed asserts or fails to find means the same here.
    except Exception as error:
        failure = f"{folder / name}: {type(error).__name__}: {error}"
    if failure := agree(failure):
        raise CheckpointError(failure)


def load_reshaped(engine: Any, run_dir: Path, step: int, *, trusted: bool = False) -> None:
    """Loads a checkpoint of another ZeRO stage or number of ranks, by way of DeepSpeed's universal form.

    All ranks call it.

    Raises:
        CheckpointError: it holds more than data, or could not be converted.
    """
    from train.reshape import convert, mend_loading

    folder = run_dir / "checkpoints"
    target, failure = folder / _UNIVERSAL / tag(step), None
    if dist.get_rank() == 0:
        try:
            # The converter reads every file of the folder, and of folders in it, whose name begins as it expects.
            for path in sorted(path for path in (folder / tag(step)).rglob("*") if path.is_file()):
                if path.name != MANIFEST:
                    read(path, trusted=trusted)
            convert(folder / tag(step), target, engine.module)
        except (CheckpointError, OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
            failure = f"{tag(step)} could not be reshaped: {error}"
    if failure := agree(failure):
        if dist.get_rank() == 0:
            shutil.rmtree(folder / _UNIVERSAL, ignore_errors=True)
        raise CheckpointError(failure)
    engine._config.load_universal_checkpoint = True
    mend_loading(engine.optimizer)
    groups = engine.optimizer.optimizer.param_groups
    own = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    try:
        _load(engine, folder / _UNIVERSAL, tag(step), step)
        # DeepSpeed gives every group what the first one had, its weight decay too.
        for group, values in zip(groups, own, strict=True):
            group.update(values)
        # It also gives them one tensor for their steps, which each of them would then count up.
        for state in engine.optimizer.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()
    finally:
        engine._config.load_universal_checkpoint = False
        # The ranks have agreed on how the loading went: none reads any more.
        if dist.get_rank() == 0:
            shutil.rmtree(folder / _UNIVERSAL, ignore_errors=True)


def resume(engine: Any, run_dir: Path, chosen: Chosen, *, tokenizer: str, trusted: bool = False) -> bool:
    """Brings an engine to where a run stood, on whatever ranks and ZeRO stage it has. All ranks call it.

    Returns:
        Whether the checkpoint was reshaped; what DeepSpeed's universal form leaves out is then still missing.

    Raises:
        CheckpointError: the vocabulary is another than the run's, or the checkpoint cannot be read.
    """
    if chosen.facts.get("tokenizer", tokenizer) != tokenizer:
        raise CheckpointError(f"{run_dir / 'tokenizer.json'}: is not the vocabulary that the run was trained with")
    if (chosen.ranks, chosen.stage) == (dist.get_world_size(), engine.zero_optimization_stage()):
        load_checkpoint(engine, run_dir, chosen.step)
        return False
    load_reshaped(engine, run_dir, chosen.step, trusted=trusted)
    return True


class Saver:
    """When and how a run is saved.

    Args:
        engine: DeepSpeed's, after `prepare`.
        run_dir: the run's folder.
        train: steps and minutes between checkpoints, and which are kept.
        facts: plain data for every manifest.
    """

    def __init__(self, engine: Any, run_dir: Path, train: TrainConfig, facts: dict[str, Any]) -> None:
        self._engine, self._run_dir, self._train, self._facts = engine, run_dir, train, facts
        self._saved_s = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether this step is one of every `save_every`."""
        return step % self._train.save_every == 0

    def is_late(self) -> bool:
        """Whether `save_minutes` have gone since the last checkpoint. Clocks of ranks differ: one of them decides."""
        minutes = self._train.save_minutes
        late = minutes is not None and time.monotonic() - self._saved_s > 60 * minutes
        if late:
            # The answer comes a step later; until then it must not be asked for again.
            self._saved_s = time.monotonic()
        return late

    def save(self, step: int, *, say: Callable[[str], None], must: bool) -> None:
        """Saves after `step` optimizer steps. All ranks call it.

        Args:
            step: optimizer steps taken.
            say: takes a line for people.
            must: raise where it fails, rather than let the run go on with the checkpoints it has.

        Raises:
            CheckpointError: it failed and must not.
        """
        kept = Kept(self._train.keep_last, self._train.keep_every)
        try:
            save_checkpoint(self._engine, self._run_dir, step=step, kept=kept, facts=self._facts, say=say)
        except CheckpointError as error:
            if must:
                raise
            say(f"warning: {error}; the run goes on, earlier checkpoints are as they were")
        self._saved_s = time.monotonic()


def tokenizer_digest(run_dir: Path) -> str:
    """What a run's vocabulary is recognised by."""
    return record(run_dir / "tokenizer.json").sha256
