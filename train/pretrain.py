"""Pre-training of SyCoCa and CoCa under DeepSpeed ZeRO.

deepspeed train/pretrain.py --config ds_zero2.json
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from train.hardware import has_cuda
from train.launch import Launch


def pretrain(launch: Launch) -> None:
    """Trains from the launch's checked configuration to its last step, then evaluates on held-out pairs."""
    from train.engine import import_deepspeed, quiet_environment, start_process_group

    quiet_environment(has_cuda())
    deepspeed = import_deepspeed()
    import torch
    import torch.distributed as dist
    from sycoca.masking import step_plan
    from sycoca.model import SyCoCa, parameter_groups

    from train.checkpoints import checkpoint_steps, load_checkpoint, save_checkpoint
    from train.metrics import RunLog, Timing
    from train.optim import build_optimizer, learning_rate_factor, set_learning_rate

    config, train = launch.config, launch.config.train
    start_process_group(deepspeed, has_cuda(), train.timeout_s)
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD if world > 1 else None
    device = torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")

    run = open_run(launch, rank)
    first_step = checkpoint_steps(launch.run_dir)[-1] if launch.resume else 0

    torch.manual_seed(train.seed)
    with deepspeed.zero.Init(config_dict_or_path=launch.deepspeed, enabled=run.stage == 3):
        model = SyCoCa(config.model)
    optimizer = build_optimizer(parameter_groups(model, config.optimizer.weight_decay), config.optimizer)
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=launch.deepspeed)
    if launch.resume:
        load_checkpoint(engine, launch.run_dir, first_step)

    log = RunLog(launch.run_dir, total_steps=run.total_steps, first_step=first_step, every=train.log_every, group=group)
    batches = run.batches(first_step, device)
    for step in range(first_step, run.total_steps):
        started, waited = time.perf_counter(), 0.0
        plan = step_plan(config.model.masking, step, run.total_steps, train.seed)
        lr = config.optimizer.lr * learning_rate_factor(config.schedule, step, run.total_steps)
        set_learning_rate(optimizer, lr)
        for _ in range(train.accumulation):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            losses = engine(batch, plan, group)
            engine.backward(losses.total)
            engine.step()
        pairs = len(batch.images) * train.accumulation * world
        log.step(
            step,
            losses,
            {"lr": lr, "grad_norm": engine.get_global_grad_norm()},
            Timing(waited, time.perf_counter() - started, pairs),
        )
        if (step + 1) % train.save_every == 0 or step + 1 == run.total_steps:
            save_checkpoint(engine, launch.run_dir, step=step + 1, keep=train.keep_last)
    log.close()
