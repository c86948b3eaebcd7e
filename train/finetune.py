"""Fine-tuning of a model for a task under DeepSpeed ZeRO, judged before and after.

deepspeed train/finetune.py retrieval --config ds_zero2.json --model runs/tiny
"""

import contextlib
import json
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
from train.tasks.launch import Tuning, parse

FINISHED = "stopped on request after the last step; --resume judges the tuned model"


def finetune(tuning: Tuning) -> None:
    """Judges the model as it is, trains it to the last step, leaves it in the run's folder and judges it again."""
    from train.engine import compile_blocks, import_deepspeed, quiet_environment, start_process_group

    quiet_environment(has_cuda())
    deepspeed = import_deepspeed()
    import torch
    import torch.distributed as dist

    from train.alike import require_alike
    from train.budget import Budget
    from train.checkpoints import Saver, choose, load_checkpoint, prepare, told
    from train.data.order import mix
    from train.drops import seed_drops
    from train.durable import write_atomically
    from train.health import Control, Skips, Spikes
    from train.heartbeat import Heartbeat
    from train.inputs import hold_run_dir
    from train.metrics import RunLog, Timing
    from train.optim import build_optimizer, learning_rate_factor, set_learning_rate
    from train.signals import StopRequest
    from train.tasks.start import starting_model
    from train.tasks.tuning import build_objective, judge_tuned, judge_untuned, training_groups, tuning_batches
    from train.together import together

    config, train, run_dir = tuning.config, tuning.config.train, tuning.run_dir
    request = StopRequest()
    start_process_group(deepspeed, has_cuda(), train.timeout_s)
    require_alike(tuning)
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD if world > 1 else None
    device = torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")
    held = hold_run_dir(run_dir, anew=tuning.restart)
    with together():
        if rank == 0:
            write_atomically(run_dir / "config.json", json.dumps(tuning.effective(), indent=2) + "\n")

    torch.manual_seed(train.seed)
    with together():
        try:
            model, tokenizer = starting_model(config, device)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    with together():
        if rank == 0 and not tuning.resume:
            judge_untuned(tuning, model, tokenizer, device)
    chosen = choose(run_dir) if tuning.resume else None
    first_step = chosen.step if chosen else 0
    plan = build_objective(tuning, model, tokenizer, device)
    objective = plan.objective.train()
    if train.compile:
        compile_blocks(objective)
    optimizer = build_optimizer(training_groups(objective, config), config.optimizer)
    engine, optimizer, _, _ = deepspeed.initialize(model=objective, optimizer=optimizer, config=tuning.deepspeed)
    prepare(engine)
    if chosen:
        load_checkpoint(engine, run_dir, first_step)

    steps = max(1, train.total_steps(len(tuning.train), world))
    log = RunLog(
        run_dir,
        losses=objective.names,
        names=objective.names,
        total_steps=steps,
        first_step=first_step,
        every=train.log_every,
        group=group,
        spikes=Spikes(train.spike_factor),
    )
    count = sum(getattr(p, "ds_numel", p.numel()) for p in objective.parameters() if p.requires_grad)
    log.say(
        f"{'resuming at step ' + str(first_step) if tuning.resume else 'starting'}: {config.task}, "
        f"{count / 1e6:.1f} M parameters, {world} rank(s), {train.precision}, batch {train.micro_batch} x "
        f"{train.accumulation} x {world}, {steps} steps\n"
        f"data: {config.data.train}, {len(tuning.train)} images, {len(tuning.val)} held out; run folder: {run_dir}"
    )
    if chosen and chosen.damaged:
        log.say(f"damaged checkpoints passed over: {told(chosen.damaged)}")
    heartbeat, control = Heartbeat(train.timeout_s), Control()
    skips, saver = Skips(engine), Saver(engine, run_dir, train, facts={})
    budget = Budget(tuning.train, config.data.max_left_out)
    loading = tuning_batches(tuning, plan, first_step * train.accumulation, rank=rank, world=world, device=device)
    shares = [train.micro_batch] * world
    # Workers that are left to themselves are waited for when the process ends.
    with contextlib.closing(loading) as batches, heartbeat.guard():
        for step in range(first_step, steps):
            seed_drops(model.config, train.seed, step, rank)
            started, waited = time.perf_counter(), 0.0
            lr = config.optimizer.lr * learning_rate_factor(config.schedule, step, steps)
            set_learning_rate(optimizer, lr)
            taken, places = [], []
            for part in range(train.accumulation):
                asked = time.perf_counter()
                with heartbeat.alone("no data has come"):
                    batch, place = next(batches)
                waited += time.perf_counter() - asked
                values = engine(*objective.inputs(*batch, mix(train.seed, step, part, rank) >> 1), group, shares)
                engine.backward(values[0])
                engine.step()
                taken.append(torch.stack([value.detach().float() for value in values]))
                places.append(place)
            timing = Timing(waited, time.perf_counter() - started, sum(shares) * train.accumulation)
            line = skips.after(step + 1, places, taken)
            scalars = {"lr": lr, "grad_norm": engine.get_global_grad_norm(), "skipped": skips.total}
            log.step(step, torch.stack(taken).mean(0), scalars, timing, places)
            if line:
                log.say(line)
            found_bad, late = budget.found_bad(), rank == 0 and saver.is_late()
            stop, found_bad, late, unwritten = control.sums(request.asked, found_bad, late, bool(log.failure))
            budget.check(found_bad)
            log.check(unwritten)
            last = step + 1 == steps
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
        if line := budget.left_out():
            log.say(line)
        if rank == 0:
            judge_tuned(tuning, plan, tokenizer, device, step=steps)
        # The others wait, or the launcher would take their end for a failure.
        heartbeat.close()
    dist.barrier()
    dist.destroy_process_group()
    request.close()
    del held


def main() -> int:
    try:
        tuning = parse(sys.argv[1:], script=Path(__file__).resolve(), has_cuda=has_cuda())
    except (ConfigError, DataError, OSError) as error:
        return refused(error)
    return guarded(finetune, tuning)


if __name__ == "__main__":
    sys.exit(main())
