import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from kernels import masked_patch_loss
from sycoca.config import CaptionDecoderConfig, ImageDecoderConfig, MaskingConfig, ModelConfig, TextConfig, VisionConfig
from sycoca.images import eval_transform
from sycoca.model import Batch, StepPlan, SyCoCa
from sycoca.tokenizer import Tokenizer
from tests.ranks import run_ranks
from train import evaluation
from train.data import open_dataset
from train.data.sample import BadSample, Region, Sample
from train.evaluation_run import evaluate, summary_lines

SIZE, PATCH = 32, 8
CONFIG = ModelConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=SIZE, patch_size=PATCH, width=16, depth=2, heads=2),
    text=TextConfig(context_length=40, vocab_size=320, width=16, depth=1, heads=2),
    caption_decoder=CaptionDecoderConfig(depth=1, heads=2),
    image_decoder=ImageDecoderConfig(depth=1, width=16, heads=2),
    masking=MaskingConfig(score_space="local", masked_input="drop"),
)


class Held(list):
    """Samples, of which the given indices cannot be read."""

    def __init__(self, samples, broken=()):
        super().__init__(samples)
        self.broken = broken

    def __getitem__(self, index):
        if index in self.broken:
            raise BadSample("unreadable image", str(index))
        return super().__getitem__(index)


@pytest.fixture(scope="module")
def scenes():
    source = open_dataset("scenes", "val", image_size=SIZE)
    return [source[i] for i in range(13)]


@pytest.fixture(scope="module")
def tokenizer(scenes):
    return Tokenizer.train([caption for sample in scenes for caption in sample.captions], 320)


def build(config=CONFIG):
    torch.manual_seed(0)
    return SyCoCa(config).eval()


def judge(model, tokenizer, dataset, **options):
    return evaluate(model, tokenizer, dataset, image_size=SIZE, device="cpu", **({"batch_size": 4} | options))


def whole_batch(tokenizer, samples, roll=0):
    images = torch.stack([eval_transform(s.image, SIZE) for s in samples])
    tokens = tokenizer.encode([s.captions[0] for s in samples], CONFIG.text.context_length)
    return Batch(images, tokens.roll(roll, 0), torch.arange(len(samples)), None)


# Figures


def brute_ranks(images, texts, owner):
    scores = images.double() @ texts.double().T
    to_text, to_image = [], []
    for i, row in enumerate(scores):
        best = max(row[j] for j in range(len(texts)) if owner[j] == i)
        to_text.append(sum(bool(row[j] >= best) for j in range(len(texts)) if owner[j] != i))
    for j, column in enumerate(scores.T):
        to_image.append(sum(bool(column[i] >= column[owner[j]]) for i in range(len(images)) if i != owner[j]))
    return to_text, to_image


@pytest.mark.parametrize("chunk_bytes", [1, 64 << 20], ids=["row by row", "at once"])
def test_ranks_equal_brute_force(monkeypatch, chunk_bytes):
    monkeypatch.setattr(evaluation, "_CHUNK_BYTES", chunk_bytes)
    torch.manual_seed(1)
    owner = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 6])
    images, texts = torch.randn(7, 3), torch.randn(11, 3)
    texts[5] = texts[0]  # a tie between two images' captions
    to_text, to_image = evaluation.retrieval_ranks(images, texts, owner)
    assert (to_text.tolist(), to_image.tolist()) == brute_ranks(images, texts, owner)
    assert len(set(to_text.tolist())) > 2


def test_order_of_texts_does_not_matter():
    torch.manual_seed(2)
    images, texts, order = torch.randn(20, 4), torch.randn(20, 4), torch.randperm(20)
    to_text, to_image = evaluation.retrieval_ranks(images, texts, torch.arange(20))
    shuffled_text, shuffled_image = evaluation.retrieval_ranks(images, texts[order], order)
    assert torch.equal(shuffled_text, to_text)
    assert torch.equal(shuffled_image, to_image[order])


def test_right_features_find_every_pair():
    figures = evaluation.retrieval(torch.eye(12), torch.eye(12), torch.arange(12))
    assert set(figures["image_to_text"].values()) | set(figures["text_to_image"].values()) == {1.0}


