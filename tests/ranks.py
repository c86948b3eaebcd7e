"""A function on the ranks of a gloo group, each a forked process on this machine."""

import io
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Results of `function(rank, world_size, *args)` on every rank, in rank order.

    The default group is initialised around the call. The function may be a closure; its result must be picklable.

    Raises:
        RuntimeError: a rank failed (its traceback is the message), died, or did not finish in time.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        workers = [
            context.Process(
                target=_rank, args=(function, rank, world_size, store, pipe[1], timeout_s, args), daemon=True
            )
            for rank, pipe in enumerate(pipes)
        ]
        for worker in workers:
            worker.start()
        for _, sender in pipes:
            sender.close()
        try:
            return _collect([receiver for receiver, _ in pipes], time.monotonic() + timeout_s)
        finally:
            for worker in workers:
                worker.join(timeout=2.0)
                if worker.is_alive():
                    worker.kill()
                    worker.join()


def _collect(receivers: list, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(zip(receivers, range(len(receivers))))
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RuntimeError(f"ranks {sorted(waiting.values())} did not finish in time")
        for receiver in ready:
            rank = waiting.pop(receiver)
            try:
                succeeded, payload = pickle.loads(receiver.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} died") from None
            if not succeeded:
                raise RuntimeError(f"rank {rank} failed:\n{payload}")
            results[rank] = torch.load(io.BytesIO(payload), weights_only=False)
    return [results[rank] for rank in sorted(results)]


def _rank(function: Callable[..., Any], rank: int, world_size: int, store: Path, pipe, timeout_s: float, args) -> None:
    # A forked child has no OpenMP pool: a parallel region would wait for it for ever.
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(store), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        result = io.BytesIO()
        torch.save(function(rank, world_size, *args), result)
        message = (True, result.getvalue())
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        message = (False, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(message))
