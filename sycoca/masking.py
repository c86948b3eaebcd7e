"""Choice of the patches that TG-MIM masks and captioning drops, and of the steps on which they do.

Attentive: s_i = max_j cos(v_i, t_j) in one of the score spaces. Random: a counter-based hash of (seed, patch).
Oracle: the share of the patch inside boxes of what the caption describes, ties at random.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import PatchSelection, attentive_select
from sycoca.config import ModelConfig

_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_INCREMENT = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1
# Below the area of a pixel in any patch.
_TIE = 1e-5


class StepPlan(NamedTuple):
    """What one step does, known on the host before it starts.

    Attributes:
        attentive: masks follow what the configuration names; else TG-MIM masks at random.
        mask_captioning: captioning sees the kept patches only; else all.
        reconstruct: TG-MIM is trained, where the model has it.
    """

    attentive: bool
    mask_captioning: bool
    reconstruct: bool = True


def step_plan(config: ModelConfig, step: int, total_steps: int, seed: int) -> StepPlan:
    """The plan of a step, the same on every rank and after every resume.

    Args:
        config: the model's configuration.
        step: 0..total_steps - 1.
        total_steps: length of the run in steps.
        seed: of the run.
    """
    attentive = config.selects and step >= config.masking.attentive_start * total_steps
    draw = hash_int(hash_int(seed) + step) / 2**64
    mask_captioning = attentive and config.num_dropped > 0 and draw < config.masking.ic_mask_prob
    reconstruct = config.num_masked > 0 and step >= config.masking.tgmim_start * total_steps
    return StepPlan(attentive, mask_captioning, reconstruct)


def select_by_score(
    patches: Tensor, tokens: Tensor, valid: Tensor, config: ModelConfig, *, impl: str = "auto"
) -> PatchSelection:
    """The attentive selection from patches (B, P, D) and tokens (B, T, D), valid (B, T), in the score space."""
    return attentive_select(
        patches.detach(),
        tokens.detach(),
        valid,
        num_masked=config.num_masked,
        num_dropped=config.num_dropped,
        block=config.masking.block,
        grid=config.vision.grid if config.masking.block > 1 else None,
        impl=impl,
    )


def select_at_random(seeds: Tensor, config: ModelConfig) -> PatchSelection:
    """The random selection of the samples with the given seeds (B,) int64: a pure function of each seed.

    Its scores are uniform in [0, 1); order and lists are those of `kernels.attentive_select`.
    """
    return _select_units(_draws(seeds, config), config)


def select_described(described: Tensor, seeds: Tensor, config: ModelConfig) -> PatchSelection:
    """The selection that an oracle makes: patches in the order of how much of them is described.

    Args:
        described: (B, P) float, share of each patch inside boxes of what the caption describes.
        seeds: (B,) int64, decide between equal shares.
        config: of the model.

    Returns:
        Scores, order and lists as those of `kernels.attentive_select`.
    """
    share = described[:, _members(config, described.device)].double().mean(2)  # (B, units)
    return _select_units(share + _TIE * _draws(seeds, config), config)


def _draws(seeds: Tensor, config: ModelConfig) -> Tensor:
    """Uniform numbers (B, units) fp32 of each sample's seed."""
    units = torch.arange(config.vision.num_patches // config.masking.block**2, device=seeds.device)
    return _shift_right(hash_tensor(hash_tensor(seeds)[:, None] + units), 40).float() * 2.0**-24


def _members(config: ModelConfig, device: torch.device) -> Tensor:
    """The patches (units, block * block) of each unit, units row-major."""
    rows, cols = config.vision.grid
    block = config.masking.block
    members = torch.arange(rows * cols, device=device).view(rows // block, block, cols // block, block)
    return members.transpose(1, 2).reshape(-1, block * block)


def _select_units(values: Tensor, config: ModelConfig) -> PatchSelection:
    """The selection of the units with the largest values (B, units)."""
    P, members = config.vision.num_patches, _members(config, values.device)
    ranked = members[values.argsort(dim=1, descending=True, stable=True)].flatten(1)
    scores = torch.empty_like(ranked, dtype=torch.float32)
    scores.scatter_(1, members.flatten().expand_as(ranked), values.float().repeat_interleave(members.shape[1], dim=1))
    lists = (
        ranked[:, : config.num_masked],
        ranked[:, config.num_masked :],
        ranked[:, P - config.num_dropped :],
        ranked[:, : P - config.num_dropped],
    )
    return PatchSelection(scores, *(part.sort(dim=1).values for part in lists))


def overlap(first: Tensor, second: Tensor, num_patches: int) -> Tensor:
    """Mean share, 0..1, of the patches first (B, K) that are also in second (B, K); 1 for K = 0."""
    if first.shape[1] == 0:
        return torch.ones((), device=first.device)
    chosen = torch.zeros(second.shape[0], num_patches, dtype=torch.float32, device=second.device)
    return chosen.scatter(1, second, 1.0).gather(1, first).mean()


def hash_int(x: int) -> int:
    """SplitMix64 of a host integer, 0..2^64 - 1."""
    x = (x + _INCREMENT) & _WORD
    x = ((x ^ (x >> 30)) * _MULTIPLIERS[0]) & _WORD
    x = ((x ^ (x >> 27)) * _MULTIPLIERS[1]) & _WORD
    return x ^ (x >> 31)


def hash_tensor(x: Tensor) -> Tensor:
    """SplitMix64 of each int64 element, the 64 bits read as a signed number."""
    x = x + _signed(_INCREMENT)
    x = (x ^ _shift_right(x, 30)) * _signed(_MULTIPLIERS[0])
    x = (x ^ _shift_right(x, 27)) * _signed(_MULTIPLIERS[1])
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # The shift of int64 copies the sign; the hash needs zeros.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
