"""Grounding, statements about two images and re-ranking: figures against brute force, on an X-VLM of a few thousand
parameters."""

import itertools
import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from PIL import Image

from sycoca.config import (
    CaptionDecoderConfig,
    ConfigError,
    FusionConfig,
    ImageDecoderConfig,
    LossConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from sycoca.images import normalise
from sycoca.locate import locate, whole_image
from sycoca.regions import cells, iou, to_corners
from sycoca.tokenizer import Tokenizer
from sycoca.xvlm import XVLM
from train.data import DataError, open_dataset
from train.data.region_batches import region_batches
from train.data.sample import Region, Skipped
from train.grounding import best_fixed_box, right_choices
from train.tasks.fused_objectives import Locating, Matching, Stating
from train.tasks.grounding import method_of
from train.tasks.heads import AnswerHead, Head, StatementHead, load_head, save_task
from train.tasks.heat import best_rectangles, match_heat
from train.tasks.judge import judge
from train.tasks.nlvr import statement_batches, statement_logits
from train.tasks.objectives import AnswerChoosing
from train.tasks.options import TaskOptions, check_answering
from train.tasks.report import write_results
from train.tasks.rerank import candidates, match_scores, ranked_anew
from train.tasks.rows import AnswerRows
from train.tasks.sources import open_source

SIZE = 32
CONFIG = ModelConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=SIZE, patch_size=8, width=16, depth=2, heads=2, local_depth=1),
    text=TextConfig(
        context_length=24, vocab_size=300, width=16, depth=1, heads=2, kind="bidirectional", mask_id=3, sot_id=1
    ),
    caption_decoder=CaptionDecoderConfig(depth=1, heads=2),
    image_decoder=ImageDecoderConfig(depth=1, width=16, heads=2),
    fusion=FusionConfig(depth=2, heads=2),
    objectives=("itc", "itm", "bbox"),
)
CPU = torch.device("cpu")
FEW = TaskOptions(limit=6, batch_size=4)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_wordpiece(open_dataset("scenes").texts(200), 300)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = XVLM(CONFIG).eval()
    with torch.no_grad():
        # Wide enough apart that a wrong pairing shows.
        for head in (made.box_head, made.itm_head):
            head.out.weight.mul_(4)
    return made


def scenes(count, split="val"):
    source = open_dataset("scenes", split, image_size=SIZE)
    return [source[i] for i in range(count)]


def seen_by(model, samples):
    pictures = torch.stack([torch.from_numpy(whole_image(s.image, SIZE)) for s in samples])
    return model.view_images(model.encode_image(normalise(pictures)))


@torch.no_grad()
def brute_force_boxes(model, tokenizer, samples):
    """(found, true) for every phrase, one at a time."""
    rows = []
    for sample in samples:
        views = seen_by(model, [sample])
        for region in sample.regions:
            text = model.encode_text(tokenizer.encode([region.phrase], CONFIG.text.context_length))
            x0, y0, x1, y1 = region.box
            rows.append((model.locate(text, views)[0], torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])))
    return (torch.stack(part) for part in zip(*rows))


def test_grounding_asks_for_every_phrase_of_every_image(model, tokenizer, tmp_path):
    source = open_source("grounding", "scenes", "val", image_size=SIZE)
    outcome = judge("grounding", model, tokenizer, source, options=FEW, device=CPU).outcome
    boxes, true = brute_force_boxes(model, tokenizer, scenes(6))
    overlaps = iou(boxes, true)
    assert outcome.figures["phrases"] == len(boxes) and outcome.figures["images"] == len(outcome.examples) == 6
    assert outcome.figures["method"] == "regress"
    assert outcome.headline["mean IoU"] == pytest.approx(overlaps.mean().item(), abs=1e-5)
    assert outcome.headline["Acc@0.5"] == pytest.approx((overlaps >= 0.5).double().mean().item())
    assert outcome.headline["Acc@0.5 of the best fixed box"] == pytest.approx(best_fixed_box(true)[1])
    page = tmp_path / "page.html"
    write_results(tmp_path, "page", outcome, {"model": "m", "data": "d"}, source, 2)
    example = outcome.examples[0]
    assert len(example.boxes) == 2 * len(example.lines) and "found at" in page.read_text(encoding="utf-8")
    assert sum(kind["phrases"] for name, kind in outcome.figures["by_size"].items() if name != "all") == len(boxes)


