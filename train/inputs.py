"""What a run reads: its sources, its tokenizer, and the batches from any step on."""

import itertools
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from sycoca.config import ConfigError
from sycoca.mlm import MaskedWords, mask_words
from sycoca.model import Batch
from sycoca.regions import RegionBatch
from sycoca.tokenizer import Tokenizer
from sycoca.xvlm import XBatch
from train.budget import Budget
from train.data import DataError, Source, batches
from train.data.region_batches import region_batches
from train.durable import replaced, write_atomically
from train.exits import of_the_system
from train.health import Place
from train.launch import Launch, effective
from train.run_folder import Hold, forget_start
from train.together import together

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
    budget: Budget

    def batches(self, first: int) -> Iterator[tuple[Batch | XBatch, Place]]:
        """This rank's micro batches on the host and where they stand, from the global batch number `first` on.

        Samples that are left out are counted in `train.skipped`. Where a global batch comes in parts, its images are
        pictures (B, H, W, 3) uint8: all of them are held until the step is taken.
        """
        with closing(self._pairs(first)) as pairs, closing(self._regions(first)) as others:
            if self.launch.config.model.fusion is None:
                yield from pairs
                return
            for (batch, place), regions in zip(pairs, others):
                yield XBatch(batch, regions, self._masked(batch), self._masked(regions)), place

    def _masked(self, batch: Batch | RegionBatch | None) -> MaskedWords | None:
        """The texts of a batch with hidden words, where the model learns them."""
        config = self.launch.config.model
        if batch is None or not config.learns("mlm"):
            return None
        masked = mask_words(batch.tokens, batch.seeds, self.tokenizer.continues(), config.text, config.words)
        most = max(1, int((masked.labels >= 0).sum(1).max()))
        return MaskedWords(masked.tokens, *(part[:, :most].contiguous() for part in masked[1:]))

    def _regions(self, first: int) -> Iterator[RegionBatch | None]:
        """This rank's texts with boxes, from the global batch number `first` on; None where a step has none."""
        config, source = self.launch.config, self.launch.regions
        if source is None:
            yield from itertools.repeat(None)
        options = {
            "elements": config.train.region_batch * self.world,
            "image_size": config.model.vision.image_size,
            "grid": config.model.vision.grid,
            "context_length": config.model.text.context_length,
            "seed": config.train.seed,
            "rank": self.rank,
            "world": self.world,
            "max_regions": config.data.max_regions,
            "whole_share": config.data.whole_share,
            "crop": config.data.region_crop,
            "flip": config.data.flip,
            "randaugment": config.data.randaugment,
        }
        per_epoch = region_batches(source, self.tokenizer, **options).batches_per_epoch
        epoch, start = divmod(first, per_epoch)
        workers = config.data.workers
        loader = region_batches(source, self.tokenizer, **options, epoch=epoch, start=start, workers=workers)
        loader.skipped = self.train.skipped
        with closing(loader):
            for loaded in loader:
                regions = loaded.regions
                yield regions._replace(tokens=trim(regions.tokens, config.model.text.pad_id))

    def _pairs(self, first: int) -> Iterator[tuple[Batch, Place]]:
        """This rank's pairs on the host."""
        config = self.launch.config
        patches = config.model.vision.patch_size if config.model.needs_boxes else None
        global_batch, parts = config.train.global_batch, config.train.accumulation
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
            parts=parts,
            normalised=parts == 1,
            workers=config.data.workers,
            crop_scale=config.data.crop_scale,
            flip=config.data.flip,
            randaugment=config.data.randaugment,
            described_in=patches,
        )
        # Skips found while training belong beside those found while opening.
        loader.skipped = self.train.skipped
        with closing(loader):
            for loaded in loader:
                tokens = trim(loaded.tokens, config.model.text.pad_id)
                batch = Batch(loaded.images, tokens, loaded.seeds, loaded.ids, loaded.described)
                # Only a stand-in for an unreadable image can bring the same sample twice, and scenes have none.
                place = Place(loaded.epoch, loaded.index, loaded.keys)
                distinct = self.train.fresh and not self.train.repeats
                yield batch._replace(ids=None) if distinct else batch, place


