"""A region step of X-VLM as its published code computes it: the same losses of the same weights, and more work.

Texts are padded to the context length; every box is a sequence of all patches of its image, outside ones hidden; image
tokens are copied for each text and pair, and keys and values projected from the copies; ITM runs its matching and its
other pairs, MLM and the boxes as texts of their own, all positions through all layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import box_loss, fused_itc_loss, sample_hard_negatives
from sycoca.layers import attend
from sycoca.masking import hash_tensor
from sycoca.mlm import MaskedWords
from sycoca.region_views import shown
from sycoca.regions import RegionBatch, places
from sycoca.xvlm import XVLM


def published_region_losses(model: XVLM, regions: RegionBatch, masked: MaskedWords) -> dict[str, Tensor]:
    """Terms of a region batch, of a model whose boxes are local; texts padded as far as they are given."""
    config, E = model.config, len(regions.ids)
    own = torch.arange(E)
    boxed, full, seen = _encode_boxes(model, regions)
    full = full[regions.image_index]
    features = F.normalize(model.image_projection(boxed[:, 0]), dim=-1)
    words, valid = _encode_text(model, regions.tokens)
    text = F.normalize(model.text_projection(model.text.ln_final(words[:, 0])), dim=-1)
    itc = fused_itc_loss(features, text, model.logit_scale(), ids=regions.ids)

    draws = {"ids": regions.ids, "floor": config.loss.itm_floor, "seed": hash_tensor(regions.seeds[:1])}
    other_image, other_text = sample_hard_negatives(
        features.detach(), text.detach(), model.logit_scale().detach(), **draws
    )
    same = _fuse(model, words, valid, boxed, seen)
    words_of = torch.cat([words, words[other_text]]), torch.cat([valid, valid[other_text]])
    images_of = torch.cat([boxed[other_image], boxed]), torch.cat([seen[other_image], seen])
    differs = _fuse(model, *words_of, *images_of)
    logits = model.itm_head(torch.cat([same[:, 0], differs[:, 0]]))
    errors = F.cross_entropy(logits, (torch.arange(3).repeat_interleave(E) == 0).long(), reduction="none")
    # Ours leaves out what is true of the image that is shown; the work is the same.
    choice = shown(regions, 0.0, config.vision.num_patches)
    kept_text, kept_image = choice.without_true(other_text, other_image)
    itm = errors[torch.cat([own, kept_image, kept_text]) >= 0].mean()

    hidden, hidden_valid = _encode_text(model, masked.tokens)
    states = _fuse(model, hidden, hidden_valid, boxed, seen)[own[:, None], masked.positions]
    table = model.text.sequence.tokens
    guesses = F.linear(model.word_head(states.flatten(0, 1)), table.weight, table.bias)
    mlm = F.cross_entropy(guesses, masked.labels.flatten(), ignore_index=-1)

    everything = torch.ones_like(seen)
    found = model.box_head(_fuse(model, words, valid, full, everything)[:, 0]).sigmoid()
    l1, giou = box_loss(found, regions.boxes, regions.has_box)
    weight = config.loss
    total = weight.itc_weight * itc + weight.itm_weight * itm + weight.mlm_weight * mlm
    total = total + weight.l1_weight * l1 + weight.giou_weight * giou
    return {"total": total, "itc": itc, "itm": itm, "mlm": mlm, "l1": l1, "giou": giou}


def _self_attention(attention, x: Tensor, valid: Tensor | None) -> Tensor:
    return attention.out(attend(*attention._split(attention.qkv(x)), valid=valid))


def _mlp(mlp, x: Tensor) -> Tensor:
    return mlp.down(F.gelu(mlp.up(x)))


def _block(block, x: Tensor, valid: Tensor | None) -> Tensor:
    x = x + _self_attention(block.attn, block.ln_attn(x), valid)
    return x + _mlp(block.mlp, block.ln_mlp(x))


def _encode_text(model: XVLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
    valid = tokens != model.config.text.pad_id
    x = model.text.sequence(tokens)
    for block in model.text.blocks:
        x = _block(block, x, valid)
    return x, valid


def _encode_boxes(model: XVLM, regions: RegionBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (E, 1 + P, D), images (N, 1 + P, D), and what of each box is seen (E, 1 + P) bool."""
    tower, vision = model.vision, model.config.vision
    place, inside = places(regions.rects, vision.grid[1], vision.num_patches)
    seen = torch.zeros(len(place), vision.num_patches + 1, dtype=torch.bool)
    seen[torch.arange(len(place))[:, None].expand_as(place)[inside], place[inside] + 1] = True
    seen[:, 0] = True
    x = tower.ln_pre(tower.sequence(tower.embed(regions.images)))
    shared = len(tower.blocks) - vision.local_depth
    for block in tower.blocks[:shared]:
        x = _block(block, x, None)
    both = torch.cat([x, x[regions.image_index]])
    seen_of_both = torch.cat([torch.ones(x.shape[:2], dtype=torch.bool), seen])
    for block in tower.blocks[shared:]:
        both = _block(block, both, seen_of_both)
    both = tower.ln_post(both)
    return both[len(x) :], both[: len(x)], seen


def _fuse(model: XVLM, words: Tensor, valid: Tensor, image: Tensor, seen: Tensor) -> Tensor:
    x, fusion = words, model.fusion
    image = image + F.pad(fusion.places.pos, (0, 0, 1, 0))
    for block in fusion.blocks:
        x = x + _self_attention(block.attn, block.ln_attn(x), valid)
        q = block.cross.q(block.ln_cross(x)).unflatten(2, (block.cross.heads, -1)).transpose(1, 2)
        x = x + block.cross.out(attend(q, *block.cross.look_up(block.ln_memory(image)), valid=seen))
        x = x + _mlp(block.mlp, block.ln_mlp(x))
    return fusion.ln_final(x)