@pytest.mark.parametrize("seed", range(6))
def test_features_all_alike_find_nothing(seed):
    """Ties count, though the sums of a wide product round differently from those of its diagonal."""
    torch.manual_seed(seed)
    image, text = torch.nn.functional.normalize(torch.randn(2, 768))
    figures = evaluation.retrieval(image.expand(60, -1), text.expand(60, -1), torch.arange(60))
    assert set(figures["image_to_text"].values()) | set(figures["text_to_image"].values()) == {0.0}


def test_features_that_are_no_numbers_find_nothing():
    features = torch.full((20, 4), math.nan)
    figures = evaluation.retrieval(features, features, torch.arange(20))
    assert set(figures["image_to_text"].values()) | set(figures["text_to_image"].values()) == {0.0}


@pytest.mark.parametrize("positives", [1, 2, 3])
def test_chance_is_the_mean_over_all_orders(positives):
    orders = list(itertools.permutations(range(6)))
    hit = np.mean([any(place < 5 for place in order[:positives]) for order in orders])
    first = np.mean([any(place < 1 for place in order[:positives]) for order in orders])
    computed = evaluation.chance([positives], 6)
    assert computed == pytest.approx({"r@1": first, "r@5": hit, "r@10": 1.0})


def test_caption_nats_stop_at_the_first_end():
    torch.manual_seed(3)
    eot, tokens = 9, torch.tensor([[8, 0, 3, 9, 0, 0], [8, 9, 9, 1, 9, 9], [8, 1, 2, 3, 4, 5]])
    logits = torch.randn(3, 6, 10)
    nats, count = evaluation.caption_nats(logits, tokens, eot)
    # The padding id inside a caption is a word like any other.
    predicted = [[1, 2, 3], [1], [1, 2, 3, 4, 5]]
    for row, places in enumerate(predicted):
        expected = -sum(logits[row, t - 1].double().log_softmax(0)[tokens[row, t]] for t in places)
        assert nats[row].item() == pytest.approx(expected.item(), rel=1e-6)
        assert count[row] == len(places)


def test_described_area_is_the_union_of_boxes():
    grid, patch = (2, 4), 4
    left_half = (0.0, 0.0, 0.5, 1.0)
    area = evaluation.described_area([left_half, (0.25, 0.0, 0.5, 0.5)], grid, patch)
    assert area.tolist() == [1, 1, 0, 0, 1, 1, 0, 0]
    quarter = evaluation.described_area([(0.125, 0.25, 0.25, 0.5)], grid, patch)
    assert quarter.tolist() == [0.25, 0, 0, 0, 0, 0, 0, 0]
    assert evaluation.described_area([], grid, patch).sum() == 0
    assert evaluation.described_area([(1.0, 0.0, 1.0, 1.0)], grid, patch).sum() == 0


