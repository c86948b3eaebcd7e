"""Tasks on a model of a few thousand parameters: figures against brute force, losses against their definition."""

import json
import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sycoca.config import CaptionDecoderConfig, ImageDecoderConfig, ModelConfig, TextConfig, VisionConfig
from sycoca.model import SyCoCa
from sycoca.tokenizer import Tokenizer
from tests.sycoca.micro import uniform
from tests.train.tasks.tuned import tuning_of
from train.data import Source, open_dataset
from train.data.sample import Skipped
from train.tasks.cider import CiderD
from train.tasks.heads import AnswerHead, Head, LabelHead, answer_logits, load_head, save_task
from train.tasks.judge import judge
from train.tasks.likelihood import log_likelihood, prompted
from train.tasks.linear_probe import STRENGTHS, fit_probe
from train.tasks.objectives import AnswerChoosing, AnswerWriting, Contrast, Labelling, Writing
from train.tasks.options import TaskOptions
from train.tasks.outcome import Example, Outcome
from train.tasks.questions import Asked
from train.tasks.report import chosen_examples, terminal_lines, write_results
from train.tasks.rows import AnswerRows, CaptionRows, LabelRows, ReferenceRows, WrittenRows
from train.tasks.scst import SelfCritical
from train.tasks.sources import open_source
from train.tasks.tuning import build_objective, judge_untuned
from train.tasks.vqa import frequent_answers

SIZE = 32
CONFIG = ModelConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=SIZE, patch_size=8, width=16, depth=2, heads=2),
    text=TextConfig(context_length=28, vocab_size=400, width=16, depth=1, heads=2),
    caption_decoder=CaptionDecoderConfig(depth=1, heads=2),
    image_decoder=ImageDecoderConfig(depth=1, width=16, heads=2),
)
CPU = torch.device("cpu")
FEW = TaskOptions(limit=6, batch_size=4, beams=2, max_length=8, probe_limit=40)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(open_dataset("scenes").texts(200), 400)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SyCoCa(CONFIG).eval()


def source(task, split="val"):
    return open_source(task, "scenes", split, image_size=SIZE)


@pytest.fixture(scope="module")
def images():
    return uniform(3, 3, SIZE, SIZE, salt=5)


def test_likelihood_is_the_sum_of_the_log_probabilities_behind_the_prompt(model, tokenizer, images):
    features = model.encode_image(images)
    prompts, texts = ["what color?", "", "is there a red star?"], ["red", "a blue star", "yes"]
    made = prompted(tokenizer, prompts, texts, CONFIG.text.context_length)
    sums, counts = log_likelihood(model, features, torch.arange(3), made)
    for row, (prompt, text) in enumerate(zip(prompts, texts)):
        whole = tokenizer.encode([f"{prompt} {text}"], CONFIG.text.context_length)[0].tolist()
        whole = whole[: whole.index(tokenizer.eot_id) + 1]
        begin = tokenizer.encode([prompt], CONFIG.text.context_length)[0].tolist().index(tokenizer.eot_id)
        assert made.starts[row] == begin and made.tokens[row, : len(whole)].tolist() == whole
        total = 0.0
        for place in range(begin, len(whole)):
            one = features._make(None if f is None else f[row : row + 1] for f in features)
            logits = model.caption_logits(one, torch.tensor([whole[:place]]))[0, -1]
            total += logits.log_softmax(0)[whole[place]].item()
        assert sums[row].item() == pytest.approx(total, abs=1e-4) and counts[row] == len(whole) - begin


def test_a_prompt_that_is_too_long_leaves_room_for_the_text(tokenizer):
    made = prompted(tokenizer, ["red star " * 50], ["a blue star"], 12)
    assert tokenizer.decode(made.tokens[:, made.starts[0] :]) == ["a blue star"]
    assert (made.tokens[0] == tokenizer.eot_id).sum() == 1


