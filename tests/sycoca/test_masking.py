"""Choice of patches: score of each space, random masks, and the plan of a step."""

import pytest
import torch
import torch.nn.functional as F

from sycoca.masking import hash_int, hash_tensor, overlap, select_at_random, select_described, step_plan
from tests.sycoca.micro import batch, build, micro

SPACES = ("itc", "value", "local")


def layer_norm(x, module):
    return F.layer_norm(x, x.shape[-1:], module.weight, module.bias)


def last_values(model, images):
    """Values of the last block for each patch alone, written out from the weights."""
    vision = model.vision
    x = vision.ln_pre(vision.sequence(vision.embed(images)))
    for block in vision.blocks[:-1]:
        x = block(x)
    last = vision.blocks[-1]
    D = x.shape[-1]
    v = layer_norm(x, last.ln_attn) @ last.attn.qkv.weight[2 * D :].T + last.attn.qkv.bias[2 * D :]
    out = v @ last.attn.out.weight.T + last.attn.out.bias
    return layer_norm(out, vision.ln_post)[:, 1:]


def operands(model, images, tokens, space):
    image, text = model.encode_image(images), model.encode_text(tokens)
    project_image, project_text = model.image_projection.weight.T, model.text_projection.weight.T
    if space == "itc":
        return image.patches @ project_image, layer_norm(text.words, model.text.ln_final) @ project_text
    if space == "value":
        B, T = tokens.shape
        return last_values(model, images) @ project_image, text.features[:, None].expand(B, T, -1)
    heads = model.local
    return image.patches @ heads.image.weight.T, layer_norm(text.words, heads.ln_text) @ heads.text.weight.T


@pytest.mark.parametrize("space", SPACES)
@torch.no_grad()
def test_score_is_the_best_cosine_over_words(space):
    model = build(micro(masking={"score_space": space}))
    # The last caption has no valid token: all its scores are 0.
    data = batch([3, 8, 0, 1, -1])
    selection = model.select(model.encode_image(data.images), model.encode_text(data.tokens))
    patches, words = operands(model, data.images, data.tokens, space)
    expected = torch.zeros_like(selection.scores)
    for b, length in enumerate([3, 8, 0, 1]):
        for i in range(16):
            # Words and [EOT], without [SOT] and padding.
            cosines = [F.cosine_similarity(patches[b, i], words[b, j], dim=0) for j in range(1, length + 2)]
            expected[b, i] = max(cosines)
    torch.testing.assert_close(selection.scores, expected, rtol=1e-5, atol=1e-6)
    order = expected.argsort(dim=1, descending=True, stable=True)
    assert torch.equal(selection.masked[:4], order[:4, :8].sort(dim=1).values)
    assert torch.equal(selection.masked[4], torch.arange(8))


@pytest.mark.parametrize("space", SPACES)
def test_at_one_half_captioning_keeps_what_tgmim_masks(space):
    model = build(micro(masking={"score_space": space}))
    data = batch([3, 8, 0, 1])
    selection = model.select(model.encode_image(data.images), model.encode_text(data.tokens))
    assert torch.equal(selection.kept, selection.masked)
    assert torch.equal(selection.dropped, selection.visible)
    assert not any(part.requires_grad for part in selection)


def test_random_lists_follow_their_scores():
    config = micro(masking={"mask_ratio": 0.3, "drop_ratio": 0.6})
    selection = select_at_random(torch.arange(50), config)
    order = selection.scores.argsort(dim=1, descending=True, stable=True)
    for part, expected in (
        (selection.masked, order[:, :4]),
        (selection.visible, order[:, 4:]),
        (selection.dropped, order[:, 7:]),
        (selection.kept, order[:, :7]),
    ):
        assert torch.equal(part, expected.sort(dim=1).values)


def test_random_masks_belong_to_the_sample():
    seeds = torch.tensor([5, -3, 2**62, 5])
    together, alone = select_at_random(seeds, micro()), select_at_random(seeds[1:2], micro())
    assert torch.equal(together.masked[1:2], alone.masked)
    assert torch.equal(together.masked[0], together.masked[3])
    assert not torch.equal(together.masked[0], together.masked[2])


def test_random_masks_are_uniform():
    config = micro()
    masked = select_at_random(torch.arange(4000), config).masked
    rate = torch.bincount(masked.flatten(), minlength=16) / 4000
    # Five standard deviations of a share of 4000 draws.
    assert (rate - 0.5).abs().max() < 5 * 0.5 / 4000**0.5
    pairs = F.one_hot(masked, 16).sum(1).float()
    together = (pairs.T @ pairs) / 4000
    off_diagonal = together[~torch.eye(16, dtype=torch.bool)]
    assert (off_diagonal - 0.5 * 7 / 15).abs().max() < 5 * 0.5 / 4000**0.5


