"""What ends one rank ends all of them: the same code, one line."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from sycoca.config import ConfigError
from train.data.sample import DataError
from train.exits import EXIT_REFUSED, EXIT_STOPPED, StopRun, of_the_system


def agree(failure: str | None) -> str | None:
    """The first rank's failure, the same on all ranks; None where there is none. All ranks call it."""
    return next((said for said in _said(failure) if said is not None), None)


def _said(mine: Any) -> list[Any]:
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    return told


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A part of a run in which ranks do not wait for one another; what one of them cannot do ends all. All enter it.

    Raises:
        StopRun: on all ranks alike, where one of them was refused something or stopped.
    """
    mine = None
    try:
        yield
    except (ConfigError, DataError) as error:
        mine = EXIT_REFUSED, str(error)
    except StopRun as error:
        mine = error.code, str(error)
    except OSError as error:
        mine = EXIT_STOPPED, of_the_system(error)
    said = _said(mine)
    failed = [(rank, *what) for rank, what in enumerate(said) if what is not None]
    if failed:
        rank, code, text = failed[0]
        raise StopRun(text if len(failed) == len(said) else f"rank {rank}: {text}", code)
