"""How DeepSpeed's files are written and read here: to the disk, with a digest, and without running what they hold.

DeepSpeed pickles its optimizer states. They are read with torch's restricted unpickler, which builds tensors, plain
data and the classes named below, and nothing else.
"""

import os
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from train.durable import FileRecord, record, sync
from train.exits import StopRun

# Constructors of plain values; none of them can be made to call anything.
ALLOWED = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
_PROBE = 1 << 20


class CheckpointError(StopRun):
    """A checkpoint that cannot be written or read, said in one line."""


class DurableFiles(TorchCheckpointEngine):
    """DeepSpeed's checkpoint engine with digests, fsync and restricted reading.

    A rank whose disk fails goes on through DeepSpeed's barriers, so that the others do not wait for it; `failure` says
    afterwards what went wrong.

    Args:
        config: the engine's configuration.
        trusted: whether objects of any class may be read, and with them code run.
    """

    def __init__(self, config: Any, *, trusted: bool = False) -> None:
        super().__init__(config)
        self.trusted = trusted
        self.start()

    def start(self) -> None:
        """Forgets what an earlier save wrote."""
        self.written: dict[Path, FileRecord] = {}
        self.failure: str | None = None

    def makedirs(self, path, exist_ok=False) -> None:
        self._attempt(lambda: super(DurableFiles, self).makedirs(path, exist_ok=exist_ok))

    def save(self, state_dict, path: str) -> None:
        def write() -> None:
            try:
                super(DurableFiles, self).save(state_dict, path)
            # torch's writer has no other name for what the system refuses.
            except RuntimeError as error:
                raise OSError(reason_of_refusal(Path(path)) or str(error).splitlines()[0]) from None
            sync(Path(path))
            self.written[Path(path)] = record(Path(path))

        self._attempt(write)

    def _attempt(self, write) -> None:
        if self.failure is not None:
            return
        try:
            write()
        except OSError as error:
            self.failure = error.strerror or str(error)

    def load(self, path: str, map_location=None):
        return read(Path(path), map_location=map_location, trusted=self.trusted)


def reason_of_refusal(path: Path) -> str:
    """What the system says to more bytes in a file, empty where it takes them."""
    try:
        with path.open("ab", buffering=0) as file:
            file.write(bytes(_PROBE))
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror
    return ""


def read(path: Path, *, map_location: Any = "cpu", trusted: bool = False) -> Any:
    """What a file of a checkpoint holds.

    Raises:
        CheckpointError: it holds an object of a class that is not allowed, or is no such file.
    """
    allowed = nullcontext() if trusted else torch.serialization.safe_globals(ALLOWED)
    try:
        with allowed:
            return torch.load(path, map_location=map_location, weights_only=not trusted)
    except pickle.UnpicklingError as error:
        named = [word for word in str(error).replace("`", " ").split() if "." in word and word[0].isalpha()]
        wanted = next((f": {word.rstrip('.,')}" for word in named if "torch" not in word), "")
        raise CheckpointError(
            f"{path}: holds more than tensors and plain data{wanted}, which could run code; refused. "
            "--trust-checkpoint reads it all the same"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {str(error).splitlines()[0] if str(error) else 'unreadable'}") from None
