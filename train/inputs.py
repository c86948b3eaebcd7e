"""What a run reads: its sources, its tokenizer, and the batches from any step on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sycoca.config import ConfigError
from sycoca.model import Batch
from sycoca.tokenizer import Tokenizer
from train.data import DataError, Source, batches
from train.durable import write_atomically
from train.exits import StopRun
from train.health import Place
from train.launch import Launch, effective
from train.run_folder import Hold

_TOKENIZER_SAMPLES = 20_000


class Inputs(NamedTuple):
    """Sources, tokenizer and length of a run, and this rank's place in it."""

    train: Source
    val: Source
    tokenizer: Tokenizer
    total_steps: int
    launch: Launch
    rank: int
    world: int
    opened_without: int

    def batches(self, first: int, device: torch.device) -> Iterator[tuple[Batch, Place]]:
        """This rank's batches on the device and where they stand, from the global batch number `first` on.

        Samples that are left out are counted in `train.skipped`.
        """
        config = self.launch.config
        global_batch = config.train.micro_batch * self.world
        epoch, start = divmod(first, len(self.train) // global_batch)
        loader = batches(
            self.train,
            self.tokenizer,
            global_batch=global_batch,
            image_size=config.model.vision.image_size,
            context_length=config.model.text.context_length,
            seed=config.train.seed,
            rank=self.rank,
            world=self.world,
            epoch=epoch,
            start=start,
            workers=config.data.workers,
            crop_scale=config.data.crop_scale,
            flip=config.data.flip,
        )
        # Skips found while training belong beside those found while opening.
        loader.skipped = self.train.skipped
        for loaded in loader:
            trimmed = loaded._replace(tokens=trim(loaded.tokens, config.model.text.pad_id))
            batch = Batch(*(part.to(device, non_blocking=True) for part in trimmed[:4]))
            # Only a stand-in for an unreadable image can bring the same sample twice, and scenes have none.
            place = Place(loaded.epoch, loaded.index, loaded.keys)
            distinct = self.train.fresh and not self.train.repeats
            yield batch._replace(ids=None) if distinct else batch, place

    def found_bad(self) -> int:
        """Samples that this rank found unusable while training."""
        return len(self.train.skipped.samples) - self.opened_without

    def check_budget(self, found_bad: float) -> None:
        """Ends a run that loses too much of its data.

        Args:
            found_bad: samples found unusable while training, over all ranks.

        Raises:
            StopRun: they are more than `data.max_left_out` of the source.
        """
        most = self.launch.config.data.max_left_out
        if found_bad <= most * len(self.train):
            return
        # Ranks meet one another's samples in later epochs; merged, each counts once.
        line = self.left_out()
        if (merged := len(self.train.skipped.samples) - self.opened_without) > most * len(self.train):
            raise StopRun(
                f"{merged} of {len(self.train)} training samples cannot be used, data.max_left_out is {most}: {line}"
            )

    def left_out(self) -> str:
        """What this run could not use, by cause, over all ranks; empty if nothing. All ranks call it."""
        parts = [None] * self.world
        account = self.train.skipped
        dist.all_gather_object(parts, (account.samples, account.parts))
        for samples, found in parts:
            for name, cause in samples.items():
                account.sample(name, cause)
            account.add_parts(found)
        return account.line()


def trim(tokens: Tensor, pad_id: int) -> Tensor:
    """Tokens (B, T) on the host without the padding that all captions share, T a multiple of 8 where there is room.

    Who is in a batch does not depend on lengths, and padding takes no part in any loss.
    """
    filled = (tokens != pad_id).any(0).nonzero()
    longest = int(filled[-1]) + 1 if len(filled) else 1
    trimmed = tokens[:, : min(tokens.shape[1], max(8, -(-longest // 8) * 8))].contiguous()
    # A copy from memory that is not page-locked would make the host wait for the device.
    return trimmed.pin_memory() if tokens.is_pinned() else trimmed


def hold_run_dir(run_dir: Path) -> Hold | None:
    """Makes the run's folder and keeps other runs out of it; rank 0 holds what is returned. All ranks call it.

    Raises:
        ConfigError: another process holds it, or it cannot be written; on all ranks alike.
    """
    held, verdict = None, [None]
    if dist.get_rank() == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            held = Hold(run_dir)
        except ConfigError as error:
            verdict = [str(error)]
        except OSError as error:
            verdict = [f"--run-dir {run_dir}: {error.strerror}"]
    dist.broadcast_object_list(verdict)
    if verdict[0] is not None:
        raise ConfigError(verdict[0])
    return held


def open_inputs(launch: Launch, *, rank: int, world: int) -> Inputs:
    """Writes the configuration into the run's folder and makes its tokenizer. All ranks call it.

    Raises:
        DataError: the tokenizer cannot be made, or does not fit the model.
    """
    config, train = launch.config, launch.train
    if rank == 0:
        text = json.dumps(effective(launch), indent=2)
        write_atomically(launch.run_dir / "config.json", text + "\n")
    tokenizer = _tokenizer(launch, train, rank)
    wanted = config.model.text
    ids = tokenizer.pad_id, tokenizer.sot_id, tokenizer.eot_id
    if tokenizer.vocab_size > wanted.vocab_size or ids != (wanted.pad_id, wanted.sot_id, wanted.eot_id):
        raise DataError(
            f"data.tokenizer={config.data.tokenizer}: {tokenizer.vocab_size} entries, special ids {ids}; "
            f"model.text has {wanted.vocab_size}, {(wanted.pad_id, wanted.sot_id, wanted.eot_id)}"
        )
    steps = max(1, config.train.total_steps(len(train), world))
    return Inputs(train, launch.val, tokenizer, steps, launch, rank, world, len(train.skipped.samples))


def _tokenizer(launch: Launch, train: Source, rank: int) -> Tokenizer:
    saved = launch.run_dir / "tokenizer.json"
    if rank == 0 and not saved.exists():
        name = launch.config.data.tokenizer
        try:
            if name == "bpe":
                made = Tokenizer.train(train.texts(_TOKENIZER_SAMPLES), launch.config.model.text.vocab_size)
            else:
                made = Tokenizer.clip() if name == "clip" else Tokenizer.load(name)
        except (ValueError, ModuleNotFoundError) as error:
            raise DataError(f"data.tokenizer={name}: {error}") from None
        made.save(saved)
    dist.barrier()
    try:
        return Tokenizer.load(saved)
    except (ValueError, OSError) as error:
        raise DataError(f"{saved}: {error}") from None