def trim(tokens: Tensor, pad_id: int) -> Tensor:
    """Tokens (B, T) on the host without the padding that all captions share, T a multiple of 8 where there is room.

    Who is in a batch does not depend on lengths, and padding takes no part in any loss.
    """
    filled = (tokens != pad_id).any(0).nonzero()
    longest = int(filled[-1]) + 1 if len(filled) else 1
    trimmed = tokens[:, : min(tokens.shape[1], max(8, -(-longest // 8) * 8))].contiguous()
    # A copy from memory that is not page-locked would make the host wait for the device.
    return trimmed.pin_memory() if tokens.is_pinned() else trimmed


def hold_run_dir(run_dir: Path, *, anew: bool = False) -> Hold | None:
    """Makes the run's folder and keeps other runs out of it; rank 0 holds what is returned. All ranks call it.

    Args:
        run_dir: the run's folder.
        anew: drop what a run without a checkpoint has left there.

    Raises:
        StopRun: another process holds it, or it cannot be written; on all ranks alike.
    """
    held = None
    with together():
        if dist.get_rank() == 0:
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                held = Hold(run_dir)
                if anew:
                    forget_start(run_dir)
            except OSError as error:
                raise ConfigError(f"--run-dir {of_the_system(error)}") from None
    return held


def open_inputs(launch: Launch, *, rank: int, world: int) -> Inputs:
    """Writes the configuration into the run's folder and makes its tokenizer. All ranks call it.

    Raises:
        StopRun: the tokenizer cannot be made, or does not fit the model, or the folder takes no more; on all ranks
            alike.
    """
    config, train = launch.config, launch.train
    with together():
        if rank == 0:
            write_atomically(launch.run_dir / "config.json", json.dumps(effective(launch), indent=2) + "\n")
            _make_tokenizer(launch)
    with together():
        tokenizer = _tokenizer(launch)
    steps = max(1, config.train.total_steps(len(train), world))
    budget = Budget(train, config.data.max_left_out)
    return Inputs(train, launch.val, tokenizer, steps, launch, rank, world, budget)


def _make_tokenizer(launch: Launch) -> None:
    saved, name, text = launch.run_dir / "tokenizer.json", launch.config.data.tokenizer, launch.config.model.text
    if saved.exists():
        return
    try:
        if name == "bpe":
            made = Tokenizer.train(launch.train.texts(_TOKENIZER_SAMPLES), text.vocab_size)
        elif name == "wordpiece":
            made = Tokenizer.train_wordpiece(launch.train.texts(_TOKENIZER_SAMPLES), text.vocab_size, sep=text.sep)
        else:
            made = Tokenizer.clip() if name == "clip" else Tokenizer.load(name)
        if text.kind == "bidirectional":
            made = made.ending(text.sep)
    except (ValueError, ModuleNotFoundError) as error:
        raise DataError(f"data.tokenizer={name}: {error}") from None
    with replaced(saved) as beside:
        made.save(beside)


def _tokenizer(launch: Launch) -> Tokenizer:
    saved, wanted = launch.run_dir / "tokenizer.json", launch.config.model.text
    try:
        tokenizer = Tokenizer.load(saved)
    except (ValueError, OSError) as error:
        raise DataError(f"{saved}: {error}") from None
    ids = tokenizer.pad_id, tokenizer.sot_id, tokenizer.eot_id
    if tokenizer.vocab_size > wanted.vocab_size or ids != (wanted.pad_id, wanted.sot_id, wanted.eot_id):
        raise DataError(
            f"data.tokenizer={launch.config.data.tokenizer}: {tokenizer.vocab_size} entries, special ids {ids}; "
            f"model.text has {wanted.vocab_size}, {(wanted.pad_id, wanted.sot_id, wanted.eot_id)}"
        )
    if wanted.mask_id is not None and tokenizer.mask_id != wanted.mask_id:
        name = launch.config.data.tokenizer
        raise DataError(f"data.tokenizer={name}: [MASK] is {tokenizer.mask_id}, not {wanted.mask_id}")
    return tokenizer