def test_retrieval_counts_every_caption(model, tokenizer):
    found = judge("retrieval", model, tokenizer, source("retrieval"), options=FEW, device=CPU).outcome
    samples = [open_dataset("scenes", "val", image_size=SIZE)[i] for i in range(6)]
    from sycoca.images import eval_transform

    with torch.no_grad():
        v = model.encode_image(torch.stack([eval_transform(s.image, SIZE) for s in samples])).features.double()
        texts = [c for s in samples for c in s.captions]
        t = model.encode_text(tokenizer.encode(texts, CONFIG.text.context_length)).features.double()
    scores = (v @ t.T).float()
    owner = torch.arange(30) // 5
    hits = [owner[scores[i].argsort(descending=True)[:5]].eq(i).any().item() for i in range(6)]
    assert found.figures["image_to_text"]["r@5"] == pytest.approx(sum(hits) / 6)
    back = [scores[:, j].argsort(descending=True)[:1].eq(owner[j]).any().item() for j in range(30)]
    assert found.figures["text_to_image"]["r@1"] == pytest.approx(sum(back) / 30)
    assert found.figures["mTR"] == pytest.approx(sum(found.figures["image_to_text"].values()) / 3)
    assert len(found.examples) == 6


def test_an_unusable_source_is_said(model, tokenizer):
    from train.data.sample import BadSample

    class Broken(Source):
        name, skipped = "broken", Skipped()

        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise BadSample("missing image", str(index))

    with pytest.raises(ValueError, match="2 x missing image"):
        judge("captioning", model, tokenizer, Broken(), options=FEW, device=CPU)


def test_captioning_counts_empty_captions(model, tokenizer):
    options = TaskOptions(limit=4, beams=1, max_length=1)
    found = judge("captioning", model, tokenizer, source("captioning"), options=options, device=CPU)
    assert found.skipped.counts()["empty caption written"] == 4
    assert found.outcome.figures["CIDEr-D"] == 0 and len(found.outcome.figures["captions"]) == 4


@pytest.mark.parametrize("task", ["choice", "pairs", "captioning", "zeroshot"])
def test_every_task_runs_on_scenes(model, tokenizer, task, tmp_path):
    opened = source(task)
    found = judge(task, model, tokenizer, opened, options=FEW, device=CPU).outcome
    assert found.examples and all(0 <= value <= 10 for value in found.headline.values())
    write_results(tmp_path, task, found, {"model": "m", "data": "scenes"}, opened, 1)
    page = (tmp_path / f"{task}.html").read_text()
    assert page.count("data:image/") >= 1 and "best" in page
    assert json.loads((tmp_path / f"{task}.json").read_text())["task"] == task
    assert terminal_lines(found)


def test_vqa_answers_in_three_ways(model, tokenizer):
    opened = source("vqa")
    names = frequent_answers(source("vqa", "train"), 10)
    assert names[0] in ("yes", "no") and len(names) == 10
    torch.manual_seed(1)
    head = Head(AnswerHead(16, 10).eval(), names)
    found = {}
    for method in ("classify", "generate", "rank"):
        judged = judge("vqa", model, tokenizer, opened, options=FEW, device=CPU, method=method, head=head, train=opened)
        assert judged.outcome.figures.get("candidates from") == ("scenes, val" if method == "rank" else None)
        found[method] = judged.outcome
        answers = judged.outcome.figures["answers"]
        assert len(answers) == judged.outcome.figures["questions"] and {*answers[0]} == {"question_id", "answer"}
    assert all(entry["answer"] in names for entry in found["classify"].figures["answers"])
    assert any("none of the classifier's" in cause for cause in opened.skipped.counts())


def test_questions_without_answers_leave_nothing_to_rank(model, tokenizer):
    class Unanswered(Source):
        name, skipped = "unanswered", Skipped()

        def __len__(self):
            return 1

        def asked(self, index):
            return (Asked("what is it?", (), "unknown", "7"),)

        def image(self, index):
            return source("vqa").image(index)

    with pytest.raises(ValueError, match="no answers to rank; give vqa=generate"):
        judge("vqa", model, tokenizer, Unanswered(), options=FEW, device=CPU, method="rank")
    found = judge("vqa", model, tokenizer, Unanswered(), options=FEW, device=CPU, method="generate").outcome
    assert found.figures["answers"][0]["question_id"] == 7 and not found.headline


def test_zero_shot_equals_brute_force(model, tokenizer):
    model = deepcopy(model)
    # Untrained, the names of the classes lie so close together that rounding would choose among them.
    model.text.sequence.tokens.weight.data.mul_(50)
    opened, few = source("zeroshot"), TaskOptions(limit=20, batch_size=7)
    found = judge("zeroshot", model, tokenizer, opened, options=few, device=CPU).outcome
    from sycoca.images import eval_transform
    from train.tasks.class_names import templates

    sentences = templates(None, opened.classes)
    with torch.no_grad():
        weights = []
        for name in opened.classes:
            t = model.encode_text(tokenizer.encode([s.replace("{}", name) for s in sentences], 28)).features
            weights.append(F.normalize(t.mean(0), dim=0))
        v = model.encode_image(torch.stack([eval_transform(opened.image(i)[0], SIZE) for i in range(20)])).features
        top = (v @ torch.stack(weights).T).topk(5, dim=1).indices
    labels = torch.tensor([opened.label(i) for i in range(20)])
    assert found.figures["top-1"] == pytest.approx((top[:, 0] == labels).double().mean().item())
    assert found.figures["top-5"] == pytest.approx((top == labels[:, None]).any(1).double().mean().item())


