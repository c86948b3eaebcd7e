"""A run's weights as a model folder, from a checkpoint of any ZeRO stage and number of ranks; needs no GPU.

python -m train.export RUN OUT
"""

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

from sycoca.config import ConfigError
from train.config import RunConfig
from train.durable import faults
from train.run_folder import checkpoint_steps, read_run_config


def export(run_dir: Path, out: Path, *, step: int | None = None, allow_pickle: bool = False, ema: bool = False) -> int:
    """Writes the folder that `sycoca.load_pretrained` reads.

    Args:
        run_dir: folder of a run.
        out: folder, made where missing.
        step: of the checkpoint; the newest sound one where None.
        allow_pickle: read checkpoints that hold other Python objects than DeepSpeed's own; these can run any code.
        ema: the average of the weights over the steps, which a run with `train.ema` keeps.

    Returns:
        The step of the checkpoint.

    Raises:
        ConfigError: no run, no such checkpoint, a damaged one, or none with an average.
        WeightsError: a checkpoint that cannot be read, or is of another architecture.
    """
    run = read_run_config(run_dir).config
    config = run.model
    steps = checkpoint_steps(run_dir)
    if not steps:
        raise ConfigError(f"{run_dir}: holds no checkpoint")
    if step is None:
        # Without a sound one the newest says what is wrong with it.
        step = next((known for known in reversed(steps) if not faults(_folder(run_dir, known))), steps[-1])
    if step not in steps:
        raise ConfigError(f"--step {step}: {run_dir} holds checkpoints of the steps {', '.join(map(str, steps))}")
    folder = _folder(run_dir, step)
    if found := faults(folder):
        raise ConfigError(f"{folder} is damaged: {found[0]}")

    from sycoca.hub import build, read_tokenizer

    tokenizer = read_tokenizer(run_dir, config)
    state = averaged(folder, run) if ema else consolidated(folder, allow_pickle=allow_pickle)
    build(state, config, tokenizer, source=str(folder)).save_pretrained(out)
    return step


def averaged(folder: Path, run: RunConfig) -> dict:
    """The averages of the parameters by name, put together from the shares of all ranks; frozen ones as they are.

    Raises:
        ConfigError: the run kept none.
        WeightsError: as `consolidated`.
    """
    from train.checkpoint_files import read
    from train.ema import average_in_place_of_weights, averages_without_zero

    try:
        if not any(folder.glob("*_optim_states.pt")):
            content = read(next(folder.glob("*_model_states.pt")))
            return {**consolidated(folder), **averages_without_zero(content, _names(run))}
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".average-") as scratch:
            average_in_place_of_weights(folder, Path(scratch) / folder.name)
            # The file is mapped into memory, and about to go.
            return {name: tensor.clone() for name, tensor in consolidated(Path(scratch) / folder.name).items()}
    except ValueError as error:
        raise ConfigError(f"{folder}: {error}") from None


def _names(run: RunConfig) -> list[str]:
    """Names of the parameters in the order in which the optimizer of a run holds them."""
    import torch

    from sycoca.xvlm import build_model
    from train.param_groups import pretraining_groups

    with torch.device("meta"):
        model = build_model(run.model)
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in pretraining_groups(model, run) for p in group["params"]]


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def consolidated(folder: Path, *, allow_pickle: bool = False) -> dict:
    """The fp32 parameters by name, put together from the shares of all ranks.

    Raises:
        WeightsError: truncated or missing files, or pickled objects without `allow_pickle`.
    """
    from train.engine import import_deepspeed, quiet_environment

    quiet_environment(has_cuda=False)
    import_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from sycoca.weights import WeightsError

    files = sorted(folder.glob("*.pt"))
    parts = {path: _read(path, allow_pickle) for path in files}
    sharded = [path for path in files if path.name.endswith("_optim_states.pt")]
    if not sharded:
        whole = [part["module"] for part in parts.values() if part.get("module")]
        if not whole:
            raise WeightsError(f"{folder}: no DeepSpeed checkpoint")
        return {name: tensor.float() for name, tensor in whole[0].items()}
    del parts
    try:
        # DeepSpeed reports its progress on the terminal, whoever calls.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    except (ValueError, KeyError, FileNotFoundError, RuntimeError) as error:
        raise WeightsError(f"{folder}: shares of a checkpoint that do not fit together ({error})") from None


def _read(path: Path, allow_pickle: bool) -> dict:
    """A checkpoint's file, its tensors left on the disk; of its pickled objects only DeepSpeed's own are made."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from torch.serialization import safe_globals

    from sycoca.weights import load_torch

    with safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        return load_torch(path, allow_pickle, mmap=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.export",
        description=__doc__.splitlines()[0],
        epilog="example: %(prog)s runs/tiny my-model",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, such as runs/tiny")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--step", type=int, help="step of the checkpoint; the newest without it")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read pickled Python objects from a checkpoint you trust"
    )
    parser.add_argument("--ema", action="store_true", help="the average of the weights that train.ema keeps")
    asked = parser.parse_args(arguments)
    try:
        step = export(asked.run, asked.out, step=asked.step, allow_pickle=asked.allow_pickle, ema=asked.ema)
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{asked.out}: {asked.run} after {step} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