def test_a_region_with_several_phrases_is_asked_for_by_each(model, tokenizer):
    class Called(list):
        name, skipped = "called", Skipped()

    said = {"phrases": ("a red star", "a star")}
    regions = Region("a red star", (0.1, 0.1, 0.5, 0.5), -1, said), Region("broken", (0.4, 0.1, 0.2, 0.3), -1)
    sample = scenes(1)[0]
    source = Called([sample._replace(regions=regions), sample._replace(regions=()), sample._replace(regions=None)])
    found = judge("grounding", model, tokenizer, source, options=FEW, device=CPU)
    assert found.outcome.figures["phrases"] == 2 and found.outcome.figures["images"] == 1
    assert sum(found.skipped.counts().values()) == 1 and "image without a usable region" in found.skipped.counts()
    with pytest.raises(ValueError, match="nothing of 'called' can be used"):
        judge("grounding", model, tokenizer, type(source)(source[1:]), options=FEW, device=CPU)


def test_how_boxes_are_found_follows_what_was_learned(model):
    only_matches = XVLM(replace(CONFIG, objectives=("itc", "itm")))
    assert method_of("auto", model) == method_of("regress", model) == "regress"
    assert method_of("heat", model) == method_of("auto", only_matches) == "heat"
    with pytest.raises(ConfigError, match="needs the objective 'bbox'"):
        method_of("regress", only_matches)
    with pytest.raises(ConfigError, match="'bbox' or 'itm'"):
        method_of("auto", XVLM(replace(CONFIG, objectives=("itc",))))


def test_fixed_boxes_and_choices():
    targets = torch.tensor([[0.3, 0.3, 0.2, 0.2]] * 3 + [[0.7, 0.7, 0.4, 0.4]] * 2)
    box, share = best_fixed_box(targets)
    assert share == 0.6 and iou(box[None], targets[:1]).item() >= 0.5
    # Two boxes of one image, one of them listed twice, and an image with a single box.
    found = torch.tensor([[0.32, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [0.1, 0.1, 0.01, 0.01]])
    true = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.4, 0.4], [0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.4, 0.4]])
    chosen = right_choices(found, true, [0, 0, 0, 1])
    assert chosen[:, 0].tolist() == [1, 1, 0, 0] and chosen[:, 1].tolist() == [0.5, 0.5, 0.5, 1]


def test_heat_is_the_gradient_times_the_attention(model, tokenizer):
    samples = scenes(2)
    with torch.no_grad():
        views = seen_by(model, samples)
        text = model.encode_text(tokenizer.encode(["a red star", "a large blue heart in the middle"], 24))
        before = model.match(text, views)
    heat = match_heat(model, text, views, block=0)
    assert heat.shape == (2, 16) and (heat >= 0).all() and heat.sum() > 0 and not heat.requires_grad
    # One text alone has the same heat: padding adds none.
    alone = model.encode_text(tokenizer.encode(["a red star"], 24))
    single = match_heat(model, alone, views._replace(seen=views.seen.of(torch.tensor([0]))), block=0)
    assert torch.allclose(single[0], heat[0], atol=1e-5)
    last = match_heat(model, text, views, block=1)
    assert last.shape == (2, 16) and (last >= 0).all()
    with torch.no_grad():
        assert torch.allclose(model.match(text, views), before, atol=1e-5)
    assert all(block.cross.kept is None for block in model.fusion.blocks)


def test_the_best_rectangle_is_that_of_brute_force():
    torch.manual_seed(1)
    heat = torch.rand(5, 3, 4) ** 4
    heat[4] = 0
    boxes = best_rectangles(heat.flatten(1), (3, 4))
    for row in range(4):
        best = max(
            (heat[row, t:b, l:r].sum() / ((b - t) * (r - l)) ** 0.5, (l / 4, t / 3, r / 4, b / 3))
            for t, b in itertools.combinations(range(4), 2)
            for l, r in itertools.combinations(range(5), 2)
        )
        assert to_corners(boxes[row]).tolist() == pytest.approx(best[1], abs=1e-5)
    assert boxes[4].tolist() == [0.5, 0.5, 1, 1]


def test_grounding_by_heat(model, tokenizer):
    source = open_source("grounding", "scenes", "val", image_size=SIZE)
    found = judge("grounding", model, tokenizer, source, options=replace(FEW, grounding="heat"), device=CPU).outcome
    assert found.figures["method"] == "heat" and 0 <= found.headline["mean IoU"] <= 1