def test_probe_is_the_minimum_and_chooses_its_regularisation():
    torch.manual_seed(0)
    centres = torch.randn(3, 6)
    labels = torch.arange(300) % 3
    features = centres[labels] + 0.7 * torch.randn(300, 6)
    probe = fit_probe(features, labels, 3)
    assert probe.tried.keys() == {f"{s:g}" for s in STRENGTHS}
    assert probe.tried[f"{probe.strength:g}"] == max(probe.tried.values())
    weight, bias = probe.weight.double().requires_grad_(), probe.bias.double().requires_grad_()
    z = ((features - probe.mean) / probe.std).double()
    loss = F.cross_entropy(z @ weight.T + bias, labels) + probe.strength / 2 * weight.square().sum()
    loss.backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-4
    assert (probe.logits(features).argmax(1) == labels).double().mean() > 0.9


def test_probe_runs_on_scenes(model, tokenizer):
    opened, few = source("probe"), TaskOptions(limit=10, probe_limit=30)
    found = judge("probe", model, tokenizer, opened, options=few, device=CPU, train=source("probe", "train")).outcome
    assert found.figures["training images"] == 30 and found.figures["images"] == 10


SHARES = [3]


def rows_of_captions(tokenizer, said, captions):
    return CaptionRows(tokenizer, captions).encode([json.dumps(texts) for texts in said], 28)


def test_contrast_is_symmetric_cross_entropy(model, tokenizer, images):
    rows = rows_of_captions(tokenizer, [["a red star"], ["a blue ring"], ["two squares"]], 1)
    loss, _ = Contrast(model)(images, rows, None, None, SHARES)
    v, t = model.encode_image(images).features, model.encode_text(rows[:, 0]).features
    logits, own = model.logit_scale() * v @ t.T, torch.arange(3)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_all_captions_of_an_image_are_its_positives(model, tokenizer, images):
    said = [["a red star", "one star"], ["a blue ring", "ring"], ["two squares"]]
    rows = rows_of_captions(tokenizer, said, 2)
    assert rows.shape[:2] == (3, 2) and torch.equal(rows[2, 0], rows[2, 1])
    model.zero_grad()
    loss, _ = Contrast(model)(images, rows, None, None, SHARES)
    loss.backward()
    gradient = model.image_projection.weight.grad.clone()
    model.zero_grad()
    v, t = model.encode_image(images).features, model.encode_text(rows.flatten(0, 1)).features
    logits, owner = model.logit_scale() * v @ t.T, torch.arange(3).repeat_interleave(2)
    to_text = -logits.log_softmax(1)[owner, torch.arange(6)].mean()
    to_image = F.cross_entropy(logits.T, owner)
    (expected := (to_text + to_image) / 2).backward()
    assert loss.item() == pytest.approx(expected.item() + math.log(2) / 2, abs=1e-5)
    assert torch.allclose(gradient, model.image_projection.weight.grad, atol=1e-6)
    model.zero_grad()


def test_writing_is_the_mean_over_the_tokens(model, tokenizer, images):
    said = [["a red star", "star"], ["a blue ring at the top", "a ring"], ["squares", "two"]]
    loss, _ = Writing(model)(images, rows_of_captions(tokenizer, said, 2), None, None, SHARES)
    made = prompted(tokenizer, [""] * 6, [text for texts in said for text in texts], 28)
    sums, counts = log_likelihood(model, model.encode_image(images), torch.arange(3).repeat_interleave(2), made)
    assert loss.item() == pytest.approx(-(sums.sum() / counts.sum()).item(), abs=1e-4)


