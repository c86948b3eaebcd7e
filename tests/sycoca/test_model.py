"""The whole model: losses, gradients, and what it becomes without its parts."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import PatchSelection
from sycoca.layers import LogitScale
from sycoca.model import Batch, SyCoCa, parameter_groups
from sycoca.packing import Packing
from sycoca.vision import patchify
from tests.sycoca.micro import ATTENTIVE, MICRO, RANDOM, batch, build, gradients, micro

LENGTHS = [3, 8, 0, 5]


def norm(x, module):
    return F.layer_norm(x, x.shape[-1:], module.weight, module.bias)


def attention(x, memory, module, seen=None):
    """Multi-head attention written out, one head at a time."""
    width, heads = x.shape[-1], module.heads
    if hasattr(module, "qkv"):
        q, k, v = (x @ module.qkv.weight.T + module.qkv.bias).chunk(3, dim=-1)
    else:
        q = x @ module.q.weight.T + module.q.bias
        k, v = (memory @ module.kv.weight.T + module.kv.bias).chunk(2, dim=-1)
    out = []
    for q_h, k_h, v_h in zip(q.split(width // heads, -1), k.split(width // heads, -1), v.split(width // heads, -1)):
        logits = q_h @ k_h.mT / (width // heads) ** 0.5
        if seen is not None:
            logits = logits.masked_fill(~seen, -torch.inf)
        out.append(logits.softmax(-1) @ v_h)
    return torch.cat(out, -1) @ module.out.weight.T + module.out.bias


def mlp(x, module):
    return F.gelu(x @ module.up.weight.T + module.up.bias) @ module.down.weight.T + module.down.bias


def block(x, module, seen=None):
    x = x + attention(norm(x, module.ln_attn), None, module.attn, seen)
    return x + mlp(norm(x, module.ln_mlp), module.mlp)


def coca_losses(model, data):
    """ITC and captioning losses of CoCa, written out in fp64 from the weights."""
    images, tokens = data.images.double(), data.tokens
    B, T = tokens.shape
    vision, text, decoder = model.vision, model.text, model.caption_decoder

    x = patchify(images, 4) @ vision.embed.proj.weight.T + vision.sequence.pos
    x = norm(torch.cat([vision.sequence.cls.expand(B, 1, -1), x], 1), vision.ln_pre)
    for module in vision.blocks:
        x = block(x, module)
    x = norm(x, vision.ln_post)
    image, patches = F.normalize(x[:, 0] @ model.image_projection.weight.T, dim=1), x[:, 1:]

    ends = (tokens == 2).long().cumsum(1)
    valid = (ends == 0) | ((ends == 1) & (tokens == 2))
    y = text.sequence.tokens.weight[tokens] + text.sequence.pos
    y = torch.cat([y, text.sequence.cls.expand(B, 1, -1)], 1)
    seen = torch.ones(T + 1, T + 1, dtype=torch.bool).tril().repeat(B, 1, 1)
    seen[:, T, :T] = valid
    for module in text.blocks:
        y = block(y, module, seen)
    caption = F.normalize(norm(y[:, -1], text.ln_final) @ model.text_projection.weight.T, dim=1)

    logits = image @ caption.T * model.logit_scale.log_scale.exp()
    target = torch.arange(B)
    itc = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    z = y[:, : T - 1]
    for causal, cross in zip(decoder.blocks[::2], decoder.blocks[1::2]):
        z = block(z, causal, seen[:, : T - 1, : T - 1])
        z = z + attention(norm(z, cross.ln_attn), norm(patches, cross.ln_memory), cross.attn)
        z = z + mlp(norm(z, cross.ln_mlp), cross.mlp)
    logits = norm(z, decoder.head.norm) @ decoder.head.weight.T
    return itc, F.cross_entropy(logits[valid[:, 1:]], tokens[:, 1:][valid[:, 1:]])


COCA = {"masking": {"drop_ratio": 0.0}, "loss": {"tgmim_weight": 0.0}}


def test_coca_is_the_written_out_model():
    model, data = build(micro(**COCA)), batch(LENGTHS)
    losses = model(data, ATTENTIVE)
    losses.total.backward()
    double = build(micro(**COCA)).double()
    itc, caption = coca_losses(double, data)
    (itc + 2 * caption).backward()
    torch.testing.assert_close(losses.itc.double(), itc, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.caption.double(), caption, rtol=1e-6, atol=0)
    truth = gradients(double)
    for name, grad in gradients(model).items():
        assert (grad - truth[name]).norm() <= 2e-5 * truth[name].norm() + 1e-7, name
    assert set(truth) == set(gradients(model))


@pytest.mark.parametrize("space", ["itc", "value", "local"])
def test_without_masks_it_is_coca_bit_for_bit(space):
    data = batch(LENGTHS)
    coca = build(micro(objectives=("itc", "ic"), **COCA))
    plain = coca(data, RANDOM)
    plain.total.backward()
    config = micro(masking=COCA["masking"] | {"score_space": space}, loss=COCA["loss"])
    sycoca = build(config)
    losses = sycoca(data, ATTENTIVE)
    losses.total.backward()
    assert sycoca.image_decoder is None and sycoca.local is None
    assert losses.total == losses.itc + 2 * losses.caption
    for a, b in zip(losses, plain):
        assert torch.equal(a, b)
    expected = gradients(coca)
    assert list(gradients(sycoca)) == list(expected)
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients(sycoca).items())
    with pytest.raises(ValueError, match="masks no patches"):
        sycoca.select(sycoca.encode_image(data.images), sycoca.encode_text(data.tokens))


def test_masks_leave_the_clean_pass_alone():
    data = batch(LENGTHS)
    model = build(MICRO)
    coca = SyCoCa(micro(**COCA))
    coca.load_state_dict({name: p for name, p in model.state_dict().items() if name in coca.state_dict()})
    plain, random, attentive = coca(data, RANDOM), model(data, RANDOM), model(data, ATTENTIVE)
    assert torch.equal(plain.itc, random.itc) and torch.equal(plain.itc, attentive.itc)
    assert torch.equal(plain.caption, random.caption) and not torch.equal(plain.caption, attentive.caption)


def test_caption_loss_is_that_of_the_logits():
    model, data = build(MICRO), batch(LENGTHS)
    logits = model.caption_logits(model.encode_image(data.images), data.tokens)
    labels = data.tokens[:, 1:].masked_fill(~model.encode_text(data.tokens).valid[:, 1:], -100)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(model(data, RANDOM).caption, expected, rtol=1e-6, atol=0)


def test_masked_captioning_sees_the_kept_patches_only():
    model, data = build(micro(masking={"drop_ratio": 0.75})), batch([3, 8, 4])
    image, text = model.encode_image(data.images), model.encode_text(data.tokens)
    kept = model.select(image, text).kept
    patches = torch.stack([image.patches[b, kept[b]] for b in range(3)])
    logits = model.caption_decoder(text.words[:, :-1], patches)
    labels = data.tokens[:, 1:].masked_fill(~text.valid[:, 1:], -100)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(model(data, ATTENTIVE).caption, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("plan", [RANDOM, ATTENTIVE])
@pytest.mark.parametrize("form", ["token", "drop"])
@pytest.mark.parametrize("kind", ["l1", "mse", "mse_normalised"])
def test_tgmim_loss_is_the_error_of_the_reconstruction(plan, form, kind):
    model, data = build(micro(masking={"masked_input": form}, loss={"tgmim_kind": kind})), batch([3, 8, 1, 4])
    image, text = model.encode_image(data.images), model.encode_text(data.tokens)
    if plan.attentive:
        selection = model.select(image, text)
    else:
        masked = torch.stack([select_one(model, seed) for seed in data.seeds])
        visible = torch.stack([torch.tensor(sorted(set(range(16)) - set(row.tolist()))) for row in masked])
        selection = PatchSelection(torch.zeros(4, 16), masked, visible, visible, masked)
    pred = model.reconstruct(data.images, text, selection)
    target = patchify(data.images, 4).gather(1, selection.masked[:, :, None].expand(-1, -1, 48))
    if kind == "mse_normalised":
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
    error = (pred - target).abs() if kind == "l1" else (pred - target).square()
    torch.testing.assert_close(model(data, plan).tgmim, error.mean(), rtol=1e-5, atol=0)


def select_one(model, seed):
    from sycoca.masking import select_at_random

    return select_at_random(seed[None], model.config).masked[0]


def test_tgmim_reaches_the_text_encoder_and_indices_carry_no_gradient():
    model = build(micro(masking={"score_space": "itc"}))
    tgmim = model(batch(LENGTHS), ATTENTIVE).tgmim
    names, parameters = zip(*model.named_parameters())
    grads = dict(zip(names, torch.autograd.grad(tgmim, parameters, allow_unused=True)))
    text = [name for name in names if name.startswith(("text.blocks", "text.sequence.tokens", "text.sequence.pos"))]
    assert all(grads[name] is not None and grads[name].any() for name in text)
    # The score is made of these two alone, and of nothing else that TG-MIM uses.
    assert grads["image_projection.weight"] is None and grads["text_projection.weight"] is None


CHOICES = [
    ("score", "score", True),
    ("random", "score", True),
    ("oracle", "oracle", False),
    ("random", "random", False),
    ("score", "oracle", True),
]


@pytest.mark.parametrize("mask_by, drop_by, scores", CHOICES)
def test_masks_and_drops_are_chosen_as_configured(mask_by, drop_by, scores):
    from sycoca.masking import select_at_random, select_described

    config = micro(masking={"mask_by": mask_by, "drop_by": drop_by, "mask_ratio": 0.25, "drop_ratio": 0.5})
    model, data = build(config), batch(LENGTHS)
    data = data._replace(described=torch.arange(16).remainder(3).float().expand(4, 16) / 2)
    image, text = model.encode_image(data.images), model.encode_text(data.tokens)
    # Whatever chooses, it chooses what it would choose for both.
    both = {
        "random": select_at_random(data.seeds, config),
        "oracle": select_described(data.described, data.seeds, config),
    }
    assert config.scores == scores and (model.local is not None) == scores
    if scores:
        both["score"] = model.select(image, text)
    else:
        with pytest.raises(ValueError, match="do not follow a score"):
            model.select(image, text)
    chosen, overlap = model._selection(data, ATTENTIVE, image, text, None)
    assert torch.equal(chosen.masked, both[mask_by].masked) and torch.equal(chosen.visible, both[mask_by].visible)
    assert torch.equal(chosen.kept, both[drop_by].kept) and torch.equal(chosen.dropped, both[drop_by].dropped)
    assert scores or overlap == 1
    losses = model(data, ATTENTIVE)
    losses.total.backward()
    assert all(x.isfinite() for x in losses)


def test_random_masks_of_tgmim_alone_need_no_score():
    config = micro(masking={"mask_by": "random", "drop_ratio": 0.0})
    model, data = build(config), batch(LENGTHS)
    assert not config.scores and model.local is None
    assert torch.equal(model(data, ATTENTIVE).tgmim, model(data, RANDOM).tgmim)


def test_an_image_decoder_without_guide_does_not_read_the_caption():
    config = micro(image_decoder=replace(MICRO.image_decoder, guide="none"))
    model, data = build(config), batch(LENGTHS)
    other = data._replace(tokens=data.tokens.roll(1, 0))
    text, strangers = model.encode_text(data.tokens), model.encode_text(other.tokens)
    selection = model.select(model.encode_image(data.images), text)
    assert torch.equal(
        model.reconstruct(data.images, text, selection), model.reconstruct(data.images, strangers, selection)
    )
    losses = model(data, ATTENTIVE)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if n.startswith("text.")))
    assert all(grad is None for grad in torch.autograd.grad(losses.tgmim, parameters, allow_unused=True)), names
    losses = model(data, ATTENTIVE)
    losses.total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_local_heads_learn_from_their_own_term_alone():
    model = build(MICRO)
    losses = model(batch(LENGTHS), ATTENTIVE)
    head = list(model.local.parameters())
    rest = losses.total - losses.local
    assert all(g is None or not g.any() for g in torch.autograd.grad(rest, head, allow_unused=True, retain_graph=True))
    assert all(g.any() for g in torch.autograd.grad(losses.local, head))


def test_every_parameter_is_trained():
    for form in ("token", "drop"):
        model = build(micro(masking={"masked_input": form}))
        model(batch(LENGTHS), ATTENTIVE).total.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("plan", [RANDOM, ATTENTIVE])
@pytest.mark.parametrize("space", ["itc", "value", "local"])
def test_empty_captions(plan, space):
    model = build(micro(masking={"score_space": space, "local_group": 4}))
    data = batch([3, -1, 5, -1])
    losses = model(data, plan)
    losses.total.backward()
    assert all(x.isfinite() for x in losses)
    assert all(grad.isfinite().all() for grad in gradients(model).values())
    # They add nothing to captioning, TG-MIM and the local term: the others alone give the same.
    full = Batch(data.images[::2], data.tokens[::2], data.seeds[::2], None)
    first, second = model(data, plan), model(full, plan)
    for name in ("caption", "tgmim", "local"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("plan", [RANDOM, ATTENTIVE])
def test_a_batch_of_empty_captions_is_finite(plan):
    model = build(MICRO)
    losses = model(batch([-1, -1]), plan)
    losses.total.backward()
    assert losses.caption == losses.tgmim == losses.local == 0
    assert all(grad.isfinite().all() for grad in gradients(model).values())


def test_padding_changes_nothing():
    model, data = build(MICRO), batch([3, 5, 0, 2])
    losses = model(data, ATTENTIVE)
    behind = ~model.encode_text(data.tokens).valid
    garbage = data._replace(tokens=torch.where(behind, 3 + torch.arange(10), data.tokens))
    assert all(torch.equal(a, b) for a, b in zip(model(garbage, ATTENTIVE), losses))
    short = data._replace(tokens=data.tokens[:, :7])
    for a, b in zip(model(short, ATTENTIVE), losses):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_equal_ids_are_positives_of_each_other():
    model = build(MICRO)
    ids = torch.tensor([4, 9, 4, 1])
    plain, shared = model(batch(LENGTHS), RANDOM), model(batch(LENGTHS, ids=ids), RANDOM)
    assert not torch.equal(plain.itc, shared.itc)
    assert torch.equal(model(batch(LENGTHS, ids=torch.arange(4)), RANDOM).caption, plain.caption)


def test_overlap_tells_whether_the_caption_matters():
    model = build(MICRO)
    data = batch([3, 8, 4, 6])
    assert model(data, RANDOM).mask_overlap == 1
    attentive = model(data, ATTENTIVE).mask_overlap
    image, text = model.encode_image(data.images), model.encode_text(data.tokens)
    true, other = model.select(image, text), model.select(image, model.encode_text(data.tokens.roll(1, 0)))
    shares = [len(set(a.tolist()) & set(b.tolist())) / 8 for a, b in zip(true.masked, other.masked)]
    assert attentive == pytest.approx(sum(shares) / 4) and attentive < 1
    same = data._replace(tokens=data.tokens[:1].expand(4, -1))
    assert model(same, ATTENTIVE).mask_overlap == 1


@pytest.mark.parametrize("objectives", [("itc",), ("ic",), ("itc", "ic"), ("itc", "tgmim"), ("ic", "tgmim")])
def test_objectives(objectives):
    model = build(micro(objectives=objectives))
    losses = model(batch(LENGTHS), ATTENTIVE)
    losses.total.backward()
    for objective, value in (("itc", losses.itc), ("ic", losses.caption), ("tgmim", losses.tgmim)):
        assert (value > 0) == (objective in objectives)


@pytest.mark.parametrize("form", ["token", "drop"])
def test_recomputed_activations_give_the_same_gradients(form):
    results = []
    for recompute in (False, True):
        model = build(micro(masking={"masked_input": form}, gradient_checkpointing=recompute))
        losses = model(batch(LENGTHS), ATTENTIVE)
        losses.total.backward()
        results.append((losses.total, *gradients(model).values()))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("form", ["token", "drop"])
def test_autocast(form):
    model = build(micro(masking={"masked_input": form}))
    data = batch(LENGTHS)
    exact = model(data, RANDOM)
    exact.total.backward()
    truth = gradients(model)
    truth = {name: g.clone() for name, g in truth.items()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(data, RANDOM)
    losses.total.backward()
    assert all(x.dtype == torch.float32 for x in losses)
    for a, b in zip(losses[:5], exact[:5]):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=0)
    total = torch.cat([g.flatten() for g in truth.values()])
    error = torch.cat([(g - truth[name]).flatten() for name, g in gradients(model).items()])
    # Some 25 products stand between a pixel and a loss and back, each rounded by 2^-9.
    assert error.norm() < 25 * 2**-9 * total.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(x.isfinite() for x in model(data, ATTENTIVE))


def test_bf16_parameters():
    model = build(MICRO).bfloat16()
    losses = model(batch(LENGTHS), ATTENTIVE)
    losses.total.backward()
    assert all(x.dtype == torch.float32 and x.isfinite() for x in losses)
    assert all(grad.dtype == torch.bfloat16 for grad in gradients(model).values())


@pytest.mark.parametrize(
    ("space", "plan"), [("itc", ATTENTIVE), ("value", ATTENTIVE), ("local", ATTENTIVE), ("local", RANDOM)]
)
def test_forward_and_backward_read_no_value_on_the_host(space, plan, monkeypatch):
    """Fake tensors have no values, so that any host read raises; packing is for devices that do not run ahead."""
    monkeypatch.setattr(Packing, "of", lambda keep: None)
    with FakeTensorMode(allow_non_fake_inputs=False):
        model = SyCoCa(micro(masking={"score_space": space}))
        data = Batch(torch.empty(4, 3, 16, 16), *(torch.empty(s, dtype=torch.int64) for s in ((4, 10), 4, 4)))
        losses = model(data, plan)
        losses.total.backward()
        assert all(x.shape == () for x in losses)
        assert all(p.grad is not None for p in model.parameters())


def test_parameter_groups():
    model = build(micro(masking={"masked_input": "token"}))
    groups = {group["name"]: group for group in parameter_groups(model, 0.2)}
    names = {p: name for name, p in model.named_parameters()}
    listed = [names[p] for group in groups.values() for p in group["params"]]
    assert sorted(listed) == sorted(names.values())
    assert groups["decay"]["weight_decay"] == 0.2 and groups["no_decay"]["weight_decay"] == 0
    plain = {names[p] for p in groups["no_decay"]["params"]}
    learned = ("bias", ".pos", ".cls", ".mask_token")
    assert all(name.endswith(learned) or "ln_" in name or "norm" in name for name in plain)
    assert not any(name in plain for name in ("text.sequence.tokens.weight", "caption_decoder.head.weight"))
    scales = [p for module in model.modules() if isinstance(module, LogitScale) for p in module.parameters()]
    assert groups["logit_scale"]["params"] == scales and all(p.shape == (1,) for p in scales)
    assert groups["logit_scale"]["max_value"] == pytest.approx(4.60517)


def test_requests_a_model_cannot_serve():
    model = build(replace(MICRO, objectives=("itc",)))
    data = batch([3, 4])
    image, text = model.encode_image(data.images), model.encode_text(data.tokens)
    with pytest.raises(ValueError, match="without captioning"):
        model.caption_logits(image, data.tokens)
    with pytest.raises(ValueError, match="without TG-MIM"):
        model.reconstruct(data.images, text, None)
