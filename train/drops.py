"""What training leaves out at random, as a pure function of the step, so that a resumed run leaves out the same."""

import torch
from torch import nn

from sycoca.config import ModelConfig
from train.data.order import mix


def stop_drops(encoder: nn.Module) -> None:
    """Has an encoder that stays as it is leave nothing out, whatever mode it is in."""
    for part in encoder.modules():
        for name in ("p", "drop_prob"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)


def seed_drops(model: ModelConfig, seed: int, step: int, rank: int) -> None:
    """Seeds torch's generators for a step of a model with dropout.

    Args:
        model: its configuration; without dropout nothing is done.
        seed: of the run.
        step: about to be taken.
        rank: this process's.
    """
    if model.drops:
        torch.manual_seed(mix(seed, step, rank) >> 1)
