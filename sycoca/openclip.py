"""OpenCLIP's CoCa weights under the names of this package, and back: equal tensors in both directions.

Every link names tensors of both sides and how one side is made of the other:
    qkv = in_proj;  [q; kv] = in_proj of a cross-attention;  kv = [k_proj; v_proj] of a pooler
    patch map (D, row, column, channel) of a convolution (D, channel, row, column);  W = projection^T
    [cls_pos; pos] = visual positions;  [pos; cls_pos] = text positions;  scale (1,) = scale ()
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sycoca.checked import from_dict
from sycoca.config import CLIP_IDS, ModelConfig
from sycoca.weights import WeightsError

Tensors = Sequence[Tensor]


class Link(NamedTuple):
    """Tensors of both sides that hold the same numbers; `read` makes ours of theirs, `write` theirs of ours."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    read: Callable[..., Tensors]
    write: Callable[..., Tensors]


def from_openclip(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A state dict of open_clip's CoCa under our names.

    Args:
        state: theirs.
        config: of the same structure.

    Returns:
        Ours; what theirs lacks is left out, and what it has besides is kept under its name, for a refusal to tell.
    """
    # Old releases stored masks, which are no weights.
    rest = {name: tensor for name, tensor in state.items() if not name.endswith("attn_mask")}
    ours = {}
    for link in _links(config):
        if all(name in rest for name in link.theirs):
            parts = [rest.pop(name) for name in link.theirs]
            try:
                made = link.read(*parts)
            except (RuntimeError, IndexError, ValueError):
                shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in zip(link.theirs, parts))
                raise WeightsError(f"weights of another architecture: {shapes}") from None
            ours |= zip(link.ours, made, strict=True)
    return ours | rest


def openclip_names(config: ModelConfig) -> list[str]:
    """Names of all tensors of open_clip's model of the same structure."""
    return [name for link in _links(config) for name in link.theirs]


def to_openclip(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A state dict of open_clip's CoCa of one of ours; image decoder and score heads have no place in it.

    Raises:
        WeightsError: a model that is not built as open_clip's.
    """
    theirs = {}
    if config.vision.stem != "patch":
        raise WeightsError(f"not of open_clip's structure: vision.stem '{config.vision.stem}'")
    for link in _links(config):
        missing = [name for name in link.ours if name not in state]
        if missing:
            raise WeightsError(f"not of open_clip's structure: no {missing[0]}")
        theirs |= zip(link.theirs, link.write(*(state[name] for name in link.ours)), strict=True)
    return theirs


def _links(config: ModelConfig) -> Iterator[Link]:
    p = config.vision.patch_size
    yield Link(("logit_scale",), ("logit_scale.log_scale",), lambda x: [x.reshape(1)], lambda x: [x.reshape(())])
    yield Link(
        ("visual.conv1.weight",),
        ("vision.embed.proj.weight",),
        lambda x: [x.permute(0, 2, 3, 1).reshape(len(x), -1)],
        lambda x: [x.view(len(x), p, p, 3).permute(0, 3, 1, 2).contiguous()],
    )
    yield _same("visual.class_embedding", "vision.sequence.cls")
    yield Link(
        ("visual.positional_embedding",),
        ("vision.sequence.cls_pos", "vision.sequence.pos"),
        lambda x: [x[0], x[1:]],
        lambda cls, pos: [torch.cat([cls[None], pos])],
    )
    yield from _norm("visual.ln_pre", "vision.ln_pre")
    for i in range(config.vision.depth):
        yield from _block(f"visual.transformer.resblocks.{i}", f"vision.blocks.{i}")
    yield from _pooling(config)
    yield _transposed("visual.proj", "image_projection.weight")

    yield _same("text.token_embedding.weight", "text.sequence.tokens.weight")
    yield _same("text.cls_emb", "text.sequence.cls")
    yield Link(
        ("text.positional_embedding",),
        ("text.sequence.pos", "text.sequence.cls_pos"),
        lambda x: [x[:-1], x[-1]],
        lambda pos, cls: [torch.cat([pos, cls[None]])],
    )
    for i in range(config.text.depth):
        yield from _block(f"text.transformer.resblocks.{i}", f"text.blocks.{i}")
    yield from _norm("text.ln_final", "text.ln_final")
    yield _transposed("text.text_projection", "text_projection.weight")

    for i in range(config.caption_decoder.depth):
        yield from _block(f"text_decoder.resblocks.{i}", f"caption_decoder.blocks.{2 * i}")
        yield from _cross_block(f"text_decoder.cross_attn.{i}", f"caption_decoder.blocks.{2 * i + 1}")
    yield from _norm("text_decoder.ln_final", "caption_decoder.head.norm")
    yield _transposed("text_decoder.text_projection", "caption_decoder.head.weight")


def _pooling(config: ModelConfig) -> Iterator[Link]:
    """The norm behind the image encoder and the poolers; theirs has the first norm inside the single pooler."""
    match config.vision.pooler:
        case "cls":
            yield from _norm("visual.ln_post", "vision.ln_post")
        case "single":
            yield from _norm("visual.attn_pool.ln_k", "vision.ln_post")
            yield from _pooler("visual.attn_pool", "pooler.pool", config)
            yield from _norm("visual.ln_post", "pooler.norm")
        case _:
            yield from _norm("visual.ln_post", "vision.ln_post")
            for theirs, ours in (("attn_pool", "pooler.captioning"), ("attn_pool_contrastive", "pooler.contrastive")):
                yield from _norm(f"visual.{theirs}.ln_k", f"{ours}.ln_memory")
                yield from _pooler(f"visual.{theirs}", ours, config)


def _pooler(theirs: str, ours: str, config: ModelConfig) -> Iterator[Link]:
    yield _same(f"{theirs}.query", f"{ours}.query")
    yield from _norm(f"{theirs}.ln_q", f"{ours}.ln_query")
    if config.embed_dim == config.vision.width:
        yield _split(f"{theirs}.attn.in_proj_weight", f"{ours}.attn.q.weight", f"{ours}.attn.kv.weight")
    else:
        yield _same(f"{theirs}.attn.q_proj_weight", f"{ours}.attn.q.weight")
        yield Link(
            (f"{theirs}.attn.k_proj_weight", f"{theirs}.attn.v_proj_weight"),
            (f"{ours}.attn.kv.weight",),
            lambda k, v: [torch.cat([k, v])],
            lambda kv: list(kv.chunk(2)),
        )
    yield _split(f"{theirs}.attn.in_proj_bias", f"{ours}.attn.q.bias", f"{ours}.attn.kv.bias")
    yield from _linear(f"{theirs}.attn.out_proj", f"{ours}.attn.out")


def _block(theirs: str, ours: str) -> Iterator[Link]:
    for part in ("weight", "bias"):
        yield _same(f"{theirs}.attn.in_proj_{part}", f"{ours}.attn.qkv.{part}")
    yield from _around_attention(theirs, ours)


def _cross_block(theirs: str, ours: str) -> Iterator[Link]:
    yield from _norm(f"{theirs}.ln_1_kv", f"{ours}.ln_memory")
    for part in ("weight", "bias"):
        yield _split(f"{theirs}.attn.in_proj_{part}", f"{ours}.attn.q.{part}", f"{ours}.attn.kv.{part}")
    yield from _around_attention(theirs, ours)


def _around_attention(theirs: str, ours: str) -> Iterator[Link]:
    yield from _norm(f"{theirs}.ln_1", f"{ours}.ln_attn")
    yield from _linear(f"{theirs}.attn.out_proj", f"{ours}.attn.out")
    yield from _norm(f"{theirs}.ln_2", f"{ours}.ln_mlp")
    yield from _linear(f"{theirs}.mlp.c_fc", f"{ours}.mlp.up")
    yield from _linear(f"{theirs}.mlp.c_proj", f"{ours}.mlp.down")


def _linear(theirs: str, ours: str) -> Iterator[Link]:
    for part in ("weight", "bias"):
        yield _same(f"{theirs}.{part}", f"{ours}.{part}")


_norm = _linear


def _same(theirs: str, ours: str) -> Link:
    return Link((theirs,), (ours,), lambda x: [x], lambda x: [x])


def _transposed(theirs: str, ours: str) -> Link:
    return Link((theirs,), (ours,), lambda x: [x.T.contiguous()], lambda x: [x.T.contiguous()])


def _split(theirs: str, q: str, kv: str) -> Link:
    def read(x: Tensor) -> Tensors:
        width = len(x) // 3
        return [x[:width], x[width:]]

    return Link((theirs,), (q, kv), read, lambda q, kv: [torch.cat([q, kv])])


_VISION = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "width",
    "layers": "depth",
    "mlp_ratio": "mlp_ratio",
    "attn_pooler_queries": "pooler_queries",
    "attn_pooler_heads": "pooler_heads",
}
_TEXT = {"context_length": "context_length", "vocab_size": "vocab_size", "width": "width", "layers": "depth"}
_IGNORED = {"output_tokens", "attentional_pool", "head_width", "dim_head", "n_queries", "heads"}
_POOLERS = {False: "cls", True: "single", "parallel": "parallel", "cascade": "cascade"}


def openclip_config(model_cfg: Mapping[str, Any], *, correct_cls_mask: bool = False) -> ModelConfig:
    """Our configuration of one of open_clip's CoCa models, without masks.

    Args:
        model_cfg: a `model_configs/*.json` of open_clip, or `model_cfg` of an `open_clip_config.json`.
        correct_cls_mask: the weights were trained with open_clip's flag of this name.

    Raises:
        WeightsError: no CoCa, or with parts that have no place here.
    """
    parts = {name: dict(model_cfg.get(name, {})) for name in ("vision_cfg", "text_cfg", "multimodal_cfg")}
    vision, text, decoder = parts.values()
    if decoder and (name := text.pop("hf_tokenizer_name", None)):
        raise WeightsError(f"text_cfg.hf_tokenizer_name '{name}': another vocabulary than CLIP's, which is read alone")
    if not decoder or not text.get("embed_cls"):
        raise WeightsError("no CoCa of open_clip: needs multimodal_cfg and a text_cfg with embed_cls")
    others = {
        **{f"vision_cfg.{key}": vision[key] for key in vision.keys() - _VISION.keys() - _IGNORED},
        **{f"text_cfg.{key}": text[key] for key in text.keys() - _TEXT.keys() - _IGNORED - {"embed_cls", "mlp_ratio"}},
        **{key: model_cfg[key] for key in ("quick_gelu", "init_logit_bias") if model_cfg.get(key)},
    }
    if others := sorted(key for key, value in others.items() if value not in (None, False, 0.0)):
        raise WeightsError(f"open_clip's {', '.join(others)}: has no place in this model")
    width = vision.get("width", 768)
    pooling = {"cls_position": True, "pooler": _POOLERS[vision.get("attentional_pool", False)]}
    data = {
        "embed_dim": model_cfg["embed_dim"],
        "vision": {"image_size": 224, "patch_size": 16, "width": 768, "depth": 12}
        | {ours: vision[theirs] for theirs, ours in _VISION.items() if theirs in vision}
        | pooling
        | {"heads": width // vision.get("head_width", 64)},
        "text": {"context_length": 77, "vocab_size": 49408, "width": 512, "depth": 12}
        | {ours: text[theirs] for theirs, ours in _TEXT.items() if theirs in text}
        | {"heads": text.get("heads", 8), "cls_place": "last" if correct_cls_mask else "last_shifted"}
        | CLIP_IDS,
        "caption_decoder": {"depth": decoder.get("layers", 12), "heads": decoder.get("heads", 8)},
        "image_decoder": {"depth": 4, "width": text.get("width", 512), "heads": text.get("heads", 8)},
        "masking": {"mask_ratio": 0.0, "drop_ratio": 0.0},
        "objectives": ["itc", "ic"],
    }
    return from_dict(ModelConfig, data)


def openclip_model_cfg(config: ModelConfig) -> dict[str, Any]:
    """`model_cfg` of an `open_clip_config.json` that `openclip_config` reads as the same structure."""
    vision, text = config.vision, config.text
    pooled = vision.pooler != "cls"
    sizes = {name: getattr(text, name) for name in ("context_length", "vocab_size", "width")}
    return {
        "embed_dim": config.embed_dim,
        "vision_cfg": {
            theirs: getattr(vision, ours)
            for theirs, ours in _VISION.items()
            if pooled or not theirs.startswith("attn_pooler")
        }
        | {
            "head_width": vision.width // vision.heads,
            "attentional_pool": next(theirs for theirs, ours in _POOLERS.items() if ours == vision.pooler),
            "output_tokens": True,
        },
        "text_cfg": sizes | {"layers": text.depth, "heads": text.heads, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": sizes | {"layers": config.caption_decoder.depth, "heads": config.caption_decoder.heads},
        "custom_text": True,
    }
