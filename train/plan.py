"""A run on paper: memory of a rank, bytes over the links and time of a step, from formulas.

    python -m train.plan --gpus 64 --batch 65536 --preset base_16

    sent by a rank   2 (W - 1) / W of what is all-reduced, (W - 1) / W of what is gathered or reduced and scattered
    time             FLOPs over the rate, bytes over the slower of both links; nothing overlaps

Rates are what is assumed, not what was measured. Bytes and multiplications are checked against runs by the tests.
"""

import argparse
import json
import math
import sys
from typing import Any, NamedTuple

from sycoca.config import ConfigError, ModelConfig, nearest
from sycoca.presets import MODEL_PRESETS, PRESET_PARAMETERS
from train.config import PRESETS
from train.plan_work import Work, stem_parameters, work

GB = 1e9
PLANNED = tuple(name for name, config in MODEL_PRESETS.items() if config.fusion is None)


class Cluster(NamedTuple):
    """Machines, and the rates that are assumed of them.

    Attributes:
        gpus, gpus_per_node: ranks in all and on one machine.
        tflops: sustained by one GPU in the products of a step.
        inside_gb_s: sent by one GPU to another of its machine.
        outside_gb_s: sent by one network card; every GPU has one.
    """

    gpus: int
    gpus_per_node: int = 8
    tflops: float = 400.0
    inside_gb_s: float = 450.0
    outside_gb_s: float = 50.0


class Batch(NamedTuple):
    """Pairs of a step, pairs that a rank takes at once, and how often it does."""

    total: int
    micro: int
    parts: int


class Collective(NamedTuple):
    """What the ranks exchange in a step: the bytes of the whole tensors, `times` over."""

    name: str
    kind: str
    payload: float
    times: int = 1

    def sent(self, world: int) -> float:
        """Bytes that a rank sends in a step by a ring."""
        passes = 2 if self.kind == "all_reduce" else 1
        return passes * (world - 1) / world * self.payload * self.times


