"""Bytes and states of a plan, against those of runs on one, two and four processes."""

import json
import os
import sys
from pathlib import Path

import pytest

from sycoca.config import from_dict
from tests.runs.faults import SMALL, Run, finished
from train.config import RunConfig
from train.plan import Batch, collectives, memory
from train.plan_work import work

pytestmark = pytest.mark.run
KINDS = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
}


def count_step() -> None:
    """Writes what the second step exchanges, and what the rank then holds, into the folder of the run."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten

    import train.two_pass

    class Exchanged(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.bytes = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            space, _, name = func._schema.name.partition("::")
            if space in ("c10d", "_c10d_functional") and name in KINDS:
                sizes = [x.nbytes for x in tree_flatten(args[:2])[0] if isinstance(x, torch.Tensor)]
                # Gathered and scattered tensors come beside a share of them.
                whole = max(sizes) * (int(os.environ["WORLD_SIZE"]) if name == "all_gather_into_tensor" else 1)
                kind = KINDS[name]
                self.bytes[kind] = self.bytes.get(kind, 0) + whole
            return func(*args, **(kwargs or {}))

    original, number = train.two_pass.take_step, 0

    def take_step(engine, *rest):
        nonlocal number
        number += 1
        if number != 2:
            return original(engine, *rest)
        with Exchanged() as counted:
            taken = original(engine, *rest)
        states = engine.optimizer.optimizer.state
        held = sum(x.nbytes for state in states.values() for key, x in state.items() if key != "step")
        copies = sum(p.nbytes for p in states)
        where = Path(sys.argv[sys.argv.index("--run-dir") + 1]) / f"counted{os.environ['RANK']}"
        content = {"exchanged": counted.bytes, "optimizer": held, "fp32 copy of ZeRO": copies}
        where.write_text(json.dumps(content), encoding="utf-8")
        return taken

    train.two_pass.take_step = take_step


@pytest.mark.parametrize(("stage", "world", "parts"), [(1, 1, 2), (2, 2, 2), (1, 4, 1)])
def test_bytes_and_states_are_those_of_the_formulas(tmp_path, stage, world, parts):
    options = [option for option in SMALL if not option.startswith(("--data", "micro_batch"))]
    total = 4 * parts * world
    options += ["--data=scenes?count=64", "micro_batch=4", f"global_batch={total}", "steps=2", "timeout_s=60"]
    run = finished(Run(tmp_path / "run", *options, world=world, stage=stage, prepare=count_step))
    config = from_dict(RunConfig, json.loads((run.run_dir / "config.json").read_text())["run"]).model
    ranks = [json.loads((run.run_dir / f"counted{rank}").read_text()) for rank in range(world)]

    from sycoca.model import SyCoCa

    parameters = sum(p.numel() for p in SyCoCa(config).parameters())
    batch = Batch(total, 4, parts)
    expected = {}
    for one in collectives(parameters, 0, config, batch, world, stage=stage, value_bytes=4):
        expected[one.kind] = expected.get(one.kind, 0) + one.payload * one.times
    found = ranks[0]["exchanged"]
    for kind, size in expected.items() if world > 1 else ():
        assert found[kind] == pytest.approx(size, rel=0.02), (kind, found, expected)
    held = memory(parameters, config, work(config, 4), batch, world, stage=stage, value_bytes=4)
    for name in ("optimizer", "fp32 copy of ZeRO"):
        assert sum(rank[name] for rank in ranks) / world == pytest.approx(held[name], rel=0.02), name
