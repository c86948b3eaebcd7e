"""Pre-training of SyCoCa and CoCa under DeepSpeed ZeRO.

deepspeed train/pretrain.py --config ds_zero2.json
"""

import contextlib
import itertools
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from sycoca.config import ConfigError
from train.data.sample import DataError
from train.exits import EXIT_SAVED, StopRun, guarded, refused
from train.hardware import has_cuda
from train.launch import Launch, parse

FINISHED = "stopped on request after the last step; --resume exports the model and judges it"


def pretrain(launch: Launch) -> None:
    """Trains from the launch's checked configuration to its last step, then evaluates on held-out pairs."""
    from train.engine import compile_blocks, import_deepspeed, quiet_environment, start_process_group

    quiet_environment(has_cuda())
    deepspeed = import_deepspeed()
    import torch
    import torch.distributed as dist

    from sycoca.contrast import Spread
    from sycoca.masking import step_plan
    from sycoca.xvlm import build_model
    from train.alike import require_alike
    from train.carried import carry_over
    from train.checkpoints import Saver, choose, prepare, resume, tag, tokenizer_digest
    from train.drops import seed_drops
    from train.ema import keep_average
    from train.evaluations import Evaluations
    from train.export import export
    from train.health import Control, Skips, Spikes
    from train.heartbeat import Heartbeat
    from train.initial import begin
    from train.inputs import hold_run_dir, open_inputs
    from train.metrics import RunLog, Timing, loss_names, trained_losses
    from train.optim import build_optimizer, learning_rate_factor, set_learning_rate
    from train.param_groups import pretraining_groups
    from train.signals import StopRequest
    from train.target import TargetEncoder
    from train.together import together
    from train.two_pass import take_step

    config, train, run_dir = launch.config, launch.config.train, launch.run_dir
    request = StopRequest()
    start_process_group(deepspeed, has_cuda(), train.timeout_s)
    require_alike(launch)
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD if world > 1 else None
    device = torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")

    held = hold_run_dir(run_dir, anew=launch.restart)
    chosen = choose(run_dir) if launch.resume else None
    first_step = chosen.step if chosen else 0
    inputs = open_inputs(launch, rank=rank, world=world)

    torch.manual_seed(train.seed)
    # Whole, whatever is partitioned later: what `deepspeed.zero.Init` has partitioned, a parent no longer initialises.
    model = build_model(config.model)
    anew = [] if chosen else begin(model, config)
    if train.compile:
        compile_blocks(model)
    offloaded = "zero_force_ds_cpu_optimizer" in launch.deepspeed
    groups = pretraining_groups(model, config)
    optimizer = build_optimizer(groups, config.optimizer, offloaded=offloaded, stage=launch.stage)
    if train.ema is not None:
        keep_average(optimizer, train.ema)
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=launch.deepspeed)
    prepare(engine, trusted=launch.trusted)
    digest = tokenizer_digest(run_dir)
    if chosen and resume(engine, run_dir, chosen, tokenizer=digest, trusted=launch.trusted):
        carry_over(engine, run_dir / "checkpoints" / tag(chosen.step), config, trusted=launch.trusted)
    target = TargetEncoder(engine, config.model, device) if config.model.predicts_features else None
    if target is not None and train.compile:
        compile_blocks(target.vision)

    heartbeat, control = Heartbeat(train.timeout_s), Control()
    skips, saver = Skips(engine), Saver(engine, run_dir, train, facts={"tokenizer": digest})
    log = RunLog(
        run_dir,
        losses=trained_losses(config.model, regions=train.region_batch > 0),
        names=loss_names(config.model),
        total_steps=inputs.total_steps,
        first_step=first_step,
        every=train.log_every,
        group=group,
        spikes=Spikes(train.spike_factor),
        wandb=train.wandb,
    )
    log.say(start_line(launch, model, inputs, world, chosen, anew))
    evaluations = Evaluations(
        run_dir,
        train.evaluate_every,
        first_step=first_step,
        total_steps=inputs.total_steps,
        writes=rank == 0,
        **judging(launch, inputs, device, group),
    )
    spread = Spread(group, [train.micro_batch * train.accumulation] * world, train.itc_schedule)
    # Workers that are left to themselves are waited for when the process ends.
    with contextlib.closing(inputs.batches(first_step)) as batches, heartbeat.guard():
        for step in range(first_step, inputs.total_steps):
            started = time.perf_counter()
            plan = step_plan(config.model, step, inputs.total_steps, train.seed)
            lr = config.optimizer.lr * learning_rate_factor(config.schedule, step, inputs.total_steps)
            set_learning_rate(optimizer, lr)
            seed_drops(config.model, train.seed, step, rank)
            asked = time.perf_counter()
            with heartbeat.alone("no data has come"):
                parts, places = zip(*itertools.islice(batches, train.accumulation), strict=True)
            waited = time.perf_counter() - asked
            taken = take_step(engine, parts, plan, spread, device, target)
            timing = Timing(waited, time.perf_counter() - started, train.global_batch)
            line = skips.after(step + 1, places, taken.own)
            scalars = {"lr": lr, "grad_norm": engine.get_global_grad_norm(), "skipped": skips.total}
            log.step(step, taken.losses, scalars, timing, places)
            evaluations.after(step + 1, lambda: whole_model(engine, launch, device), log.say)
            if line:
                log.say(line)
            found_bad, late = inputs.budget.found_bad(), rank == 0 and saver.is_late()
            stop, found_bad, late, unwritten = control.sums(request.asked, found_bad, late, bool(log.failure))
            inputs.budget.check(found_bad)
            log.check(unwritten)
            last = step + 1 == inputs.total_steps
            if saver.is_due(step + 1) or late or stop or last:
                log.flush()
                saver.save(step + 1, say=log.say, must=bool(stop) or last)
            if stop and not last:
                log.close()
                raise StopRun(f"stopped on request after step {step + 1}; --resume goes on from there", EXIT_SAVED)
        log.close()
        with together():
            if request.asked:
                raise StopRun(FINISHED, EXIT_SAVED)
        request.finish(FINISHED)
        with together():
            if rank == 0:
                export(run_dir, run_dir / "model")
                if train.ema is not None:
                    export(run_dir, run_dir / "model_ema", ema=True)
        if line := inputs.budget.left_out():
            log.say(line)
        evaluate_at_end(engine, launch, inputs, device, group)
    heartbeat.close()
    dist.destroy_process_group()
    request.close()
    del held


