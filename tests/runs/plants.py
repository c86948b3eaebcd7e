"""Faults that tests plant in the ranks of a run, and what they compare."""

import os
import signal

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint


class BrokenImages:
    """Images that are not finite.

    Args:
        rank: on which they come.
        first: number of the first such batch, from 0.
        end: number of the first batch behind them.
    """

    def __init__(self, rank: int, first: int, end: int) -> None:
        self.rank, self.numbers = rank, range(first, end)

    def __call__(self) -> None:
        import train.data.ahead

        original = train.data.ahead.Loader.__next__
        number = -1

        def broken(loader):
            nonlocal number
            number += 1
            loaded = original(loader)
            if number in self.numbers and os.environ["RANK"] == str(self.rank):
                side = loaded.images.shape[-2]
                loaded = loaded._replace(images=torch.full((len(loaded.images), 3, side, side), float("nan")))
            return loaded

        train.data.ahead.Loader.__next__ = broken


def unreadable():
    from train.data.sample import BadSample
    from train.data.scenes import Scenes

    def failing(original):
        def read(self, index, *rest):
            if index % 3 == 0:
                raise BadSample("planted fault", str(index))
            return original(self, index, *rest)

        return read

    Scenes.pair, Scenes.captioned = failing(Scenes.pair), failing(Scenes.captioned)


def killed_behind_step_5():
    import train.health

    original = train.health.Skips.after

    def after(self, step, *rest):
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, step, *rest)

    train.health.Skips.after = after


def fp32_weights(run_dir, step: int) -> dict[str, torch.Tensor]:
    return get_fp32_state_dict_from_zero_checkpoint(str(run_dir / "checkpoints"), tag=f"step_{step:08d}")