def test_answer_writing_leaves_the_question_out(model, tokenizer, images):
    asked = [["what color?", ["red"], 0], ["how many?", ["2", "three"], 1], ["shape?", ["ring"], 0]]
    rows = WrittenRows(tokenizer).encode([json.dumps(a) for a in asked], 28)
    loss, _ = AnswerWriting(model)(images, rows, None, None, SHARES)
    made = prompted(tokenizer, [a[0] for a in asked], ["red", "3", "ring"], 28)
    sums, counts = log_likelihood(model, model.encode_image(images), torch.arange(3), made)
    assert loss.item() == pytest.approx(-(sums.sum() / counts.sum()).item(), abs=1e-4)


def test_answer_targets_follow_the_agreement_of_people(model, tokenizer, images):
    answers = [["red"] * 9 + ["blue"], ["unknown"] * 10, ["yes"]]
    rows = AnswerRows(tokenizer, ("yes", "red", "blue")).encode([json.dumps(["what?", a, 0]) for a in answers], 28)
    questions, target = AnswerRows.decode(rows, 3)
    assert target[0].tolist() == pytest.approx([0, 1 / 1.3, 0.3 / 1.3], abs=1e-5)
    assert target[1].tolist() == [0, 0, 0] and target[2].tolist() == pytest.approx([1, 0, 0])
    torch.manual_seed(0)
    head = AnswerHead(16, 3)
    loss, _ = AnswerChoosing(model, head)(images, rows, None, None, SHARES)
    logits = answer_logits(model, head, model.encode_image(images), questions)
    expected = -(target * logits.log_softmax(1)).sum() / 2
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_labelling_starts_as_the_zero_shot_classifier(model, tokenizer, images):
    weight = F.normalize(torch.randn(4, 16), dim=1)
    head = LabelHead(16, 4, model.logit_scale().item(), weight)
    rows = LabelRows().encode(["1", "3", "0"], 28)
    loss, _ = Labelling(model, head)(images, rows, None, None, SHARES)
    logits = model.logit_scale() * model.encode_image(images).features @ weight.T
    assert loss.item() == pytest.approx(F.cross_entropy(logits, rows[:, 0]).item(), abs=1e-5)


def test_references_travel_without_loss():
    said = [["a dog's \u2019house\u2019", "x"], ["日本", ""]]
    assert ReferenceRows.decode(ReferenceRows().encode([json.dumps(s) for s in said], 4)) == said


@pytest.mark.parametrize("kind", ["greedy", "others"])
def test_scst_weighs_log_likelihoods_by_the_reward_over_a_baseline(model, tokenizer, images, kind):
    said = [["a red star at the top"], ["a blue ring"], ["two green squares"]]
    scorer = CiderD([[tuple(c.split()) for c in s] for s in said])
    objective = SelfCritical(model, tokenizer, scorer, samples=2, temperature=1.0, baseline=kind)
    rows = ReferenceRows().encode([json.dumps(s) for s in said], 28)
    _, tokens, (rewards, baseline) = objective.inputs(images, rows, None, 3)
    assert torch.equal(tokens, objective.inputs(images, rows, None, 3)[1])
    assert objective.model.training and tokens.shape[0] == 6 and rewards.shape == (3, 2)
    assert torch.equal(baseline, rewards.flip(1)) if kind == "others" else baseline.shape == (3, 1)
    objective.eval()
    rewards, baseline = torch.tensor([[1.0, 0.0], [0.5, 0.5], [2.0, 3.0]]), torch.tensor([[0.5], [0.5], [1.0]])
    loss, reward, greedy = objective(images, tokens, (rewards, baseline), None, SHARES)
    loss.backward()
    gradient = model.caption_decoder.head.weight.grad.clone()
    model.zero_grad()
    advantage = [0.5, -0.5, 0.0, 0.0, 1.0, 2.0]
    total = torch.zeros(())
    features = model.encode_image(images)
    for row, (worth, sequence) in enumerate(zip(advantage, tokens.tolist())):
        ends = sequence.index(2) + 1 if 2 in sequence else len(sequence)
        one = features._make(None if f is None else f[row // 2 : row // 2 + 1] for f in features)
        logits = model.caption_logits(one, torch.tensor([sequence[:ends]]))[0].log_softmax(-1)
        total = total - worth * sum(logits[i, sequence[i + 1]] for i in range(ends - 1)) / 6
    total.backward()
    assert loss.item() == pytest.approx(total.item(), abs=1e-4)
    assert torch.allclose(gradient, model.caption_decoder.head.weight.grad, atol=1e-5)
    assert reward.item() == pytest.approx(7 / 6) and greedy.item() == pytest.approx(2 / 3)
    model.zero_grad()
    model.eval()


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("retrieval", {}),
        ("captioning", {}),
        ("captioning", {"scst": True, "samples": 2}),
        ("vqa", {"vqa": "classify", "answers": 5}),
        ("vqa", {"vqa": "generate"}),
        ("classification", {}),
    ],
)
def test_a_step_of_every_objective(model, tokenizer, task, changes):
    from train.tasks.tuning import build_objective, training_groups, tuning_batches

    tuning = tuning_of(task, changes, SIZE)
    fresh = SyCoCa(CONFIG)
    fresh.load_state_dict(model.state_dict())
    plan = build_objective(tuning, fresh, tokenizer, CPU)
    groups = training_groups(plan.objective, tuning.config)
    before = [p.detach().clone() for group in groups for p in group["params"]]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    batches = tuning_batches(tuning, plan, 1, rank=1, world=2, device=CPU)
    batch, place = next(batches)
    assert (place.epoch, place.index, len(place.keys)) == (0, 1, 4)
    values = plan.objective(*plan.objective.inputs(*batch, 5), None, [4])
    assert len(values) == len(plan.objective.names) and all(torch.isfinite(value) for value in values)
    values[0].backward()
    optimizer.step()
    after = [p for group in groups for p in group["params"]]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_layers_near_the_pixels_learn_more_slowly(model):
    from types import SimpleNamespace

    from train.tasks.tuning import training_groups

    config = SimpleNamespace(
        task="classification", optimizer=SimpleNamespace(weight_decay=0.1), options=TaskOptions(layer_decay=0.5)
    )
    fresh = SyCoCa(CONFIG)
    objective = Labelling(fresh, LabelHead(16, 3, 1.0))
    groups = training_groups(objective, config)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    named = dict(objective.named_parameters())
    assert scale[id(named["head.linear.weight"])] == 1.0
    assert scale[id(named["model.vision.blocks.1.mlp.up.weight"])] == 0.5
    assert scale[id(named["model.vision.blocks.0.mlp.up.weight"])] == 0.25
    assert scale[id(named["model.vision.embed.proj.weight"])] == 0.125
    frozen = {name for name, p in named.items() if not p.requires_grad}
    assert "model.text.sequence.pos" in frozen and not any(n.startswith(("head.", "model.vision.")) for n in frozen)
    assert {id(p) for p in objective.parameters() if p.requires_grad} == scale.keys()