def batch_of(total: int, micro: int, gpus: int) -> Batch:
    """Raises ConfigError where micro batches and ranks do not divide the batch."""
    micro = min(micro, total // gpus)
    if micro < 1 or total % (micro * gpus):
        raise ConfigError(f"--batch {total} is no multiple of --micro-batch {max(1, micro)} x {gpus} GPU(s)")
    return Batch(total, micro, total // (micro * gpus))


def collectives(
    parameters: int, encoders: int, config: ModelConfig, batch: Batch, world: int, *, stage: int, value_bytes: int
) -> list[Collective]:
    """What a step exchanges.

    Args:
        parameters: in all.
        encoders: of both encoders, which the first of two passes gathers under ZeRO 3.
        config: of the model.
        batch: its parts reduce one by one from stage 2 on.
        world: ranks.
        stage: of ZeRO.
        value_bytes: of features, gradients and gathered weights on the wire.
    """
    found = []
    if stage == 3:
        uses = 2 * parameters + (encoders if batch.parts > 1 else 0)
        found.append(Collective("weights", "all_gather", uses * value_bytes, batch.parts))
        found.append(Collective("gradients", "reduce_scatter", parameters * value_bytes, batch.parts))
    else:
        # DeepSpeed reduces whole buckets on all ranks and keeps its share.
        times = batch.parts if stage == 2 else 1
        found.append(Collective("gradients", "all_reduce", parameters * value_bytes, times))
        if stage:
            found.append(Collective("weights", "all_gather", parameters * 4))
    if stage and config.predicts_features:
        found.append(Collective("averaged image encoder", "all_reduce", image_parameters(config) * 4))
    if config.learns("itc"):
        B, E = batch.total, config.embed_dim
        found.append(Collective("captions' features", "all_gather", B * E * value_bytes))
        found.append(Collective("their gradient", "reduce_scatter", B * E * 4))
        found.append(Collective("sums of the columns", "all_reduce", (2 * B + 1) * 4))
    return found


def memory(
    parameters: int, config: ModelConfig, cost: Work, batch: Batch, world: int, *, stage: int, value_bytes: int
) -> dict[str, float]:
    """Bytes of a rank by what they are for, activations of one micro batch included.

    Args:
        parameters, config, batch, world, stage, value_bytes: as in `collectives`.
        cost: of a pair.
    """
    share = 1 / world
    held = {
        "weights": 4 * parameters * (share if stage == 3 else 1),
        "gradients": 4 * parameters * (share if stage >= 2 else 1),
        "optimizer": 8 * parameters * (share if stage else 1),
        "fp32 copy of ZeRO": 4 * parameters * share if stage else 0.0,
        "weights in bf16": 2 * parameters if value_bytes == 2 else 0.0,
        "activations": cost.kept_bytes * batch.micro,
    }
    if config.predicts_features:
        held["average of the weights"] = 4 * parameters * (share if stage else 1)
        held["averaged image encoder"] = 4 * image_parameters(config)
    local = batch.micro * batch.parts
    if config.learns("itc"):
        # Features of both sides and their gradients, and the captions of all ranks.
        held["features"] = config.embed_dim * (16 * local + (value_bytes + 4) * batch.total)
    if batch.parts > 1:
        held["pictures on the host"] = 3 * config.vision.image_size**2 * local
    return held


def times(
    cost: Work, config: ModelConfig, batch: Batch, cluster: Cluster, exchanged: list[Collective]
) -> dict[str, float]:
    """Seconds of a step by part, one after the other."""
    local, rate = batch.micro * batch.parts, cluster.tflops * 1e12
    found = {}
    if batch.parts > 1 and config.learns("itc"):
        found["first pass"] = local * cost.encoder_flops / rate
    found["forward and backward"] = 3 * local * cost.forward_flops / rate
    if cost.target_flops:
        found["targets"] = local * cost.target_flops / rate
    if config.learns("itc"):
        # Logits twice, two products more.
        found["contrastive products"] = 8 * local * batch.total * config.embed_dim / rate
    for collective in exchanged:
        found[f"{collective.kind}, {collective.name}"] = max(
            seconds for _, seconds in links(collective, cluster).values()
        )
    return found


def links(collective: Collective, cluster: Cluster) -> dict[str, tuple[float, float]]:
    """Bytes and seconds of a step over a GPU's link inside its machine, and over its network card."""
    sent = collective.sent(cluster.gpus)
    inside = sent if cluster.gpus_per_node > 1 else 0.0
    # One ring for each card, and as many cards as GPUs, share what leaves a machine.
    outside = sent / cluster.gpus_per_node if cluster.gpus > cluster.gpus_per_node else 0.0
    return {
        "inside": (inside, inside / (cluster.inside_gb_s * GB)),
        "outside": (outside, outside / (cluster.outside_gb_s * GB)),
    }


def plan(preset: str, total: int, cluster: Cluster, *, micro: int | None, stage: int, bf16: bool) -> dict[str, Any]:
    """Everything that is printed, as plain data.

    Raises:
        ConfigError: an unknown preset, or a batch that does not divide.
    """
    if preset not in PLANNED:
        what = "only SyCoCa and CoCa are planned" if preset in MODEL_PRESETS else f"unknown{nearest(preset, PLANNED)}"
        raise ConfigError(f"--preset {preset}: {what}; known: {', '.join(PLANNED)}")
    config, parameters, value_bytes = MODEL_PRESETS[preset], PRESET_PARAMETERS[preset][0], 2 if bf16 else 4
    batch = batch_of(total, micro or PRESETS[preset].train.micro_batch, cluster.gpus)
    cost = work(config, value_bytes)
    encoders = encoder_parameters(config)
    options = {"stage": stage, "value_bytes": value_bytes}
    exchanged = collectives(parameters, encoders, config, batch, cluster.gpus, **options)
    return {
        "preset": preset,
        "parameters": parameters,
        "cluster": cluster._asdict(),
        "batch": batch._asdict(),
        "stage": stage,
        "bf16": bf16,
        "memory": memory(parameters, config, cost, batch, cluster.gpus, **options),
        "links": {
            f"{one.name} ({one.kind})": {link: sent for link, (sent, _) in links(one, cluster).items()}
            for one in exchanged
        },
        "seconds": times(cost, config, batch, cluster, exchanged),
    }


def encoder_parameters(config: ModelConfig) -> int:
    """Weights of the matrices of both encoders and their tables; norms and biases are left out."""
    text = config.text
    words = text.depth * text.width**2 * (4 + 2 * text.mlp_ratio) + text.vocab_size * text.width
    return image_parameters(config) + int(words)


def image_parameters(config: ModelConfig) -> int:
    """As `encoder_parameters`, of the image encoder alone."""
    vision = config.vision
    return int(vision.depth * vision.width**2 * (4 + 2 * vision.mlp_ratio)) + stem_parameters(vision)


def lines(found: dict[str, Any]) -> list[str]:
    """The plan for people."""
    cluster, batch = Cluster(**found["cluster"]), Batch(**found["batch"])
    nodes = math.ceil(cluster.gpus / cluster.gpus_per_node)
    passes = "two passes" if batch.parts > 1 else "one pass"
    text = [
        f"{found['preset']}, {found['parameters'] / 1e6:.1f} M parameters, ZeRO {found['stage']}, "
        f"{'bf16 products' if found['bf16'] else 'fp32'}",
        f"{cluster.gpus} GPU(s) on {nodes} machine(s); {batch.total} pairs = {batch.micro} x {batch.parts} x "
        f"{cluster.gpus}, {passes}",
        f"assumed: {cluster.tflops:g} TFLOP/s, {cluster.inside_gb_s:g} GB/s inside, {cluster.outside_gb_s:g} GB/s "
        "a network card",
    ]
    text += ["", f"{'memory of a rank':36}{'GB':>10}"]
    text += [f"{name:36}{value / GB:10.3f}" for name, value in found["memory"].items()]
    text += [f"{'in all, on the GPU':36}{on_gpu(found['memory']) / GB:10.3f}"]
    text += ["", f"{'sent by a rank in a step':36}{'GB inside':>10}{'GB outside':>12}"]
    text += [f"{name:36}{v['inside'] / GB:10.3f}{v['outside'] / GB:12.3f}" for name, v in found["links"].items()]
    text += ["", f"{'time of a step, nothing overlapped':36}{'ms':>10}"]
    text += [f"{name:36}{value * 1e3:10.1f}" for name, value in found["seconds"].items()]
    total = sum(found["seconds"].values())
    text += [f"{'in all':36}{total * 1e3:10.1f}", f"{'pairs a second':36}{batch.total / total:10.0f}"]
    return text


def on_gpu(held: dict[str, float]) -> float:
    """Bytes of a rank that lie on its GPU."""
    return sum(value for name, value in held.items() if "host" not in name)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.plan",
        description="Memory, bytes and time of a step, from formulas. Rates are assumptions; nothing is measured.",
        epilog="example: %(prog)s --gpus 64 --batch 65536 --preset base_16",
    )
    assumed = Cluster(1)
    parser.add_argument("--gpus", type=int, required=True, help="ranks in all")
    parser.add_argument("--batch", type=int, required=True, help="pairs of a step, over all ranks")
    parser.add_argument("--preset", default="base_16", help=f"one of {', '.join(PLANNED)}")
    parser.add_argument("--micro-batch", type=int, help="pairs that a rank takes at once; the preset's without it")
    parser.add_argument("--stage", type=int, default=2, choices=range(4), help="of ZeRO")
    parser.add_argument("--fp32", action="store_true", help="products in fp32 rather than bf16")
    parser.add_argument("--gpus-per-node", type=int, default=assumed.gpus_per_node)
    parser.add_argument("--tflops", type=float, default=assumed.tflops, help="assumed of one GPU")
    parser.add_argument("--inside", type=float, default=assumed.inside_gb_s, help="GB/s of a GPU inside its machine")
    parser.add_argument("--outside", type=float, default=assumed.outside_gb_s, help="GB/s of one network card")
    parser.add_argument("--json", action="store_true", help="plain data instead of the table")
    asked = parser.parse_args(arguments)
    try:
        for name in ("gpus", "batch", "gpus_per_node", "tflops", "inside", "outside", "micro_batch"):
            value = getattr(asked, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: needs to be above 0 and finite")
        cluster = Cluster(asked.gpus, asked.gpus_per_node, asked.tflops, asked.inside, asked.outside)
        found = plan(
            asked.preset, asked.batch, cluster, micro=asked.micro_batch, stage=asked.stage, bf16=not asked.fp32
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2) if asked.json else "\n".join(lines(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
