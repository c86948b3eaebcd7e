"""Pre-training of SyCoCa and CoCa under DeepSpeed ZeRO.

deepspeed train/pretrain.py --config ds_zero2.json
"""

import itertools
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from sycoca.config import ConfigError
from train.data.sample import DataError
from train.hardware import has_cuda
from train.launch import Launch, parse


def pretrain(launch: Launch) -> None:
    """Trains from the launch's checked configuration to its last step, then evaluates on held-out pairs."""
    from train.engine import import_deepspeed, quiet_environment, start_process_group

    quiet_environment(has_cuda())
    deepspeed = import_deepspeed()
    import torch
    import torch.distributed as dist

    from sycoca.masking import step_plan
    from sycoca.model import SyCoCa, parameter_groups
    from train.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
    from train.inputs import open_inputs
    from train.metrics import RunLog, Timing
    from train.optim import build_optimizer, learning_rate_factor, set_learning_rate

    config, train, run_dir = launch.config, launch.config.train, launch.run_dir
    start_process_group(deepspeed, has_cuda(), train.timeout_s)
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD if world > 1 else None
    device = torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")

    inputs = open_inputs(launch, rank=rank, world=world)
    first_step = newest_checkpoint(run_dir) if launch.resume else 0
    stage = launch.deepspeed.get("zero_optimization", {}).get("stage", 0)

    torch.manual_seed(train.seed)
    with deepspeed.zero.Init(config_dict_or_path=launch.deepspeed, enabled=stage == 3):
        model = SyCoCa(config.model)
    optimizer = build_optimizer(parameter_groups(model, config.optimizer.weight_decay), config.optimizer)
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=launch.deepspeed)
    if launch.resume:
        load_checkpoint(engine, run_dir, first_step)

    log = RunLog(run_dir, total_steps=inputs.total_steps, first_step=first_step, every=train.log_every, group=group)
    log.say(start_line(launch, model, inputs, world, first_step))
    batches = inputs.batches(first_step * train.accumulation, device)
    for step in range(first_step, inputs.total_steps):
        started, waited = time.perf_counter(), 0.0
        plan = step_plan(config.model, step, inputs.total_steps, train.seed)
        lr = config.optimizer.lr * learning_rate_factor(config.schedule, step, inputs.total_steps)
        set_learning_rate(optimizer, lr)
        for _ in range(train.accumulation):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            losses = engine(batch, plan, group)
            engine.backward(losses.total)
            engine.step()
        timing = Timing(waited, time.perf_counter() - started, len(batch.images) * train.accumulation * world)
        log.step(step, losses, {"lr": lr, "grad_norm": engine.get_global_grad_norm()}, timing)
        if (step + 1) % train.save_every == 0 or step + 1 == inputs.total_steps:
            save_checkpoint(engine, run_dir, step=step + 1, keep=train.keep_last)
    log.close()
    if line := inputs.left_out():
        log.say(line)
    evaluate_at_end(engine, launch, inputs, device, group)
    dist.destroy_process_group()


def start_line(launch: Launch, model, inputs, world: int, first_step: int) -> str:
    """What is about to run, for a person."""
    config = launch.config
    count = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    stage = launch.deepspeed.get("zero_optimization", {}).get("stage", 0)
    train, data = config.train, config.data
    lines = [
        f"{'resuming at step ' + str(first_step) if launch.resume else 'starting'}: {config.preset}, "
        f"{count / 1e6:.1f} M parameters, ZeRO {stage}, {world} rank(s), {train.precision}, "
        f"batch {train.micro_batch} x {train.accumulation} x {world}, {inputs.total_steps} steps",
        f"data: {data.train}, {len(inputs.train)} samples, {len(inputs.val)} held out; run folder: {launch.run_dir}",
        *launch.notes,
    ]
    return "\n".join(lines)


def evaluate_at_end(engine, launch: Launch, inputs, device, group) -> None:
    """Held-out figures into eval.json, the picture into overview.png, both summed up on the terminal."""
    import json

    import deepspeed
    import torch.distributed as dist

    from sycoca.visualize import save_overview
    from train.data import readable
    from train.evaluate import evaluate, summary_lines

    model = engine.module
    model.eval()
    image_size = launch.config.model.vision.image_size
    with deepspeed.zero.GatheredParameters(
        list(model.parameters()), enabled=engine.zero_optimization_partition_weights()
    ):
        figures = evaluate(
            model,
            inputs.tokenizer,
            inputs.val,
            image_size=image_size,
            pairs=launch.config.data.val_pairs,
            device=device,
            group=group,
        )
        if dist.get_rank() == 0:
            (launch.run_dir / "eval.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
            print("\n".join(summary_lines(figures)), flush=True)
            shown = [sample for _, sample in itertools.islice(readable(inputs.val), 6)]
            picture = launch.run_dir / "overview.png"
            save_overview(picture, model, inputs.tokenizer, shown, image_size=image_size, device=device)
            print(
                f"left in {launch.run_dir}: eval.json, overview.png, metrics.jsonl, tensorboard/, checkpoints/",
                flush=True,
            )


def main() -> int:
    try:
        launch = parse(sys.argv[1:], script=Path(__file__).resolve(), has_cuda=has_cuda())
        pretrain(launch)
    except (ConfigError, DataError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
