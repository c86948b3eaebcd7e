"""DeepSpeed's start-up: process group, engine, and quiet.

Importing this module imports torch and DeepSpeed; call `quiet_environment` before.
"""

import contextlib
import ctypes
import logging
import os
import re
import warnings

from sycoca.config import ConfigError


def quiet_environment(has_cuda: bool) -> None:
    """Keeps other libraries' start-up chatter off the terminal. Warnings about what this project calls still show."""
    if not has_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for module in ("torch.distributed", "torch.jit", "deepspeed", "pydantic"):
        warnings.filterwarnings("ignore", module=module)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed: tensors of a CPU step otherwise come from fresh pages, faulted in every step."""
    trim_threshold, mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


@contextlib.contextmanager
def _uncompiled():
    # DeepSpeed decorates Muon's helper with torch.compile at import, which loads inductor: seconds of start-up for an
    # optimizer that is not used here.
    import torch

    compile_function = torch.compile
    torch.compile = lambda model=None, **kwargs: model if callable(model) else (lambda function: function)
    try:
        yield
    finally:
        torch.compile = compile_function


def import_deepspeed():
    """The deepspeed module, imported without its compile-time side effects."""
    with _uncompiled():
        import deepspeed
        import deepspeed.runtime.zero.muon.original_muon

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # The CPU communication extension costs up to 80 s of compilation at first use; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def compile_blocks(model, backend: str = "inductor") -> None:
    """Compiles the forward of every block in place; call it between the making of the model and the engine's.

    Under ZeRO 3 the pieces between DeepSpeed's hooks, which gather the weights of each linear map, are compiled one by
    one. Gathering whole blocks instead (its leaf modules) is no way: they reduce a gradient once per call, and both
    image passes call the same blocks.
    """
    import torch

    from sycoca.decoders import ImageDecoderLayer
    from sycoca.fusion import FusionBlock
    from sycoca.layers import Block, CrossBlock

    for module in model.modules():
        if isinstance(module, Block | CrossBlock | ImageDecoderLayer | FusionBlock):
            module.forward = torch.compile(module.forward, backend=backend)
        elif hasattr(module, "packs"):
            # The number of packed rows differs from batch to batch; compiled blocks want few shapes.
            module.packs = False


def start_process_group(deepspeed, has_cuda: bool, timeout_s: float) -> None:
    """Joins the launcher's process group, or makes one of this process alone when nothing launched it.

    Raises:
        ConfigError: the launcher's port is taken, or not all ranks have come together within the timeout.
    """
    from datetime import timedelta

    import torch

    rank = int(os.environ.setdefault("RANK", "0"))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", str(rank)))
    world = int(os.environ.setdefault("WORLD_SIZE", "1"))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if has_cuda:
        torch.cuda.set_device(local_rank)
    else:
        keep_freed_memory()
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        torch.set_num_threads(max(1, _cores() // local_world))
    if world == 1 and "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    backend = "nccl" if has_cuda else "gloo"
    # DeepSpeed makes groups of its own without naming a timeout.
    torch.distributed.distributed_c10d.default_pg_timeout = timedelta(seconds=timeout_s)
    torch.distributed.distributed_c10d.default_pg_nccl_timeout = timedelta(seconds=timeout_s)
    try:
        deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(seconds=timeout_s), verbose=False)
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        raise ConfigError(_not_met(str(error), world, timeout_s)) from None


def _not_met(error: str, world: int, timeout_s: float) -> str:
    """Why the ranks did not come together, of what torch says."""
    port = os.environ["MASTER_PORT"]
    if "EADDRINUSE" in error:
        return f"port {port} is taken, by another run perhaps; name one: deepspeed --master_port N"
    place, waited = f"{os.environ['MASTER_ADDR']}:{port}", f"within {timeout_s:g} s"
    if came := re.search(r"(\d+)/\d+ clients joined", error):
        return (
            f"{came[1]} of {world} ranks came to {place} {waited}; the same command has to run on every machine, "
            "each with a rank of its own"
        )
    if "timed out" in error or "Failed to connect" in error:
        return f"rank 0 did not answer at {place} {waited}: does it run, and is the port open?"
    return f"the ranks did not come together at {place}: {error.splitlines()[0]}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