@torch.no_grad()
def test_matching_scores_are_those_of_single_pairs(model, tokenizer):
    samples = scenes(5)
    texts = [caption for sample in samples for caption in sample.captions[:2]]
    text = model.encode_text(tokenizer.encode(texts, 24))
    pictures = normalise(torch.stack([torch.from_numpy(s.image) for s in samples]))
    chosen = candidates(model.encode_image(pictures).features, text.features, 3)
    parts = pictures[:2], pictures[2:]
    by_image, by_text = match_scores(model, parts, text, chosen, batch_size=4)
    assert by_image.shape == (5, 3) and by_text.shape == (10, 3)
    views = seen_by(model, samples)
    for scores, pairs in (
        (by_image, [[(i, t) for t in row] for i, row in enumerate(chosen.texts.tolist())]),
        (by_text, [[(i, t) for i in row] for t, row in enumerate(chosen.images.tolist())]),
    ):
        for row, line in zip(scores, pairs):
            for value, (i, t) in zip(row, line):
                one = text._make(field[t : t + 1] for field in text)
                logits = model.match(one, views._replace(seen=views.seen.of(torch.tensor([i]))))[0]
                assert value.item() == pytest.approx((logits[1] - logits[0]).item(), abs=1e-4)


def test_candidates_stand_before_all_others():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.7, 0.1], [0.3, 0.2, 0.1], [float("nan"), 0.5, 0.2]])
    right = torch.tensor([[0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0]], dtype=torch.bool)
    assert ranked_anew(scores, right, torch.tensor([2, 0, 1, 1])).tolist() == [1, 1, 3, 1]
    assert ranked_anew(scores[2:3], right[2:3], torch.tensor([7])).tolist() == [7]


def test_retrieval_ranked_anew(model, tokenizer):
    source = open_source("retrieval", "scenes", "val", image_size=SIZE)
    plain, anew, all_anew = (
        judge("retrieval", model, tokenizer, source, options=replace(FEW, rerank=k), device=CPU).outcome
        for k in (None, 4, 30)
    )
    assert "itc" not in plain.figures and anew.figures["rerank"] == 4
    assert anew.figures["itc"] == {way: plain.figures[way] for way in ("image_to_text", "text_to_image")}
    # With 30 texts and 6 images all are candidates: the order is that of matching alone.
    with torch.no_grad():
        views = seen_by(model, scenes(6))
        texts = [caption for sample in scenes(6) for caption in sample.captions]
        text = model.encode_text(tokenizer.encode(texts, 24))
        every = torch.arange(6)[:, None].expand(6, 30)
        odds = torch.stack(
            [model.match(text, views._replace(seen=views.seen.of(row))).diff(dim=1).squeeze(1) for row in every]
        )
    owner = torch.arange(30) // 5
    hits = [owner[odds[i].argmax()].item() == i for i in range(6)]
    assert all_anew.figures["image_to_text"]["r@1"] == pytest.approx(sum(hits) / 6)
    back = [odds[:, t].argmax().item() == owner[t].item() for t in range(30)]
    assert all_anew.figures["text_to_image"]["r@1"] == pytest.approx(sum(back) / 30)
    with pytest.raises(ConfigError, match="rerank: needs a model trained with the objective 'itm'"):
        judge(
            "retrieval",
            XVLM(replace(CONFIG, objectives=("itc",))).eval(),
            tokenizer,
            source,
            options=replace(FEW, rerank=4),
            device=CPU,
        )


def test_boxes_of_phrases_in_an_image_that_is_not_square(model, tokenizer):
    image = Image.new("RGB", (90, 40), (200, 30, 30))
    found = locate(model, tokenizer, image, ["a red thing", "nothing"])
    assert [f.phrase for f in found] == ["a red thing", "nothing"]
    for _, (x0, y0, x1, y1), match in found:
        assert 0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1 and 0 <= match <= 1
    with pytest.raises(ValueError, match="built without the objective 'bbox'"):
        locate(XVLM(replace(CONFIG, objectives=("itc", "itm"))), tokenizer, image, ["x"])


