"""One training step again and again, in a process of its own: a line in, a step, its time in ms out.

Run by path with the checkout that is measured as an argument, so that an older one meets the same measurement. It uses
only names that have not changed since the first step was measured.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import sys
import time
import types
from dataclasses import replace
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", required=True)
    parser.add_argument("--contestant", choices=["sycoca", "coca", "open_clip"], required=True)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--tokens", required=True, help="torch file of (B, T) int64")
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--recompute", action="store_true")
    options = parser.parse_args()
    sys.path[0] = options.root

    import torch

    device = torch.device(options.device)
    if device.type == "cpu":
        from train.engine import keep_freed_memory

        keep_freed_memory()
        torch.set_num_threads(options.threads)
    tokens = torch.load(options.tokens)
    torch.manual_seed(0)
    before = held_mib(device)
    make = open_clip_step if options.contestant == "open_clip" else our_step
    step = make(options, tokens, device)
    answers = sys.stdout
    for line in sys.stdin:
        if line.strip() == "step":
            started = time.perf_counter()
            loss = step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            answer = {"ms": (time.perf_counter() - started) * 1e3, "loss": loss.item()}
        elif line.strip() == "kinds":
            answer = kinds(step, device)
        elif line.strip() == "flops":
            answer = {"flops": flops(step)}
        elif line.strip() == "phases":
            answer = {"phases": phases(step, device), "parts": parts(step, device)}
        else:
            answer = {"peak_mib": peak_mib(device) - before}
        print(json.dumps(answer), file=answers, flush=True)


def our_step(options, tokens, device):
    """Forward, backward, clipping and optimizer of SyCoCa, or of CoCa of the same size."""
    import torch

    from sycoca.model import Batch, StepPlan, SyCoCa, parameter_groups
    from sycoca.presets import MODEL_PRESETS
    from train.config import PRESETS
    from train.optim import build_optimizer

    config = MODEL_PRESETS[options.preset]
    if options.contestant == "coca":
        masking, loss = replace(config.masking, drop_ratio=0.0), replace(config.loss, tgmim_weight=0.0)
        config = replace(config, masking=masking, loss=loss)
    if options.recompute:
        config = replace(config, gradient_checkpointing=True)
    model = SyCoCa(config).to(device)
    optimizer = build_optimizer(parameter_groups(model, 0.1), PRESETS[options.preset].optimizer)
    B, side = len(tokens), config.vision.image_size
    images = torch.randn(B, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    batch = Batch(images, tokens.to(device), torch.arange(B, device=device), None)
    plan = StepPlan(config.selects, config.num_dropped > 0)

    return a_step(model, optimizer, lambda: model(batch, plan).total, device)


def a_step(model, optimizer, forward, device):
    """A function that takes one step and returns its loss; `mark` is told the end of each phase."""
    import torch

    def step(mark=lambda phase: None):
        optimizer.zero_grad()
        with mixed(device):
            loss = forward()
        mark("forward")
        loss.backward()
        mark("backward")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        mark("clipping")
        optimizer.step()
        mark("optimizer")
        return loss.detach()

    step.model = model
    return step


def open_clip_step(options, tokens, device):
    """The same of open_clip's CoCa with our sizes, our optimizer and its own loss; its decoder sees every patch."""
    import torch

    from sycoca.presets import MODEL_PRESETS

    # Its package imports torchvision, which has no build for every torch; the model itself needs one unused name.
    package = types.ModuleType("open_clip")
    package.__path__ = list(importlib.util.find_spec("open_clip").submodule_search_locations)
    sys.modules["open_clip"] = package
    if importlib.util.find_spec("torchvision") is None:
        misc = types.ModuleType("torchvision.ops.misc")
        misc.FrozenBatchNorm2d = torch.nn.BatchNorm2d
        for name in ("torchvision", "torchvision.ops"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules[misc.__name__] = misc
        # It would look for a torchvision that it could use.
        sys.modules["transformers"] = None
    from open_clip.coca_model import CoCa
    from open_clip.loss import CoCaLoss

    config = MODEL_PRESETS[options.preset]
    vision, text = config.vision, config.text
    words = {"context_length": text.context_length, "vocab_size": text.vocab_size, "width": text.width}
    words |= {"heads": text.heads, "layers": text.depth, "pad_id": text.pad_id}
    model = CoCa(
        embed_dim=config.embed_dim,
        vision_cfg={
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.width,
            "layers": vision.depth,
            "head_width": vision.width // vision.heads,
            "output_tokens": True,
        },
        text_cfg={**words, "embed_cls": True, "output_tokens": True},
        multimodal_cfg={**words, "layers": config.caption_decoder.depth, "heads": config.caption_decoder.heads},
    ).to(device)
    criterion = CoCaLoss(config.loss.caption_weight, config.loss.itc_weight, pad_id=text.pad_id)
    if options.recompute:
        model.set_grad_checkpointing(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6, fused=True)
    B, side = len(tokens), vision.image_size
    images = torch.randn(B, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    tokens = tokens.to(device)

    def forward():
        out = model(images, tokens)
        return sum(criterion(**{k: out[k] for k in OPEN_CLIP_OUTPUTS}))

    return a_step(model, optimizer, forward, device)


OPEN_CLIP_OUTPUTS = ("image_features", "text_features", "logits", "labels", "logit_scale")
KINDS = {
    "matrix products": ("mm", "bmm", "baddbmm", "linear", "gemm"),
    "GELU": ("gelu",),
    "norms": ("layer_norm", "rms_norm"),
    "softmax and attention": ("softmax", "attention", "flash"),
    "optimizer and clipping": ("adam", "lerp_", "sqrt", "linalg_vector_norm", "foreach", "addcdiv", "addcmul"),
    "copies": ("copy_", "cat", "index_select", "stack", "memcpy", "fill_", "zero_"),
    "sums": ("sum", "mean"),
}


def kinds(step, device) -> dict[str, float]:
    """Share of a step's time by kind of operator, and the rest."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        step()
    times: dict[str, float] = {}
    for event in profiled.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        name = event.key.lower()
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "rest")
        times[kind] = times.get(kind, 0.0) + spent
    whole = sum(times.values())
    return {kind: round(spent / whole, 4) for kind, spent in sorted(times.items(), key=lambda pair: -pair[1])}


def phases(step, device) -> dict[str, float]:
    """Share of a step's time by phase."""
    import torch

    ends = [("", time.perf_counter())]

    def mark(phase: str) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        ends.append((phase, time.perf_counter()))

    step(mark)
    whole = ends[-1][1] - ends[0][1]
    return {phase: round((end - start) / whole, 4) for (_, start), (phase, end) in itertools.pairwise(ends)}


# What else than `forward` is called from outside a part.
ENTRIES = {"forward": "", "encode_visible": ", second pass"}


def parts(step, device) -> dict[str, float]:
    """Share of a step's forward pass by part of the model; what no part does is the losses'."""
    import torch

    spent: dict[str, float] = {}

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(part: str, function):
        def run(*args, **kwargs):
            start = clock()
            result = function(*args, **kwargs)
            spent[part] = spent.get(part, 0.0) + clock() - start
            return result

        return run

    wrapped = []
    for name, child in step.model.named_children():
        for entry, suffix in ENTRIES.items():
            if hasattr(child, entry):
                setattr(child, entry, timed(name + suffix, getattr(child, entry)))
                wrapped.append((child, entry))
    started, ended = clock(), []
    step(lambda phase: ended.append(clock()))
    for child, entry in wrapped:
        delattr(child, entry)
    whole = ended[0] - started
    spent["losses and the rest"] = whole - sum(spent.values())
    return {part: round(ms / whole, 4) for part, ms in sorted(spent.items(), key=lambda pair: -pair[1])}


def flops(step) -> int:
    """FLOPs of the operators that torch counts, on padded captions and plain MLPs: what the model asks for."""
    from torch.utils.flop_counter import FlopCounterMode

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            from unittest.mock import patch

            from sycoca import cpu_attention, fused_mlp
            from sycoca.packing import Packing

            stack.enter_context(patch.object(Packing, "of", lambda keep: None))
            stack.enter_context(patch.object(fused_mlp, "fits", lambda x, weight: False))
            stack.enter_context(patch.object(cpu_attention, "fits", lambda *args: False))
        counter = stack.enter_context(FlopCounterMode(display=False))
        step()
    return counter.get_total_flops()


def mixed(device):
    """bf16 products where the hardware is fast at them."""
    import torch

    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def held_mib(device) -> float:
    """Memory of this process: the device's, or resident without one."""
    import torch

    return torch.cuda.memory_allocated() / 2**20 if device.type == "cuda" else _status_mib("VmRSS")


def peak_mib(device) -> float:
    """Its peak so far."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else _status_mib("VmHWM")


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


if __name__ == "__main__":
    main()
