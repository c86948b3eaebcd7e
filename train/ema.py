"""An average of the weights over the steps, kept beside the optimizer's moments.

    ema <- ema + max(1 - decay, 9 / (10 + step)) (weights - ema)

It averages what the optimizer updates: under ZeRO each rank its share of the fp32 weights, which DeepSpeed then saves
and loads as one more state of the optimizer.
"""

import shutil
from pathlib import Path

import torch

from train.checkpoint_files import read

KEY = "ema"
_NONE = "the run kept no average of its weights; train.ema=0.999 keeps one"


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Lets the optimizer average its parameters after each of its steps.

    Args:
        optimizer: after every other hook that changes its parameters has been registered.
        decay: 0..1, both excluded; the first steps weigh more, so that the start is soon forgotten.
    """

    @torch.no_grad()
    def average(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = optimizer.state[p]
                if KEY not in state:
                    state[KEY] = p.detach().clone()
                    continue
                step = torch.as_tensor(state.get("step", group.get("step", 0)), dtype=p.dtype, device=p.device)
                state[KEY].lerp_(p.detach(), (9 / (10 + step)).clamp(min=1 - decay).reshape(()))

    optimizer.register_step_post_hook(average)


def averages_without_zero(content: dict, names: list[str]) -> dict[str, torch.Tensor]:
    """The averages by name, of DeepSpeed's file of a run without ZeRO.

    Args:
        content: of the file.
        names: of the parameters, in the order in which the optimizer holds them.

    Raises:
        ValueError: the run kept no average.
    """
    states = (content.get("optimizer") or {}).get("state", {})
    if len(states) != len(names) or any(KEY not in state for state in states.values()):
        raise ValueError(_NONE)
    return {name: states[number][KEY] for number, name in enumerate(names)}


def average_in_place_of_weights(folder: Path, target: Path) -> None:
    """Copies a DeepSpeed checkpoint of ZeRO 1 to 3, its fp32 weights replaced by their averages.

    Args:
        folder: a checkpoint, known to hold data only.
        target: folder to write.

    Raises:
        ValueError: the run kept no average.
    """
    target.mkdir(parents=True)
    for path in sorted(folder.glob("*.pt")):
        if not path.name.endswith("_optim_states.pt"):
            shutil.copy(path, target / path.name)
            continue
        content = read(path)
        saved = content["optimizer_state_dict"]
        flat = "fp32_flat_groups" if "fp32_flat_groups" in saved else "single_partition_of_fp32_groups"
        states = saved.get("base_optimizer_state") or saved["optimizer_state_dict"]
        states = states["state"] if isinstance(states, dict) else states
        averages = [states[number].get(KEY) for number in range(len(saved[flat]))]
        if any(average is None for average in averages):
            raise ValueError(_NONE)
        # DeepSpeed saves some states with the padding that the weights are saved without.
        saved[flat] = [
            average.flatten()[: weights.numel()].view_as(weights)
            for average, weights in zip(averages, saved[flat], strict=True)
        ]
        torch.save(content, target / path.name)
