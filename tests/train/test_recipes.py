"""Recipes: every one is complete, says what it does, and trains on eight synthetic samples once it is made small."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import torch

from sycoca.config import ConfigError
from sycoca.masking import step_plan
from sycoca.mlm import mask_words
from sycoca.model import Batch
from sycoca.tokenizer import Tokenizer
from sycoca.xvlm import XBatch, build_model
from train.command_line import apply_overrides
from train.config import PRESETS
from train.data import batches, open_dataset
from train.data.region_batches import region_batches
from train.launch import parse
from train.recipe import chosen, read, recipes

SCRIPT = Path(__file__).parents[2] / "train" / "pretrain.py"
SMALL = {
    "model.embed_dim": 16,
    "model.vision.width": 32,
    "model.vision.heads": 2,
    "model.vision.depth": 1,
    "model.text.width": 32,
    "model.text.heads": 2,
    "model.text.depth": 1,
    "model.caption_decoder.depth": 1,
    "model.caption_decoder.heads": 2,
    "model.image_decoder.depth": 1,
    "model.image_decoder.width": 32,
    "model.image_decoder.heads": 2,
    "model.masking.local_group": 4,
}
SMALL_FUSED = {"model.vision.local_depth": 1, "model.fusion.depth": 1, "model.fusion.heads": 2}


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_says_what_it_does(name):
    text = recipes()[name].read_text(encoding="utf-8")
    head = text[: text.index("\n\n")]
    for words in ("# Command: ", "# Data: ", "# Hardware: ", "# Expected time: ", "# Expected result: "):
        assert words in head
    assert "unmeasured" in head or "train/log.md" in head
    command = shlex.split(re.search(r"# Command: +(.*)", head)[1])
    assert command[0] == "deepspeed" and command[command.index("--preset") + 1] == name
    # The command as it stands, but for the data.
    begin = command.index("train/pretrain.py") + 1
    arguments = [
        "scenes" if before == "--data" else re.sub("^data.regions=.*", "data.regions=scenes", word)
        for before, word in zip(command[begin - 1 :], command[begin:])
    ]
    launch = parse(arguments, script=SCRIPT, has_cuda=False)
    assert launch.config.preset == name and launch.run_dir.name.startswith(name)
    ranks = int(command[command.index("--num_gpus") + 1]) if "--num_gpus" in command else 1
    if found := re.search(r"global batch (\d+) x (\d+) = (\d+)", head):
        assert int(found[1]) == ranks and launch.config.train.micro_batch == int(found[2])
        assert ranks * launch.config.train.micro_batch == int(found[3])


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_learns_on_eight_synthetic_samples(name):
    config = chosen(name, False)
    fused = config.model.fusion is not None
    config = apply_overrides(config, SMALL | SMALL_FUSED if fused else SMALL)
    source = open_dataset("scenes?count=8&fresh=false", image_size=config.model.vision.image_size)
    text = dataclasses.replace(config.model.text, vocab_size=320, pad_id=0, sot_id=1, eot_id=2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
    tokenizer = (Tokenizer.train_wordpiece if fused else Tokenizer.train)(source.texts(), text.vocab_size)
    form = {"image_size": config.model.vision.image_size, "context_length": text.context_length}
    loader = batches(source, tokenizer, global_batch=8, crop_scale=config.data.crop_scale, **form)
    regions = None
    if fused:
        how = {name: getattr(config.data, name) for name in ("max_regions", "whole_share", "flip")}
        how |= {"grid": config.model.vision.grid, "crop": config.data.region_crop}
        regions = region_batches(source, tokenizer, elements=8, **how, **form)
    torch.manual_seed(0)
    model = build_model(config.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    totals = []
    for step in range(5):
        batch = Batch(*next(loader)[:4])
        if regions is not None:
            boxes = next(regions).regions
            hidden = [
                mask_words(part.tokens, part.seeds, tokenizer.continues(), text, config.model.words)
                for part in (batch, boxes)
            ]
            batch = XBatch(batch, boxes, *hidden)
        losses = model(batch, step_plan(config.model, 90 + step, 100, 0), None, [8])
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        totals.append(losses.total.item())
    assert all(loss == loss for loss in totals) and totals[-1] < totals[0]
    assert (losses.tgmim > 0) == name.startswith("sycoca")
    if fused:
        assert min(losses.l1, losses.giou) > 0
        for name in ("itc", "itm", "mlm"):
            terms = [getattr(losses, term) > 0 for term in (name, f"region_{name}")]
            assert terms == [config.model.learns(name)] * 2, name


def test_baselines_differ_only_in_what_makes_them_baselines():
    for data in ("cc3m", "cc12m"):
        ours, theirs = chosen(f"sycoca_{data}", True), chosen(f"coca_{data}", True)
        assert (ours.train, ours.optimizer, ours.schedule) == (theirs.train, theirs.optimizer, theirs.schedule)
        assert ours.model.selects and not theirs.model.selects
        assert ours.model.vision == theirs.model.vision and ours.model.text == theirs.model.text
        assert (ours.train.epochs, ours.train.steps) == (20, None)


WRONG = {
    'base = "coca_bas"': "did you mean 'coca_base'?",
    "": "base is None; known: tiny",
    'base = "tiny"\n[train]\nepoch = 3': "epoch",
    'base = "tiny"\n[train]\nepochs = "three"': "epochs",
    'base = "tiny"\n[train': "not TOML",
    'base = "tiny"\n[data]\nworkers = -1': "workers: -1, needs at least 0",
}


@pytest.mark.parametrize("text, message", WRONG.items())
def test_a_wrong_recipe_is_told_in_one_line(text, message, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        chosen(str(path), False)
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_names_of_recipes(tmp_path):
    assert chosen(None, False) == PRESETS["tiny"]
    with pytest.raises(ConfigError, match="did you mean 'sycoca_cc3m'"):
        chosen("sycoca_cc3", False)
    with pytest.raises(ConfigError, match="No such file"):
        chosen("mine.toml", False)
    path = tmp_path / "mine.toml"
    path.write_text('base = "small"\n[train]\nsteps = 7\n')
    config = read(path)
    assert (config.preset, config.train.steps, config.train.epochs) == ("mine", 7, None)
    assert config.model == PRESETS["small"].model