def test_the_loss_of_boxes_is_that_of_pre_training(model, tokenizer):
    source = open_dataset("scenes", image_size=SIZE)
    loader = region_batches(
        source, tokenizer, elements=16, image_size=SIZE, grid=(4, 4), context_length=24, whole_share=0.3, crop=False
    )
    batch = next(loader).regions
    objective = Locating(deepcopy(model))
    loss, l1, giou = objective(*objective.inputs(*batch, 3), None, [16])
    with torch.no_grad():
        views = model.view_images(model.encode_image(batch.images))
        one = [
            model.locate(
                model.encode_text(batch.tokens[e : e + 1]),
                views._replace(seen=views.seen.of(batch.image_index[e : e + 1])),
            )[0]
            for e in range(16)
        ]
    boxed = batch.has_box
    error = (torch.stack(one) - batch.boxes).abs().sum(1)[boxed].mean()
    assert l1.item() == pytest.approx(error.item(), rel=1e-4) and loss.item() == pytest.approx((l1 + giou).item())
    assert torch.equal(batch.rects, cells(batch.boxes, (4, 4)))
    loss.backward()
    assert objective.model.box_head.out.weight.grad.abs().sum() > 0
    assert objective.model.itm_head.out.weight.grad is None


def test_matching_and_contrast_are_weighed_as_in_pre_training(tokenizer):
    torch.manual_seed(0)
    objective = Matching(XVLM(replace(CONFIG, loss=LossConfig(itm_weight=0.5))))
    source = open_dataset("scenes", image_size=SIZE)
    images = normalise(torch.stack([torch.from_numpy(source[i].image) for i in range(6)]))
    rows = tokenizer.encode([source[i].captions[0] for i in range(6)], 24)[:, None]
    loss, itc, itm = objective(*objective.inputs(images, rows, None, 2**63 - 1), None, [6])
    assert loss.item() == pytest.approx((itc + 0.5 * itm).item()) and itm > 0
    loss.backward()
    assert objective.model.itm_head.out.weight.grad.abs().sum() > 0


def test_questions_are_answered_through_the_fusion_encoder(model, tokenizer):
    torch.manual_seed(0)
    head = AnswerHead(16, 3)
    images = normalise(torch.stack([torch.from_numpy(s.image) for s in scenes(3)]))
    asked = [
        ("is there a star?", ["yes"] * 3),
        ("what color is it?", ["red", "blue", "red"]),
        ("how many?", ["unknown"]),
    ]
    rows = AnswerRows(tokenizer, ("yes", "red", "blue")).encode([json.dumps([*a, 0]) for a in asked], 24)
    loss, _ = AnswerChoosing(deepcopy(model), head)(images, rows, None, None, [3])
    questions, target = AnswerRows.decode(rows, 3)
    with torch.no_grad():
        views = model.view_images(model.encode_image(images))
        logits = []
        for row in range(2):
            text = model.encode_text(questions[row : row + 1])
            logits.append(head(model.fused(text, views._replace(seen=views.seen.of(torch.tensor([row])))))[0])
    expected = -(target[:2] * torch.stack(logits).log_softmax(1)).sum() / 2
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    source = open_source("vqa", "scenes", "val", image_size=SIZE)
    how = {"options": FEW, "device": CPU, "head": Head(head.eval(), ("yes", "red", "blue")), "method": "classify"}
    found = judge("vqa", model, tokenizer, source, **how).outcome
    assert {row["answer"] for row in found.figures["answers"]} <= {"yes", "red", "blue"}
    with pytest.raises(ConfigError, match="vqa=rank needs a model trained with the objective 'ic'"):
        check_answering("rank", CONFIG.objectives, "m")


@pytest.fixture(scope="module")
def statements():
    return open_source("nlvr", "scenes", "val", image_size=SIZE)


def test_scene_statements_are_what_they_say(statements):
    scenes = open_dataset("scenes", "val", image_size=SIZE)
    true, kinds = 0, set()
    for index in range(300):
        said = statements.statement(index)
        sides = [[f"{t.color} {t.shape}" for t in scenes.scene(2 * index + side).things] for side in (0, 1)]
        if said.kind == "both":
            color = said.sentence.split()[-1]
            fact = all(any(thing.startswith(f"{color} ") for thing in side) for side in sides)
        else:
            names = sorted({t for side in sides for t in side} | set(_all_things()), key=said.sentence.find)
            names = [name for name in names if f" {name}" in f" {said.sentence}"]
            fact = names[0] in sides[0] and names[-1] in sides[1]
        assert fact == said.label, said
        true += said.label
        kinds.add(said.kind)
    assert 110 < true < 190 and kinds == {"both", "sides"}


def _all_things():
    from train.data.scene_shapes import COLOURS, SHAPES

    return [f"{c} {s}" for c in COLOURS for s in SHAPES]