def test_random_blocks_stay_whole():
    masked = select_at_random(torch.arange(20), micro(masking={"block": 2})).masked
    chosen = torch.zeros(20, 16).scatter(1, masked, 1.0).view(20, 2, 2, 2, 2)
    assert torch.equal(chosen.amin((2, 4)), chosen.amax((2, 4)))
    assert torch.equal(chosen.sum((1, 2, 3, 4)), torch.full((20,), 8.0))


def test_attentive_blocks_stay_whole():
    model = build(micro(masking={"block": 2}))
    data = batch([3, 8, 2])
    masked = model.select(model.encode_image(data.images), model.encode_text(data.tokens)).masked
    chosen = torch.zeros(3, 16).scatter(1, masked, 1.0).view(3, 2, 2, 2, 2)
    assert torch.equal(chosen.amin((2, 4)), chosen.amax((2, 4)))


def test_hash_is_splitmix64_on_host_and_in_tensors():
    # First outputs of SplitMix64 seeded with 0, from its published reference.
    assert hash_int(0) == 0xE220A8397B1DCDAF
    assert hash_int(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4
    inputs = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    outputs = hash_tensor(torch.tensor(inputs)).tolist()
    assert [x % 2**64 for x in outputs] == [hash_int(x % 2**64) for x in inputs]


def test_overlap():
    first = torch.tensor([[0, 1], [2, 3]])
    assert overlap(first, torch.tensor([[0, 1], [3, 1]]), 4) == 0.75
    assert overlap(first[:, :0], first[:, :0], 4) == 1.0


def test_plan_starts_attentive_and_masks_captioning_on_its_share():
    config = micro(masking={"attentive_start": 0.25, "ic_mask_prob": 0.3})
    plans = [step_plan(config, step, 4000, seed=11) for step in range(4000)]
    assert [plan.attentive for plan in plans] == [step >= 1000 for step in range(4000)]
    assert not any(plan.mask_captioning for plan in plans[:1000])
    share = sum(plan.mask_captioning for plan in plans) / 3000
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / 3000) ** 0.5
    other = [step_plan(config, step, 4000, seed=12).mask_captioning for step in range(4000)]
    assert other != [plan.mask_captioning for plan in plans]


def test_plan_of_a_model_without_masks():
    coca = micro(masking={"drop_ratio": 0.0}, loss={"tgmim_weight": 0.0})
    assert step_plan(coca, 3, 4, seed=0) == (False, False, False)
    tgmim_only = micro(masking={"drop_ratio": 0.0})
    assert step_plan(tgmim_only, 3, 4, seed=0) == (True, False, True)


def test_plan_leaves_tgmim_out_until_its_start():
    config = micro(masking={"tgmim_start": 0.3, "attentive_start": 0.6})
    plans = [step_plan(config, step, 10, seed=0) for step in range(10)]
    assert [plan.reconstruct for plan in plans] == [step >= 3 for step in range(10)]
    assert [plan.attentive for plan in plans] == [step >= 6 for step in range(10)]


def test_the_oracle_takes_described_patches_first_and_draws_among_equals():
    config = micro(masking={"mask_by": "oracle", "drop_by": "oracle", "mask_ratio": 0.25})
    described = torch.zeros(3000, 16)
    described[:, [2, 7, 9]] = torch.tensor([0.5, 1 / 64, 1.0])
    chosen = select_described(described, torch.arange(3000), config)
    assert (chosen.masked[:, :, None] == torch.tensor([2, 7, 9])).any(1).all()
    rest = torch.bincount(chosen.masked.flatten(), minlength=16).float() / 3000
    undescribed = torch.tensor([i not in (2, 7, 9) for i in range(16)])
    # Five standard deviations of a share of 3,000 draws.
    assert (rest[undescribed] - 1 / 13).abs().max() < 5 * (1 / 13 / 3000) ** 0.5
    assert torch.equal(chosen.kept, select_described(described, torch.arange(3000), micro()).masked)


def test_the_oracle_keeps_blocks_whole():
    described = torch.zeros(4, 16)
    described[:, 10] = 1.0
    config = micro(masking={"block": 2, "mask_ratio": 0.25})
    assert torch.equal(
        select_described(described, torch.arange(4), config).masked, torch.tensor([[10, 11, 14, 15]] * 4)
    )
