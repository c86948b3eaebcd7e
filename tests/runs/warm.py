"""What a rank of a fault test needs, imported once in the process that forks them all."""

import importlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from train.engine import import_deepspeed, quiet_environment

quiet_environment(has_cuda=False)
import_deepspeed()
for name in (
    "checkpoints",
    "evaluate",
    "finetune",
    "heartbeat",
    "inputs",
    "metrics",
    "optim",
    "pretrain",
    "tasks.tuning",
):
    importlib.import_module(f"train.{name}")
# The first optimizer would import it.
for name in ("torch._dynamo", "torch.utils.tensorboard"):
    importlib.import_module(name)
