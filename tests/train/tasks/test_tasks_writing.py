"""X-VLM taught to write captions: from its first step to a model that every task of a captioner takes."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sycoca.config import ConfigError
from sycoca.generate import generate, generate_tokens, opening
from sycoca.tokenizer import Tokenizer
from sycoca.xvlm import XVLM
from tests.ranks import run_ranks
from tests.sycoca.micro import uniform
from tests.train.tasks.test_tasks_fused import CONFIG, CPU, FEW, SIZE
from tests.train.tasks.tuned import tuning_of
from train.config import PRESETS
from train.data import open_dataset
from train.initial import started_from
from train.tasks.cider import CiderD
from train.tasks.facts import model_settings
from train.tasks.judge import judge
from train.tasks.launch import defaults
from train.tasks.likelihood import text_labels
from train.tasks.objectives import Writing
from train.tasks.options import check_answering, check_objectives
from train.tasks.rows import CaptionRows, ReferenceRows
from train.tasks.scst import SelfCritical
from train.tasks.sources import open_source
from train.tasks.start import able_to_write, starting_model
from train.tasks.tuning import build_objective, training_groups, tuning_batches

SAID = ["a red star", "a blue ring below a green square", "green", "a small red heart"]
T = CONFIG.text.context_length


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_wordpiece(open_dataset("scenes").texts(200), 300)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return able_to_write(XVLM(CONFIG))


def rows(tokenizer, captions, per_image=1):
    return tokenizer.ended().encode(captions, T).view(-1, per_image, T)


def test_a_text_that_is_written_ends(tokenizer):
    assert tokenizer.ended().ended().encode(["a red star"], 8).tolist()[0].count(tokenizer.eot_id) == 1
    assert tokenizer.eot_id not in tokenizer.encode(["a red star"], 8)
    # A caption that does not fit keeps its end; the words are those of the texts that are matched.
    ending = CaptionRows(tokenizer.ended(), 1).encode(['["a red star"]', '["%s"]' % ("red " * 50)], 8)
    assert ending[1, 0, -1] == tokenizer.eot_id
    assert ending[0, 0, :4].tolist() == tokenizer.encode(["a red star"], 8)[0, :4].tolist()


def test_four_images_are_learned_by_heart(model, tokenizer):
    """Behind a prompt, which is neither counted nor shown."""
    torch.manual_seed(0)
    model, images = able_to_write(model, prompt=" there  is"), uniform(4, 3, SIZE, SIZE, salt=5)
    before = opening(model, tokenizer)
    assert tokenizer.decode([before]) == ["there is"] and len(before) < 5
    objective = Writing(model, len(before)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    said = [f'["{caption}"]' for caption in SAID]
    tokens = CaptionRows(tokenizer.ended(), 1, model.config.text.prompt).encode(said, T)
    assert tokens[:, 0, 1 : 1 + len(before)].tolist() == [before] * 4
    for _ in range(120):
        loss, _ = objective(*objective.inputs(images, tokens, None, 0), None, [4])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # What smoothing leaves over is 0.9.
        if loss < 1.0:
            break
    model.eval()
    # Of the prompt nothing was learned but what follows it.
    assert generate_tokens(model, model.encode_image(images)).tokens[0, 0, 1 : 1 + len(before)].tolist() != before
    assert generate(model, tokenizer, images) == SAID
    assert generate(model, tokenizer, images[[2, 0]], num_beams=3) == [SAID[2], SAID[0]]
    assert generate(model, tokenizer, images[1:2], prompt="a blue") == SAID[1:2]
    drawn = SelfCritical(model, tokenizer, CiderD([[("a",)]]), samples=2, temperature=1.0, baseline="others")
    references = ReferenceRows().encode(said, T)
    _, taken, (rewards, _) = drawn.inputs(images, references, None, 1)
    assert taken[:, 1 : 1 + len(before)].tolist() == [before] * 8 and rewards.shape == (4, 2)


def test_ranks_share_one_mean_over_all_words(model, tokenizer):
    """The mean over two ranks of losses and gradients is that of one process, however unequal their captions."""
    images = uniform(4, 3, SIZE, SIZE, salt=6)
    tokens = rows(tokenizer, [*SAID[:2], *SAID[2:], "a", "red", "a blue star in the middle", "green green"], 2)

    def found(part, group=None):
        own = deepcopy(model).train()
        loss, _ = Writing(own)(images[part], tokens[part], None, group, [4])
        loss.backward()
        return loss.item(), {name: p.grad for name, p in own.named_parameters() if p.grad is not None}

    labels = text_labels(tokens.flatten(0, 1), torch.ones(8, dtype=torch.int64), tokenizer.eot_id)
    assert len((labels >= 0).sum(1).unique()) > 3
    loss, gradient = found(slice(0, 4))
    parts = run_ranks(lambda rank, _: found(slice(rank, 4) if rank else slice(0, 1), dist.group.WORLD), 2)
    assert sum(part[0] for part in parts) / 2 == pytest.approx(loss, rel=1e-5)
    assert {name for part in parts for name in part[1]} == gradient.keys()
    for name, truth in gradient.items():
        mean = sum(part[1][name] for part in parts) / 2
        assert (mean - truth).norm() <= 1e-4 * truth.norm() + 1e-7, name


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("captioning", {"captions": 3}),
        ("captioning", {"scst": True, "samples": 2}),
        ("captioning", {"scst": True, "samples": 1, "baseline": "greedy"}),
        ("vqa", {"vqa": "generate"}),
    ],
)
def test_a_step_of_every_way_to_learn_it(model, tokenizer, task, changes):
    tuning = tuning_of(task, changes, SIZE)
    plan = build_objective(tuning, deepcopy(model), tokenizer, CPU)
    training_groups(plan.objective, tuning.config)
    batch, _ = next(tuning_batches(tuning, plan, 0, rank=0, world=1, device=CPU))
    values = plan.objective(*plan.objective.inputs(*batch, 5), None, [4])
    values[0].backward()
    moved = {name.split(".")[1] for name, p in plan.objective.named_parameters() if p.grad is not None and p.grad.any()}
    # Rewards of an untrained model are all alike, or nearly so; cross-entropy moves all that writes.
    assert torch.isfinite(values[0]) and ("scst" in changes or moved >= {"vision", "text", "fusion", "word_head"})
    assert not moved & {"itm_head", "box_head", "text_projection"}


@pytest.mark.parametrize("task", ["captioning", "pairs", "vqa"])
def test_it_is_judged_as_any_captioner(model, tokenizer, task):
    options = replace(FEW, limit=2, beams=2, min_length=8, max_length=8, ranked=2)
    source = open_source(task, "scenes", "val", image_size=SIZE)
    found = judge(task, model.eval(), tokenizer, source, options=options, device=CPU).outcome
    assert {"captioning": "CIDEr-D", "vqa": "accuracy"}.get(task, "right by likelihood") in found.headline


def test_who_may_write_and_who_may_be_taught(model, tokenizer, tmp_path):
    settings = {}
    causal = replace(CONFIG, text=replace(CONFIG.text, kind="causal"))
    for name, made in (("taught", model), ("matches", XVLM(CONFIG)), ("causal", XVLM(causal))):
        made.save_pretrained(tmp_path / name, tokenizer=tokenizer)
        settings[name] = model_settings(tmp_path / name)
    assert [s["teachable"] for s in settings.values()] == [True, True, False]
    for task in ("captioning", "choice", "vqa"):
        check_objectives(task, settings["taught"], "m")
    check_objectives("captioning", settings["matches"], "m", teaches=True)
    check_answering("generate", settings["taught"]["learned"], "m")
    taught = (
        r"needs a model trained with the objective 'ic'; it has itc, itm, bbox; train/finetune.py captioning teaches"
    )
    for task in ("captioning", "choice"):
        with pytest.raises(ConfigError, match=taught):
            check_objectives(task, settings["matches"], "m")
    with pytest.raises(ConfigError, match=r"it has itc, itm, bbox$"):
        check_objectives("captioning", settings["causal"], "m", teaches=True)


def test_a_prompt_leaves_room_for_captions(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "taught", tokenizer=tokenizer)
    config = defaults("captioning", str(tmp_path / "taught"), has_cuda=False)
    asked = replace(config, options=replace(config.options, prompt="a red star " * 8))
    with pytest.raises(ConfigError, match=r"leaves no room for a caption within 24 tokens"):
        starting_model(asked, CPU)
    found, _ = starting_model(replace(config, options=replace(config.options, prompt="a picture of")), CPU)
    found.save_pretrained(tmp_path / "prompted", tokenizer=tokenizer)
    again, _ = starting_model(replace(config, model=str(tmp_path / "prompted")), CPU)
    assert again.config == found.config and again.config.text.prompt == "a picture of"
    # Pre-training that starts from it goes on to write.
    assert started_from(PRESETS["xvlm_tiny"], str(tmp_path / "prompted")).model.text == found.config.text


def test_pre_training_does_not_claim_it_untaught(tmp_path):
    from train.launch import parse

    script = Path(__file__).parents[3] / "train" / "pretrain.py"
    argv = ["--config", "ds_zero2.json", "--preset", "xvlm_tiny", "model.text.writes=true"]
    with pytest.raises(ConfigError, match=r"model.text.writes: train/finetune.py captioning teaches it"):
        parse([*argv, "--run-dir", str(tmp_path / "run")], script=script, has_cuda=False)