def start_line(launch: Launch, model, inputs, world: int, chosen, anew: list[str]) -> str:
    """What is about to run, for a person."""
    from train.checkpoints import told

    config = launch.config
    count = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    train, data, given = config.train, config.data, config.pretrained
    origin = config.init or ", ".join(name for name in (given.vision, given.text) if name is not None)
    lines = [
        f"{f'resuming at step {chosen.step}' if chosen else 'starting'}: {config.preset}, "
        f"{count / 1e6:.1f} M parameters, ZeRO {launch.stage}, {world} rank(s), {train.precision}, "
        f"batch {_batch(train)} x {train.accumulation} x {world}, {inputs.total_steps} steps",
        f"data: {data.train}, {len(inputs.train)} samples, {len(inputs.val)} held out; run folder: {launch.run_dir}",
        *([f"weights: {origin}; anew: {', '.join(anew) or 'nothing'}"] if origin and not chosen else []),
        *launch.notes,
        *([f"damaged checkpoints passed over: {told(chosen.damaged)}"] if chosen and chosen.damaged else []),
        *filter(None, (inputs.train.skipped.line(), inputs.val.skipped.line())),
    ]
    return "\n".join(lines)


def _batch(train) -> str:
    return f"({train.micro_batch} + {train.region_batch} with boxes)" if train.region_batch else str(train.micro_batch)


def evaluate_at_end(engine, launch: Launch, inputs, device, group) -> None:
    """Held-out figures into eval.json, the picture into overview.png, both summed up on the terminal."""
    import json

    import torch.distributed as dist

    from sycoca.visualize import save_overview
    from train.data import readable
    from train.evaluation_run import evaluate, summary_lines

    model = whole_model(engine, launch, device).eval()
    image_size = launch.config.model.vision.image_size
    writes = dist.get_rank() == 0
    try:
        figures = evaluate(model, **judging(launch, inputs, device, group))
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


def judging(launch: Launch, inputs, device, group) -> dict:
    """What a model of this run is judged on, as `train.evaluation_run.evaluate` takes it."""
    return {
        "tokenizer": inputs.tokenizer,
        "dataset": inputs.val,
        "image_size": launch.config.model.vision.image_size,
        "pairs": launch.config.data.val_pairs,
        "device": device,
        "group": group,
        "train": launch.regions,
    }


def whole_model(engine, launch: Launch, device):
    """The trained model on every rank, outside ZeRO: under stage 3 a copy, else the engine's own. All ranks call it."""
    import deepspeed

    from sycoca.xvlm import build_model

    if not engine.zero_optimization_partition_weights():
        return engine.module
    # A rank that runs the partitioned model alone would wait for the others in every layer.
    copy = build_model(launch.config.model).to(device)
    for (_, target), (_, source) in zip(copy.named_parameters(), engine.module.named_parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([source]):
            target.data.copy_(source.data)
    return copy


def main() -> int:
    try:
        launch = parse(sys.argv[1:], script=Path(__file__).resolve(), has_cuda=has_cuda())
    except (ConfigError, DataError, OSError) as error:
        return refused(error)
    return guarded(pretrain, launch)


if __name__ == "__main__":
    sys.exit(main())