def test_a_classifier_comes_back_as_it_was_saved(tmp_path):
    torch.manual_seed(0)
    for module in (LabelHead(16, 3, 7.0, torch.randn(3, 16)), AnswerHead(16, 3)):
        save_task(tmp_path, "vqa", {"method": "classify"}, Head(module, ("a", "b", "c")))
        from train.tasks.facts import task_facts

        facts = task_facts(tmp_path)
        back = load_head(facts, CONFIG)
        assert back.names == ("a", "b", "c") and facts["method"] == "classify"
        for name, tensor in module.state_dict().items():
            assert torch.equal(back.module.state_dict()[name], tensor)
    assert isinstance(back.module, nn.Module)


def test_best_median_and_worst_are_different_samples():
    examples = [Example(score, i, str(i), ()) for i, score in enumerate([0.1, math.nan, 0.9, 0.5, 0.4, 0.7, 0.2])]
    chosen = chosen_examples(examples, 2)
    assert [e.index for e in chosen["best"]] == [2, 5]
    assert [e.index for e in chosen["worst"]] == [1, 0]
    everything = [e.index for found in chosen.values() for e in found]
    assert len(everything) == len(set(everything)) == 6
    assert sum(map(len, chosen_examples(examples[:1], 3).values())) == 1
    assert isinstance(Outcome("x", {}, {}, {}, []), tuple) and chosen_examples([], 3)["best"] == []


def test_numbered_classes_start_from_zeros_and_are_not_judged_before(model, tokenizer, tmp_path):
    numbered = SimpleNamespace(classes=("0", "1"))
    config = SimpleNamespace(task="classification", options=TaskOptions(), model=str(tmp_path))
    tuning = SimpleNamespace(config=config, train=numbered, val=numbered, run_dir=tmp_path)
    assert not build_objective(tuning, model, tokenizer, CPU).objective.head.linear.weight.any()
    judge_untuned(tuning, model, tokenizer, CPU)
    assert not list(tmp_path.iterdir())
    numbered.classes = ("cat", "dog")
    assert build_objective(tuning, model, tokenizer, CPU).objective.head.linear.weight.any()
