"""The formulas of a plan against what a model does, and the page that shows them against the command."""

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sycoca import cpu_attention, fused_mlp
from sycoca.model import Batch, StepPlan, SyCoCa
from sycoca.packing import Packing
from sycoca.presets import MODEL_PRESETS
from train.plan import Cluster, Collective, batch_of, collectives, links, main, memory, plan, times
from train.plan_work import work

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "plan.md"
B = 4


def config_of(preset="tiny", kind="l1", **masking):
    config = MODEL_PRESETS[preset]
    changed = replace(config.masking, attentive_start=0.0, ic_mask_prob=1.0, local_group=B, **masking)
    return replace(config, masking=changed, loss=replace(config.loss, tgmim_kind=kind))


def full_batch(config):
    """Pairs whose captions have no padding."""
    text, side = config.text, config.vision.image_size
    tokens = torch.full((B, text.context_length), 7)
    tokens[:, 0], tokens[:, -1] = text.sot_id, text.eot_id
    images = torch.randn(B, 3, side, side, generator=torch.Generator().manual_seed(0))
    targets = torch.zeros(B, config.vision.num_patches, config.vision.width)
    return Batch(images, tokens, torch.arange(B), None, targets=targets)


@pytest.mark.parametrize(("masked_input", "kind"), [("drop", "l1"), ("token", "l1"), ("drop", "ema_features")])
def test_multiplications_are_those_that_torch_counts(masked_input, kind):
    config = config_of(masked_input=masked_input, kind=kind)
    # The captioning loss forms the gradients of what asks for them in its forward pass.
    model, batch = SyCoCa(config).requires_grad_(False), full_batch(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(patch.object(Packing, "of", lambda keep: None))
        stack.enter_context(patch.object(fused_mlp, "fits", lambda x, weight: False))
        stack.enter_context(patch.object(cpu_attention, "fits", lambda x: False))
        counter = stack.enter_context(FlopCounterMode(display=False))
        model(batch, StepPlan(True, True))
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as encoders:
            model.encode_text(batch.tokens)
            model.encode_image(batch.images)
        with FlopCounterMode(display=False) as target:
            model.vision(batch.images)
        with FlopCounterMode(display=False) as without:
            model(batch, StepPlan(True, True, reconstruct=False))
    cost = work(config, 4)
    assert B * cost.target_flops == pytest.approx(target.get_total_flops() * (kind == "ema_features"), rel=0.01)
    # A late start leaves TG-MIM out on its share of the steps.
    late = work(config_of(masked_input=masked_input, kind=kind, tgmim_start=0.25), 4)
    assert late.target_flops == 0.75 * cost.target_flops
    assert without.get_total_flops() == pytest.approx(B * (4 * late.forward_flops - 3 * cost.forward_flops), rel=0.02)
    assert encoders.get_total_flops() == pytest.approx(B * cost.encoder_flops, rel=0.01)
    assert forward == pytest.approx(B * cost.forward_flops, rel=0.02)


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_what_backward_keeps_is_what_is_saved_for_it(preset):
    config = config_of(preset)
    model, batch = SyCoCa(config), full_batch(config)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(batch, StepPlan(True, True))
    found = sum(size for size, _ in saved.values())
    assert found == pytest.approx(B * work(config, 4).kept_bytes, rel=0.25)


def test_the_averaged_encoder_is_whole_on_every_rank():
    pixels, features = config_of(), config_of(kind="ema_features")
    cost, batch = work(features, 4), batch_of(64, 32, 2)
    counted = sum(p.numel() for p in SyCoCa(features).vision.parameters() if p.ndim > 1)
    for stage in range(4):
        options = {"stage": stage, "value_bytes": 4}
        before, after = (memory(1000, config, cost, batch, 2, **options) for config in (pixels, features))
        added = {name: value for name, value in after.items() if name not in before}
        assert added["averaged image encoder"] == pytest.approx(4 * counted, rel=0.02)
        assert added["average of the weights"] == 4 * 1000 / (2 if stage else 1) and len(added) == 2
        names = [one.name for one in collectives(1000, 500, features, batch, 2, **options)]
        assert ("averaged image encoder" in names) == (stage > 0)
    assert "targets" in times(cost, features, batch, Cluster(2), [])


def test_bytes_stay_inside_a_machine_until_there_are_several():
    collective = Collective("gradients", "all_reduce", 8e9, 2)
    assert collective.sent(4) == pytest.approx(2 * 3 / 4 * 16e9)
    assert links(collective, Cluster(8))["outside"] == (0.0, 0.0)
    inside, outside = (links(collective, Cluster(16))[link] for link in ("inside", "outside"))
    assert outside[0] == pytest.approx(inside[0] / 8)
    assert inside[1] == pytest.approx(inside[0] / 450e9) and outside[1] == pytest.approx(outside[0] / 50e9)


def test_parts_follow_from_the_batch():
    assert batch_of(65536, 512, 64) == (65536, 512, 2)
    assert batch_of(512, 512, 64) == (512, 8, 1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--gpus 3 --batch 100", "--batch 100 is no multiple"),
        ("--gpus 64 --batch 32", "--batch 32 is no multiple"),
        ("--gpus 0 --batch 32", "--gpus 0"),
        ("--gpus 8 --batch 4096 --preset base_61", "did you mean 'base_16'"),
        ("--gpus 8 --batch 4096 --preset xvlm_base", "only SyCoCa and CoCa are planned"),
        ("--gpus 8 --batch 4096 --micro-batch 0", "--micro-batch 0"),
        ("--gpus 8 --batch 4096 --tflops nan", "--tflops nan"),
    ],
)
def test_mistakes_are_one_line(arguments, named, capsys):
    assert main(arguments.split()) == 2
    told = capsys.readouterr().err
    assert named in told and told.count("\n") == 1


def test_ranks_share_the_states_of_the_optimizer():
    one, two = (plan("base_16", 8192, Cluster(gpus), micro=128, stage=2, bf16=True)["memory"] for gpus in (8, 16))
    for name in ("gradients", "optimizer", "fp32 copy of ZeRO"):
        assert two[name] == one[name] / 2
    assert two["weights"] == one["weights"] and two["activations"] == one["activations"]


def test_the_page_shows_what_the_command_prints():
    shown = re.findall(r"```console\n\$ python -m train\.plan (.*?)\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert [re.search(r"--gpus (\d+)", line)[1] for line, _ in shown] == ["8", "64", "512"]
    for line, text in shown:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert main(line.split()) == 0
        assert text.strip() == printed.getvalue().strip()
