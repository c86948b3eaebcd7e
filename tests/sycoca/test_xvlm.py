"""X-VLM: what its losses are, what they ignore, and that sharing work changes nothing."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bench.xvlm_published import published_region_losses
from sycoca.config import ConfigError, LossConfig
from sycoca.hub import load_pretrained
from sycoca.masking import StepPlan
from sycoca.model import parameter_groups
from sycoca.regions import RegionBatch, cells, whole
from sycoca.tokenizer import Tokenizer
from sycoca.xvlm import XVLM, XBatch
from tests.sycoca.micro import MICRO, gradients
from tests.sycoca.micro_xvlm import MICRO_XVLM, build, micro_xvlm, pairs, regions, step, texts

PLAN = StepPlan(False, False)
LENGTHS, REGION_LENGTHS = [7, 3, 9, 5], [2, 4, 1, 9, 3, 2, 6, 2]
FORMS = ("local", "pooled")


def losses(model, batch):
    return model(batch, PLAN)


def test_shared_work_gives_the_losses_and_gradients_of_the_published_composition():
    model = build(MICRO_XVLM)
    batch = step(MICRO_XVLM, LENGTHS, REGION_LENGTHS)
    found = model.region_losses(batch.regions, batch.masked_regions)
    found.total.backward()
    ours = gradients(model)
    model.zero_grad()
    expected = published_region_losses(model, batch.regions, batch.masked_regions)
    expected["total"].backward()
    theirs = gradients(model)
    for name, loss in expected.items():
        assert getattr(found, name).item() == pytest.approx(loss.item(), rel=2e-5), name
    assert ours.keys() == theirs.keys()
    for name, truth in theirs.items():
        assert (ours[name] - truth).norm() <= 1e-4 * truth.norm() + 1e-7, name


@pytest.mark.parametrize("form", FORMS)
def test_a_box_of_the_whole_image_is_the_image(form):
    config = micro_xvlm(vision={"region_form": form})
    model, images = build(config), pairs([1] * 3).images
    with torch.no_grad():
        image = model.encode_image(images)
        seen = model.encode_regions(images, whole(3, (4, 4)), torch.arange(3))
        text = model.encode_text(texts([4, 2, 8]))
        assert torch.allclose(seen.features, image.features, atol=1e-6)
        for views in (seen.images, model.view_images(image)):
            assert torch.allclose(model.match(text, seen.boxes), model.match(text, views), atol=1e-5)
        # Beside real boxes, whose images it shares.
        rects = torch.cat([whole(1, (4, 4)), cells(torch.tensor([[0.3, 0.6, 0.4, 0.3]]), (4, 4))])
        mixed = model.encode_regions(images, rects, torch.tensor([2, 2]))
        assert torch.allclose(mixed.features[0], image.features[2], atol=1e-6)
        assert not torch.allclose(mixed.features[1], image.features[2], atol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_a_box_does_not_see_what_is_outside(form):
    """With boxes in every block the rest of the picture does not matter; pooled, it does, by way of the others."""
    config = micro_xvlm(vision={"region_form": form, "local_depth": 3})
    model, images = build(config), pairs([1]).images
    rects = cells(torch.tensor([[0.25, 0.25, 0.5, 0.5]]), (4, 4))
    assert rects.tolist() == [[0, 0, 2, 2]]
    other = images.clone()
    other[:, :, 8:] += 1.0
    with torch.no_grad():
        features = [model.encode_regions(x, rects, torch.zeros(1, dtype=torch.int64)).features for x in (images, other)]
    assert torch.allclose(*features, atol=1e-6) == (form == "local")


@pytest.mark.parametrize("form", FORMS)
def test_padding_and_company_do_not_matter(form):
    """Losses of a batch trimmed to its longest text are those of the padded one; a box is encoded alike alone."""
    config = micro_xvlm(vision={"region_form": form})
    model = build(config)
    batch = step(config, [3, 2, 4, 1], [2, 4, 1, 3, 3, 2, 2, 2])
    short = [part._replace(tokens=part.tokens[:, :5]) for part in (batch.pairs, batch.regions)]
    masked = [part._replace(tokens=part.tokens[:, :5]) for part in batch[2:]]
    with torch.no_grad():
        whole_batch, trimmed = losses(model, batch), losses(model, XBatch(*short, *masked))
        assert torch.allclose(torch.stack(whole_batch), torch.stack(trimmed), rtol=1e-5)
        r = batch.regions
        together = model.encode_regions(r.images, r.rects, r.image_index).features
        for e in (1, 4):
            image = r.images[r.image_index[e], None]
            alone = model.encode_regions(image, r.rects[e, None], torch.zeros(1, dtype=torch.int64)).features
            assert torch.allclose(alone[0], together[e], atol=1e-6)


def test_contrast_of_boxes_counts_equal_ids_as_positives():
    model = build(MICRO_XVLM)
    batch = step(MICRO_XVLM, LENGTHS, REGION_LENGTHS)
    r = batch.regions
    with torch.no_grad():
        image = model.encode_regions(r.images, r.rects, r.image_index).features
        logits = model.logit_scale() * image @ model.encode_text(r.tokens).features.T
        for ids in (r.ids, torch.tensor([1, 2, 1, 3, 4, 2, 1, 5])):
            same = (ids[:, None] == ids).float()
            target = same / same.sum(1, keepdim=True)
            dense = -(target * logits.log_softmax(1)).sum(1) - (target * logits.T.log_softmax(1)).sum(1)
            found = losses(model, batch._replace(regions=r._replace(ids=ids))).region_itc
            assert found.item() == pytest.approx(dense.mean().item() / 2, rel=1e-5)
        plain = F.cross_entropy(logits, torch.arange(8)) + F.cross_entropy(logits.T, torch.arange(8))
        assert losses(model, batch).region_itc.item() == pytest.approx(plain.item() / 2, rel=1e-5)


def test_losses_of_a_fresh_model_are_those_of_knowing_nothing():
    torch.manual_seed(0)
    model = type(build(MICRO_XVLM))(replace(MICRO_XVLM, logit_scale_init=1.0))
    found = losses(model, step(MICRO_XVLM, [5] * 16, [3] * 16))
    assert found.itc.item() == pytest.approx(math.log(16), rel=0.1)
    assert found.region_itc.item() == pytest.approx(math.log(16), rel=0.1)
    assert found.mlm.item() == pytest.approx(math.log(37), rel=0.25)
    assert 0.5 < found.itm.item() < 1.2 and 0 < found.l1.item() < 2 and 0 < found.giou.item() < 2


def test_whole_images_have_no_box():
    model, batch = build(MICRO_XVLM), step(MICRO_XVLM, LENGTHS, REGION_LENGTHS)
    r = batch.regions
    elsewhere = r.boxes.clone()
    elsewhere[~r.has_box] = 0.123
    kept = losses(model, batch)
    assert torch.equal(
        torch.stack(kept), torch.stack(losses(model, batch._replace(regions=r._replace(boxes=elsewhere))))
    )
    nowhere = r._replace(has_box=torch.zeros(8, dtype=torch.bool))
    none = losses(model, batch._replace(regions=nowhere))
    assert none.l1.item() == none.giou.item() == 0
    (none.l1 + none.giou).backward()
    assert all(g.isfinite().all() and g.abs().max() == 0 for g in gradients(model).values())


def test_boxes_that_are_found_cost_nothing():
    model, batch = build(MICRO_XVLM), step(MICRO_XVLM, LENGTHS, REGION_LENGTHS)
    r = batch.regions
    with torch.no_grad():
        seen = model.encode_regions(r.images, r.rects, r.image_index)
        views = seen.images._replace(seen=seen.images.seen.of(r.image_index))
        found = model.locate(model.encode_text(r.tokens), views)
        exact = losses(model, batch._replace(regions=r._replace(boxes=found)))
    assert found.shape == (8, 4) and ((found > 0) & (found < 1)).all()
    assert exact.l1.item() == pytest.approx(0, abs=1e-5) and exact.giou.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_boxes_alone_are_regressed_from_whole_images(form, monkeypatch):
    """Without a loss that looks into boxes none is encoded, and the box losses are the same."""
    both = micro_xvlm(vision={"region_form": form}, objectives=("itc", "bbox"))
    batch = step(both, LENGTHS, REGION_LENGTHS)
    expected, alone = losses(build(both), batch), build(replace(both, objectives=("bbox",)))
    monkeypatch.setattr(alone, "encode_regions", pytest.fail)
    found = losses(alone, batch)
    assert found.l1.item() == pytest.approx(expected.l1.item(), rel=1e-5)
    assert found.giou.item() == pytest.approx(expected.giou.item(), rel=1e-5)
    assert found.total.item() == pytest.approx((found.l1 + found.giou).item()) and found.region_itc.item() == 0


def test_a_batch_without_a_negative():
    model = build(MICRO_XVLM)
    batch = step(MICRO_XVLM, LENGTHS, REGION_LENGTHS, ids=torch.full((8,), 5))
    found = losses(model, batch)
    assert torch.stack(found).isfinite().all()
    with torch.no_grad():
        r = batch.regions
        seen = model.encode_regions(r.images, r.rects, r.image_index)
        logits = model.match(model.encode_text(r.tokens), seen.boxes)
        # Only the pairs that match are left.
        assert found.region_itm.item() == pytest.approx(-logits.log_softmax(1)[:, 1].mean().item(), rel=1e-5)
    found.total.backward()
    assert all(g.isfinite().all() for g in gradients(model).values())
    single = losses(model, step(MICRO_XVLM, [3], [4]))
    assert torch.stack(single).isfinite().all()


def test_texts_without_a_word():
    model = build(MICRO_XVLM)
    found = losses(model, step(MICRO_XVLM, [0, 0, 4], [0, 0, 0, 0]))
    assert torch.stack(found).isfinite().all() and found.region_mlm.item() == 0
    found.total.backward()
    assert all(g.isfinite().all() for g in gradients(model).values())


def test_hidden_words_are_read_from_the_picture_too():
    model, batch = build(MICRO_XVLM), step(MICRO_XVLM, LENGTHS, REGION_LENGTHS)
    with torch.no_grad():
        other = batch.pairs._replace(images=batch.pairs.images.flip(0))
        assert losses(model, batch).mlm.item() != losses(model, batch._replace(pairs=other)).mlm.item()
        # What the labels say is all that counts of the hidden words.
        unseen = batch.masked._replace(labels=torch.full_like(batch.masked.labels, -1))
        assert losses(model, batch._replace(masked=unseen)).mlm.item() == 0


@pytest.mark.parametrize(
    ("objectives", "kind"),
    [
        (("itc", "itm"), "causal"),
        (("itc", "ic", "tgmim", "itm", "bbox"), "causal"),
        (("itc", "ic"), "causal"),
        (("bbox",), "bidirectional"),
        (("itc", "mlm"), "bidirectional"),
        (("itm",), "bidirectional"),
    ],
)
def test_objectives_in_company(objectives, kind):
    text = MICRO.text if kind == "causal" else MICRO_XVLM.text
    config = replace(MICRO_XVLM, objectives=objectives, text=text, masking=MICRO.masking)
    model = build(config)
    built = {
        name for name in ("fusion", "itm_head", "box_head", "word_head", "caption_decoder") if getattr(model, name)
    }
    wanted = {"itm": "itm_head", "mlm": "word_head", "bbox": "box_head", "ic": "caption_decoder"}
    fused = {"fusion"} if {"itm", "mlm", "bbox"} & set(objectives) else set()
    assert built == fused | {wanted[name] for name in objectives if name in wanted}
    batch = step(config, LENGTHS, REGION_LENGTHS)
    if kind == "causal":
        # [SOT] words [EOT]
        for part in (batch.pairs, batch.regions):
            part.tokens[torch.arange(len(part.tokens)), (part.tokens != 0).sum(1).clamp(max=9)] = 2
    found = losses(model, batch)
    found.total.backward()
    assert found.total.isfinite()
    counted = {name: p for name, p in model.named_parameters() if p.grad is None}
    unused = {"text_projection", "image_projection", "logit_scale"} if "itc" not in objectives else set()
    assert {name.split(".")[0] for name in counted} <= unused | {"text"}, counted.keys()


def test_sycoca_with_boxes_keeps_its_image_losses():
    config = replace(
        MICRO_XVLM, objectives=("itc", "ic", "tgmim", "itm", "bbox"), text=MICRO.text, masking=MICRO.masking
    )
    model = build(config)
    batch = step(config, LENGTHS, REGION_LENGTHS)
    with torch.no_grad():
        found = losses(model, batch)
        alone = super(type(model), model).forward(batch.pairs, PLAN)
    assert found[1:6] == alone[1:]


def test_refused_by_name():
    model = build(replace(MICRO_XVLM, objectives=("itc", "itm")))
    text, views = model.encode_text(texts([2])), model.view_images(model.encode_image(pairs([1]).images))
    with pytest.raises(ValueError, match="without the objective 'bbox'"):
        model.locate(text, views)
    model = build(replace(MICRO_XVLM, objectives=("itc",)))
    with pytest.raises(ValueError, match="without 'itm', 'mlm' and 'bbox'"):
        model.view_images(model.encode_image(pairs([1]).images))
    with pytest.raises(ConfigError, match="mlm' fills in words from both sides"):
        replace(MICRO_XVLM, text=MICRO.text)
    with pytest.raises(ConfigError, match="local_depth: 4 of 3 blocks"):
        micro_xvlm(vision={"local_depth": 4})
    with pytest.raises(ConfigError, match=r"vision.pooler: 'single' mixes"):
        micro_xvlm(vision={"pooler": "single", "pooler_heads": 2})


def test_weights_of_the_losses():
    loss = {"itm_weight": 0.5, "mlm_weight": 2.0, "l1_weight": 5.0, "giou_weight": 3.0, "region_weight": 0.25}
    config = micro_xvlm(loss=loss)
    found = losses(build(config), step(config, LENGTHS, REGION_LENGTHS))
    region = found.region_itc + 0.5 * found.region_itm + 2 * found.region_mlm + 5 * found.l1 + 3 * found.giou
    expected = found.itc + 0.5 * found.itm + 2 * found.mlm + 0.25 * region
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert not replace(config, loss=LossConfig(l1_weight=0.0, giou_weight=0.0)).learns("bbox")


@pytest.mark.parametrize("form", FORMS)
def test_recomputing_blocks_changes_nothing(form):
    found = []
    for recompute in (False, True):
        config = micro_xvlm(vision={"region_form": form}, gradient_checkpointing=recompute)
        model = build(config)
        losses(model, step(config, LENGTHS, REGION_LENGTHS)).total.backward()
        found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("form", FORMS)
def test_mixed_precision_takes_the_unpacked_way(form):
    """Under autocast nothing is fused by hand; losses agree to the rounding of 16-bit products."""
    config = micro_xvlm(vision={"region_form": form})
    model, batch = build(config), step(config, LENGTHS, REGION_LENGTHS)
    exact = losses(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(model, batch)
    for name in ("itc", "mlm", "region_itc", "region_mlm", "l1", "giou"):
        assert getattr(found, name).item() == pytest.approx(getattr(exact, name).item(), rel=0.05), name
    found.total.backward()
    assert all(g.isfinite().all() for g in gradients(model).values())


def test_every_parameter_is_in_one_group():
    model = build(MICRO_XVLM)
    groups = parameter_groups(model, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    decayed = {id(p) for p in groups[0]["params"]}
    assert id(model.text.sequence.tokens.weight) in decayed and id(model.text.sequence.tokens.bias) not in decayed
    assert id(model.fusion.places.pos) not in decayed


def test_attention_can_be_kept_for_a_map():
    model = build(MICRO_XVLM)
    r = regions(REGION_LENGTHS)
    text = model.encode_text(r.tokens)
    seen = model.encode_regions(r.images, r.rects, r.image_index)
    plain = model.match(text, seen.boxes)
    cross = model.fusion.blocks[0].cross
    cross.kept = []
    kept = model.match(text, seen.boxes)
    (P,), cross.kept = cross.kept, None
    assert torch.allclose(plain, kept, atol=1e-5)
    assert P.shape[:3] == (8, 2, 10) and torch.allclose(P.sum(3), torch.ones(8, 2, 10))
    (dP,) = torch.autograd.grad(kept[:, 1].sum(), P)
    assert (
        dP.abs().max() > 0
        and P[:, :, :, 1:][~seen.boxes.seen.valid[:, None, None, 1:].expand_as(P[..., 1:])].max() == 0
    )


def test_a_folder_holds_it_all(tmp_path):
    tokenizer = Tokenizer.train_wordpiece(["a red disc above a blue star"], 37)
    model = build(MICRO_XVLM).eval()
    model.save_pretrained(tmp_path, tokenizer=tokenizer)
    again, words, _ = load_pretrained(tmp_path)
    tokens, images = words.encode(["a red disc", "a star"], 10), pairs([1, 1]).images
    with torch.no_grad():
        found = [m.locate(m.encode_text(tokens), m.view_images(m.encode_image(images))) for m in (model, again)]
    assert isinstance(again, XVLM) and torch.equal(*found)
    larger = load_pretrained(tmp_path, image_size=24).model
    assert larger.fusion.places.pos.shape == larger.vision.sequence.pos.shape == (36, 32)


def test_a_region_batch_without_texts_or_images_is_refused_by_name():
    model, batch = build(MICRO_XVLM), step(MICRO_XVLM, [3, 4], [2, 3, 4])
    none = RegionBatch(*(part if name == "images" else part[:0] for name, part in batch.regions._asdict().items()))
    with pytest.raises(ValueError, match="region batch: 0 texts of 2 images"):
        model.region_losses(none)
    with pytest.raises(ValueError, match="region batch: 3 texts of 0 images"):
        model.region_losses(batch.regions._replace(images=batch.regions.images[:0]))


def test_gradients_do_not_depend_on_the_order_of_threads():
    """At sizes at which an index in brackets would be added up by several threads at once."""
    threads = torch.get_num_threads()
    batch = step(MICRO_XVLM, [3] * 8, [1 + n % 9 for n in range(96)])
    found = []
    try:
        torch.set_num_threads(2)
        for _ in range(4):
            model = build(MICRO_XVLM)
            losses(model, batch).total.backward()
            found.append(gradients(model))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(g, found[0][name]) for name, g in other.items())