def test_share_and_overlap():
    area = torch.tensor([[1.0, 0.5, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    share = evaluation.share_inside(area, torch.tensor([[0, 3], [0, 1]]))
    assert share[0] == 0.75
    assert share[1].isnan()
    same = evaluation.overlap(torch.tensor([[0, 3], [1, 2]]), torch.tensor([[3, 4], [1, 2]]))
    assert same.tolist() == [0.5, 1.0]


def test_auc_counts_pairs():
    torch.manual_seed(4)
    scores = torch.randint(0, 4, (5, 12)).float()
    scores[0, 2] = math.nan
    positive = torch.rand(5, 12) < 0.4
    positive[:, 2], positive[:, 3] = True, False
    for row, area in enumerate(evaluation.auc(scores, positive, ~positive).tolist()):
        high, low = scores[row][positive[row]].tolist(), scores[row][~positive[row]].tolist()
        wins = [(a > b) + 0.5 * (a == b) for a in high for b in low]
        assert area == pytest.approx(sum(wins) / len(wins))
    assert evaluation.auc(scores, torch.zeros_like(positive), positive).isnan().all()


# The whole evaluation


def test_losses_of_training_are_the_figures(scenes, tokenizer):
    model = build()
    figures = judge(model, tokenizer, scenes)
    with torch.no_grad():
        true = model(whole_batch(tokenizer, scenes), StepPlan(True, False))
        other = model(whole_batch(tokenizer, scenes, roll=-1), StepPlan(True, False))
        image, text, stranger = (
            model.encode_image(whole_batch(tokenizer, scenes).images),
            model.encode_text(whole_batch(tokenizer, scenes).tokens),
            model.encode_text(whole_batch(tokenizer, scenes, roll=-1).tokens),
        )
        selection, images = model.select(image, text), whole_batch(tokenizer, scenes).images
        misled = masked_patch_loss(
            model.reconstruct(images, stranger, selection), images, selection.masked, patch_size=PATCH
        )
    captioning, tgmim = figures["captioning"], figures["tgmim"]
    assert abs(misled.item() - true.tgmim.item()) > 1e-4 * true.tgmim.item()
    assert tgmim["l1_shuffled"] == pytest.approx(misled.item(), rel=1e-5)
    assert captioning["nats_per_token"] == pytest.approx(true.caption.item(), rel=1e-5)
    assert captioning["nats_per_token_shuffled"] == pytest.approx(other.caption.item(), rel=1e-5)
    assert captioning["gain"] == pytest.approx((other.caption - true.caption).item(), abs=1e-4)
    assert tgmim["l1"] == pytest.approx(true.tgmim.item(), rel=1e-5)
    assert tgmim["gain"] == pytest.approx(1 - tgmim["l1_shuffled"] ** -1 * tgmim["l1"], rel=1e-9)


def test_figures_are_plain_data_that_a_person_can_read(scenes, tokenizer):
    figures = judge(build(), tokenizer, scenes, examples=3)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert figures["pairs"] == 13
    assert [example["caption"] for example in figures["captioning"]["examples"]] == [s.captions[0] for s in scenes[:3]]
    lines = "\n".join(summary_lines(figures))
    for word in ("13 pairs", "text to image", "nats/token", "TG-MIM", scenes[0].captions[0]):
        assert word in lines


def test_retrieval_counts_every_caption(scenes, tokenizer):
    model = build()
    figures = judge(model, tokenizer, scenes)["retrieval"]
    with torch.no_grad():
        images = model.encode_image(whole_batch(tokenizer, scenes).images).features
        captions = [caption for s in scenes for caption in s.captions]
        texts = model.encode_text(tokenizer.encode(captions, CONFIG.text.context_length)).features
    owner = [i for i, s in enumerate(scenes) for _ in s.captions]
    for kind, choice in (("captions", range(len(owner))), ("pairs", [owner.index(i) for i in range(len(scenes))])):
        to_text, to_image = brute_ranks(images, texts[list(choice)], [owner[j] for j in choice])
        for name, ranks in (("image_to_text", to_text), ("text_to_image", to_image)):
            expected = {f"r@{k}": np.mean([rank < k for rank in ranks]) for k in (1, 5, 10)}
            assert figures[kind][name] == pytest.approx(expected)
    assert figures["captions"]["chance"]["image_to_text"]["r@1"] == pytest.approx(1 / 13)


def test_selection_figures_equal_a_plain_loop(scenes, tokenizer):
    model = build()
    figures = judge(model, tokenizer, scenes)["selection"]
    batch, other = whole_batch(tokenizer, scenes), whole_batch(tokenizer, scenes, roll=-1)
    image = model.encode_image(batch.images)
    shares, aucs = {}, {}
    for name, tokens in (("", batch.tokens), ("_shuffled", other.tokens)):
        selection = model.select(image, model.encode_text(tokens))
        shares[name], aucs[name] = [], []
        for sample, masked, scores in zip(scenes, selection.masked.tolist(), selection.scores.tolist()):
            covered = np.zeros((SIZE, SIZE))
            for region in sample.regions:
                if region.attributes["described"]:
                    x0, y0, x1, y1 = (round(edge * SIZE) for edge in region.box)
                    covered[y0:y1, x0:x1] = 1
            area = covered.reshape(4, 8, 4, 8).mean((1, 3)).ravel()
            shares[name].append(area[masked].sum() / area.sum())
            high = [s for s, a in zip(scores, area) if a >= 0.5]
            low = [s for s, a in zip(scores, area) if a < 0.5]
            if high and low:
                aucs[name].append(np.mean([(a > b) + 0.5 * (a == b) for a in high for b in low]))
    assert figures["described_share"] == pytest.approx(np.mean(shares[""]))
    assert figures["described_share_shuffled"] == pytest.approx(np.mean(shares["_shuffled"]))
    assert figures["auc"] == pytest.approx(np.mean(aucs[""]))
    assert figures["auc_shuffled"] == pytest.approx(np.mean(aucs["_shuffled"]))
    assert figures["described_share_random"] == 0.5
    assert 0 <= figures["auc_against_undescribed"] <= 1


def test_plain_colours(tokenizer):
    """One bright patch of 16: the median is the ground's colour, and only a mask over that patch costs it anything."""
    picture = np.full((SIZE, SIZE, 3), 50, dtype=np.uint8)
    picture[:PATCH, :PATCH] = 250
    model = build()
    figures = judge(model, tokenizer, [Sample(picture, ("a white patch",), "0"), Sample(picture, ("a corner",), "1")])
    image = eval_transform(picture, SIZE)
    cost = (image[:, 0, 0] - image[:, -1, -1]).abs().mean().item() / CONFIG.num_masked
    chosen = model.select(
        model.encode_image(torch.stack([image, image])),
        model.encode_text(tokenizer.encode(["a white patch", "a corner"], CONFIG.text.context_length)),
    )
    hidden = (chosen.masked == 0).any(1).double()
    assert figures["tgmim"]["l1_median_colour"] == pytest.approx(cost * hidden.mean().item(), rel=1e-5)
    # Without the bright patch among the visible ones, their mean is the ground's colour too.
    expected = [cost if bright else (1 / 8) * cost * CONFIG.num_masked for bright in hidden.bool()]
    assert figures["tgmim"]["l1_visible_mean_colour"] == pytest.approx(np.mean(expected), rel=1e-5)


def without(*names, **masking):
    objectives = tuple(o for o in CONFIG.objectives if o not in names)
    return replace(CONFIG, objectives=objectives, masking=replace(CONFIG.masking, **masking))


@pytest.mark.parametrize(
    "config, absent",
    [
        (without("tgmim", drop_ratio=0.0), {"tgmim", "selection"}),
        (without("ic", "tgmim"), {"captioning", "tgmim", "selection"}),
        (without("itc"), {"retrieval"}),
        (without("tgmim"), {"tgmim"}),
        (
            replace(without(attentive_start=1.0), loss=replace(CONFIG.loss, local_weight=0.0)),
            {"selection"},
        ),
        (without(score_space="itc", block=2, masked_input="token"), set()),
        (without(score_space="value"), set()),
        (without(mask_by="random", drop_by="oracle"), {"selection"}),
        (without(mask_by="random"), set()),
    ],
    ids=["CoCa", "CLIP", "no ITC", "IC masks only", "random masks", "blocks", "values", "oracle", "IC by score"],
)
def test_what_is_not_learned_is_null(scenes, tokenizer, config, absent):
    figures = judge(build(config), tokenizer, scenes[:6])
    known = {"retrieval", "captioning", "tgmim", "selection"}
    assert {name for name in known if figures[name] is None} == absent
    assert summary_lines(figures)


def test_normalised_predictions_have_no_rival_colour(scenes, tokenizer):
    config = replace(CONFIG, loss=replace(CONFIG.loss, tgmim_kind="mse_normalised"))
    tgmim = judge(build(config), tokenizer, scenes[:6])["tgmim"]
    assert tgmim["l1"] > 0
    assert tgmim["l1_median_colour"] is tgmim["l1_visible_mean_colour"] is None


def test_predicted_features_are_judged_by_the_models_own(scenes, tokenizer):
    config = replace(CONFIG, loss=replace(CONFIG.loss, tgmim_kind="ema_features"))
    model, batch = build(config), whole_batch(tokenizer, scenes)
    figures = judge(model, tokenizer, scenes)
    with torch.no_grad():
        image, text = model.encode_image(batch.images), model.encode_text(batch.tokens)
        masked = model.select(image, text).masked
        predicted = model.reconstruct(batch.images, text, model.select(image, text))
    deviation, mean = torch.std_mean(image.patches, dim=2, correction=0, keepdim=True)
    target = torch.stack([row[index] for row, index in zip((image.patches - mean) / deviation, masked)])
    tgmim = figures["tgmim"]
    assert tgmim["l1"] == pytest.approx((predicted - target).abs().mean().item(), rel=1e-4)
    assert tgmim["l1_shuffled"] != tgmim["l1"] and tgmim["gain"] is not None
    assert tgmim["l1_median_colour"] is tgmim["l1_visible_mean_colour"] is None
    assert summary_lines(figures)


def test_a_diverged_model_has_no_figures_and_finds_nothing(scenes, tokenizer):
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    figures = judge(model, tokenizer, scenes, examples=0)
    assert figures["captioning"]["nats_per_token"] is figures["tgmim"]["l1"] is None
    assert figures["retrieval"]["pairs"]["text_to_image"]["r@1"] == 0
    json.dumps(figures, allow_nan=False)
    assert summary_lines(figures)


def test_one_pair_has_no_stranger(scenes, tokenizer):
    figures = judge(build(), tokenizer, scenes, pairs=1)
    assert figures["pairs"] == 1
    assert figures["captioning"]["nats_per_token"] > 0
    assert figures["captioning"]["nats_per_token_shuffled"] is figures["captioning"]["gain"] is None
    assert figures["tgmim"]["l1_shuffled"] is figures["selection"]["described_share_shuffled"] is None


def equal(left, right, rel):
    """Whether two results are the same up to the rounding of their numbers."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left.keys() - {"seconds"}:
            equal(left[key], right[key], rel)
    elif isinstance(left, float):
        assert left == pytest.approx(right, rel=rel, abs=1e-9)
    else:
        assert left == right


def test_unreadable_pairs_are_left_out_and_counted(scenes, tokenizer):
    model = build()
    broken = judge(model, tokenizer, Held(scenes, broken=(0, 4, 12)))
    assert broken["skipped"] == {"unreadable image": 3}
    sound = judge(model, tokenizer, [s for i, s in enumerate(scenes) if i not in (0, 4, 12)])
    equal(broken | {"skipped": {}}, sound, rel=1e-5)


def test_no_usable_pair_is_an_error(scenes, tokenizer):
    with pytest.raises(ValueError, match="none of the first 2 held-out pairs"):
        judge(build(), tokenizer, Held(scenes, broken=(0, 1)), pairs=2)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_find_what_one_process_finds(scenes, tokenizer, world_size):
    """13 pairs fill no equal slices; one is unreadable, at the seam of two."""
    model, dataset = build(), Held(scenes, broken=(6,))
    alone = judge(model, tokenizer, dataset, examples=2)
    results = run_ranks(
        lambda rank, world: judge(model, tokenizer, dataset, examples=2, group=dist.group.WORLD), world_size
    )
    for result in results:
        equal(result, alone, rel=1e-5)
    assert alone["skipped"] == {"unreadable image": 1}


def test_boxes_follow_the_crop(tokenizer):
    """A wide image loses its sides: the box of the middle third is the whole picture the model sees."""
    wide = np.random.default_rng(0).integers(0, 255, (SIZE, 3 * SIZE, 3), dtype=np.uint8)
    middle = Region("the middle", (1 / 3, 0.0, 2 / 3, 1.0), 0)
    side = Region("the side", (0.0, 0.0, 1 / 3, 1.0), 0)
    whole = judge(build(), tokenizer, [Sample(wide, ("a",), "0", (middle,)), Sample(wide, ("b",), "1", (middle,))])
    assert whole["selection"]["described_share"] == 0.5
    assert whole["selection"]["auc"] is None
    gone = judge(build(), tokenizer, [Sample(wide, ("a",), "0", (side,)), Sample(wide, ("b",), "1", (side,))])
    assert gone["selection"]["described_share"] is None
