"""How a process of a run ends: its exit code, and one line that says why. Documented in docs/reliability.md."""

import errno
import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from sycoca.config import ConfigError
from train.data.sample import DataError

EXIT_REFUSED = 2
EXIT_STOPPED = 3
EXIT_LOST_RANK = 4
EXIT_SAVED = 75  # EX_TEMPFAIL: started again with --resume, it goes on
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

# What a disk or the system refuses, and a person can mend; other errors of the system are those of the program.
_REFUSED_BY_SYSTEM = frozenset(
    {
        errno.EACCES,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOSPC,
        errno.EPERM,
        errno.EROFS,
        errno.ESTALE,
    }
)


class StopRun(RuntimeError):
    """A run that must not go on, known to all ranks alike; `code` is what the process ends with."""

    def __init__(self, message: str, code: int = EXIT_STOPPED) -> None:
        super().__init__(message)
        self.code = code


class LostRank(StopRun):
    """Another rank does not answer."""

    def __init__(self, message: str) -> None:
        super().__init__(message, EXIT_LOST_RANK)


def refused(error: Exception) -> int:
    """Tells a mistake that every rank finds, once on each machine: another's files may be the ones that are missing."""
    if os.environ.get("LOCAL_RANK", _rank()) == "0":
        _tell(of_the_system(error) if isinstance(error, OSError) else str(error))
    return EXIT_REFUSED


def guarded(run: Callable[..., None], *args: Any) -> int:
    """Exit code of `run(*args)`; what it ends with is told in one line where a person can act on it.

    An error that is none of these goes through: its traceback is for those who mend the program.
    """
    try:
        run(*args)
    except (ConfigError, DataError) as error:
        _tell(f"rank {_rank()}: {error}")
        return EXIT_REFUSED
    except LostRank as error:
        _tell(f"rank {_rank()}: {error}")
        # Destructors would wait for the rank that is lost.
        end_at_once(error.code)
    except StopRun as error:
        if _rank() == "0":
            _tell(str(error))
        return error.code
    except KeyboardInterrupt:
        if _rank() == "0":
            print("interrupted", file=sys.stderr, flush=True)
        # Destructors would wait for the collectives under way.
        end_at_once(EXIT_INTERRUPTED)
    except OSError as error:
        if error.errno not in _REFUSED_BY_SYSTEM:
            raise
        _tell(f"rank {_rank()}: {of_the_system(error)}")
        return EXIT_STOPPED
    except RuntimeError as error:
        if _has_lost_another(error):
            _tell(f"rank {_rank()}: another rank is gone: {str(error).splitlines()[0]}")
            end_at_once(EXIT_LOST_RANK)
        if not _is_out_of_memory(error):
            raise
        _tell(
            f"rank {_rank()}: out of memory: {str(error).splitlines()[0]} A smaller train.micro_batch needs less, "
            "as does model.gradient_checkpointing=true"
        )
        return EXIT_STOPPED
    return 0


def of_the_system(error: OSError) -> str:
    """What the system refused, and where."""
    reason = error.strerror or str(error) or type(error).__name__
    return reason if error.filename is None else f"{error.filename}: {reason}"


def end_at_once(code: int) -> NoReturn:
    """Ends this process and the workers of its loaders, without waiting for anything."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)


def _has_lost_another(error: RuntimeError) -> bool:
    """Whether gloo or its store says that a peer has closed its connection, as before there is a heartbeat."""
    text = str(error)
    return any(said in text for said in ("Connection closed by peer", "Connection reset by peer", "recvValue failed"))


def _is_out_of_memory(error: RuntimeError) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _tell(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)