def test_statements_see_both_images_in_order(model, tokenizer, statements):
    torch.manual_seed(0)
    head = StatementHead(16)
    images = torch.stack([torch.from_numpy(i) for index in range(3) for i in statements.images(index)])
    images = normalise(images)
    tokens = tokenizer.encode([statements.statement(i).sentence for i in range(3)], 24)
    with torch.no_grad():
        logits = statement_logits(model, head, images, tokens)
        alone = statement_logits(model, head, images[2:4], tokens[1:2])
        swapped = statement_logits(model, head, images[[3, 2]], tokens[1:2])
    assert torch.allclose(alone[0], logits[1], atol=1e-5) and not torch.allclose(swapped[0], logits[1], atol=1e-4)


def test_batches_of_statements_are_those_of_any_rank_and_place(tokenizer, statements):
    form = {"image_size": SIZE, "context_length": 24, "seed": 1, "workers": 0, "global_batch": 8}

    def take(count, **options):
        return list(itertools.islice(statement_batches(statements, tokenizer, **form, **options), count))

    whole = take(3, rank=0, world=1, first=63)
    parts = [take(3, rank=rank, world=2, first=63) for rank in (0, 1)]
    for batch, shares in zip(whole, zip(*parts)):
        assert batch.keys == shares[0].keys + shares[1].keys
        for name in ("images", "tokens", "labels"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(share, name) for share in shares]))
    assert torch.equal(take(1, rank=0, world=1, first=65)[0].tokens, whole[2].tokens)
    assert whole[0].images.shape == (16, 3, SIZE, SIZE) and set(whole[0].labels.tolist()) <= {0, 1}


def test_statements_are_learned_and_judged(model, tokenizer, statements, tmp_path):
    torch.manual_seed(0)
    objective = Stating(deepcopy(model), StatementHead(16)).train()
    batch = next(
        statement_batches(
            statements,
            tokenizer,
            global_batch=8,
            image_size=SIZE,
            context_length=24,
            seed=0,
            rank=0,
            world=1,
            first=0,
            workers=0,
        )
    )
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss, _ = objective(*objective.inputs(*batch[:3], 0), None, [8])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    save_task(tmp_path, "nlvr", {}, Head(objective.head, ("false", "true")))
    facts = json.loads((tmp_path / "task.json").read_text()) | {"folder": str(tmp_path)}
    head = load_head(facts, CONFIG)
    assert isinstance(head.module, StatementHead)
    found = judge("nlvr", objective.model.eval(), tokenizer, statements, options=FEW, device=CPU, head=head).outcome
    assert found.figures["statements"] == 6 and len(found.examples) == 6
    write_results(tmp_path, "page", found, {"model": "m", "data": "d"}, statements, 1)
    right = sum(example.score > 0 for example in found.examples)
    assert found.headline["accuracy"] == pytest.approx(right / 6)


@pytest.mark.parametrize("form", ["own", "named", "lines"])
def test_files_of_nlvr2(form, tmp_path):
    for name in ("dev-1-0-img0.png", "dev-1-0-img1.png", "dev-2-0-img0.png"):
        Image.new("RGB", (20, 10)).save(tmp_path / name)
    entries = [
        {"identifier": "dev-1-0-3", "sentence": " There are two. ", "label": "True"},
        {"identifier": "dev-1-0-4", "sentence": "x", "label": "maybe"},
        {"identifier": "dev-2-0-0", "sentence": "x", "label": "False"},
        {"identifier": "dev", "sentence": "x", "label": "False"},
        {"sentence": 3, "label": "False"},
    ]
    if form == "named":
        entries[0]["images"] = ["dev-1-0-img0.png", "dev-1-0-img1.png"]
    path = tmp_path / ("f.jsonl" if form == "lines" else "f.json")
    text = "\n".join(json.dumps(e) for e in entries) + "\n{\n" if form == "lines" else json.dumps(entries)
    path.write_text(text)
    source = open_source("nlvr", f"nlvr2:{path}", "val", image_size=SIZE)
    assert len(source) == 1 and source.statement(0)[:2] == ("There are two.", True)
    assert [image.size for image in source.images(0)] == [(20, 10)] * 2
    causes = {"label is neither True nor False, or sentence is empty", "image of a statement is absent"}
    causes |= {"statement without two images", "field sentence is of another type"}
    assert set(source.skipped.counts()) == causes | ({"line is damaged"} if form == "lines" else set())
    with pytest.raises(DataError, match="has no statements"):
        open_source("nlvr", "coco", "val", image_size=SIZE)
