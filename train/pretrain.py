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
    from train.engine import compile_blocks, import_deepspeed, quiet_environment, start_process_group

    quiet_environment(has_cuda())
    deepspeed = import_deepspeed()
    import torch
    import torch.distributed as dist

    from sycoca.masking import step_plan
    from sycoca.model import SyCoCa, parameter_groups
    from train.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
    from train.export import export
    from train.inputs import open_inputs
    from train.metrics import RunLog, Timing, trained_losses
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
    if train.compile:
        compile_blocks(model)
    optimizer = build_optimizer(parameter_groups(model, config.optimizer.weight_decay), config.optimizer)
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=launch.deepspeed)
    if launch.resume:
        load_checkpoint(engine, run_dir, first_step)

    log = RunLog(
        run_dir,
        losses=trained_losses(config.model),
        total_steps=inputs.total_steps,
        first_step=first_step,
        every=train.log_every,
        group=group,
    )
    log.say(start_line(launch, model, inputs, world, first_step))
    batches = inputs.batches(first_step * train.accumulation, device)
    shares = [train.micro_batch] * world
    for step in range(first_step, inputs.total_steps):
        started, waited = time.perf_counter(), 0.0
        plan = step_plan(config.model, step, inputs.total_steps, train.seed)
        lr = config.optimizer.lr * learning_rate_factor(config.schedule, step, inputs.total_steps)
        set_learning_rate(optimizer, lr)
        taken = []
        for _ in range(train.accumulation):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            losses = engine(batch, plan, group, shares)
            engine.backward(losses.total)
            engine.step()
            taken.append(torch.stack(losses).detach())
        timing = Timing(waited, time.perf_counter() - started, sum(shares) * train.accumulation)
        log.step(step, torch.stack(taken).mean(0), {"lr": lr, "grad_norm": engine.get_global_grad_norm()}, timing)
        if (step + 1) % train.save_every == 0 or step + 1 == inputs.total_steps:
            log.flush()
            save_checkpoint(engine, run_dir, step=step + 1, keep=train.keep_last)
    log.close()
    if rank == 0:
        export(run_dir, run_dir / "model")
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
        *filter(None, (inputs.train.skipped.line(), inputs.val.skipped.line())),
    ]
    return "\n".join(lines)


def evaluate_at_end(engine, launch: Launch, inputs, device, group) -> None:
    """Held-out figures into eval.json, the picture into overview.png, both summed up on the terminal."""
    import json

    import torch.distributed as dist

    from sycoca.visualize import save_overview
    from train.data import readable
    from train.evaluation_run import evaluate, summary_lines

    model = whole_model(engine, launch, device).eval()
    image_size, pairs = launch.config.model.vision.image_size, launch.config.data.val_pairs
    writes = dist.get_rank() == 0
    try:
        figures = evaluate(
            model, inputs.tokenizer, inputs.val, image_size=image_size, pairs=pairs, device=device, group=group
        )
    except ValueError as error:
        # The training is done and saved; an unreadable held-out part must not look like its failure.
        if writes:
            print(f"no held-out figures: {error}", flush=True)
        return
    if not writes:
        return
    figures["left_out"] = {"train": inputs.train.skipped.counts(), "val": inputs.val.skipped.counts()}
    (launch.run_dir / "eval.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print("\n".join(summary_lines(figures)), flush=True)
    shown = [sample for _, sample in itertools.islice(readable(inputs.val), 6)]
    picture = launch.run_dir / "overview.png"
    save_overview(picture, model, inputs.tokenizer, shown, image_size=image_size, device=device)
    print(f"left in {launch.run_dir}: {', '.join(sorted(p.name for p in launch.run_dir.iterdir()))}", flush=True)


def whole_model(engine, launch: Launch, device):
    """The trained model on every rank, outside ZeRO: under stage 3 a copy, else the engine's own. All ranks call it."""
    import deepspeed

    from sycoca.model import SyCoCa

    if not engine.zero_optimization_partition_weights():
        return engine.module
    # A rank that runs the partitioned model alone would wait for the others in every layer.
    copy = SyCoCa(launch.config.model).to(device)
    for (_, target), (_, source) in zip(copy.named_parameters(), engine.module.named_parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([source]):
            target.data.copy_(source.data)
    return copy


def main() -> int:
    try:
        launch = parse(sys.argv[1:], script=Path(__file__).resolve(), has_cuda=has_cuda())
    except (ConfigError, DataError, OSError) as error:
        # Every rank finds the same mistake; one of them tells it.
        if os.environ.get("RANK", "0") == "0":
            told = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
            print(f"error: {told}", file=sys.stderr, flush=True)
        return 2
    try:
        pretrain(launch)
    except (ConfigError, DataError) as error:
        print(f"error: rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
