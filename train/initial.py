"""What a run starts from: a model's structure and vocabulary for the configuration, its weights for the parameters."""

import json
import re
from dataclasses import replace
from pathlib import Path

from sycoca.config import ConfigError, ModelConfig, from_dict, nearest
from train.config import RunConfig

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# Parts that other objectives than the given model's need, which begin anew.
FRESH = ("image_decoder", "local", "fusion", "itm_head", "box_head", "word_head")


def started_from(config: RunConfig, name: str) -> RunConfig:
    """The configuration with structure and tokenizer of the model that the run starts from.

    Encoders and captioning decoder are the model's; objectives, masks, losses and the image decoder stay.

    Args:
        config: of the run.
        name: folder of a model, of open_clip's CoCa or of a run, or a repository of the hub.

    Raises:
        ConfigError: nothing there; one line, before torch is imported where the path is a local one.
    """
    folder = _folder(name)
    model, tokenizer = _described(folder, name)
    parts = {part: getattr(model, part) for part in ("embed_dim", "vision", "text", "caption_decoder")}
    return replace(
        config, init=name, model=replace(config.model, **parts), data=replace(config.data, tokenizer=tokenizer)
    )


def check_text(wanted: ModelConfig, name: str) -> None:
    """Refuses a vocabulary or context length other than that of the model a run starts from."""
    model, _ = _described(_folder(name), name)
    for key in ("vocab_size", "context_length"):
        asked, given = getattr(wanted.text, key), getattr(model.text, key)
        if asked != given:
            raise ConfigError(f"--init {name}: its {key} is {given}, model.text.{key}={asked} cannot be made of it")


def begin(model, config: RunConfig) -> list[str]:
    """Gives a fresh model the weights that the run starts from, if any. All ranks call it.

    Returns:
        Parts that begin anew beside them.

    Raises:
        ConfigError: weights of another architecture, or not to be had; one line.
    """
    if config.init is not None:
        return load_initial(model, config)
    given = config.pretrained
    if not given.any:
        return []
    from sycoca.backbones import load_backbones

    try:
        return load_backbones(model, vision=given.vision, text=given.text)
    except ConfigError as error:
        raise ConfigError(f"pretrained: {error}") from None


def given_weights(config: RunConfig) -> dict:
    """The weights of the model that a run starts from, by name, fitted to the run's picture size and windows.

    Raises:
        ValueError: nothing there, or not such a model; one line.
    """
    from sycoca.hub import load_pretrained

    vision = config.model.vision
    window = None if vision.swin is None else vision.swin.window
    return load_pretrained(config.init, image_size=vision.image_size, swin_window=window).model.state_dict()


def load_initial(model, config: RunConfig) -> list[str]:
    """Gives the model's parameters their values; positions are interpolated. All ranks call it.

    Args:
        model: SyCoCa, partitioned by ZeRO 3 or whole.
        config: of the run.

    Returns:
        Parts that begin anew.

    Raises:
        ConfigError: weights of another architecture.
    """
    import deepspeed
    import torch
    import torch.distributed as dist

    from sycoca.weights import load_into
    from sycoca.xvlm import build_model

    with torch.device("meta"):
        plain = build_model(config.model)
    shapes = {name: p.shape for name, p in plain.state_dict().items()}
    try:
        given = given_weights(config)
        for part in FRESH:
            ours, theirs = (
                {name: shape for name, shape in names.items() if name.startswith(part + ".")}
                for names in (shapes, {name: tensor.shape for name, tensor in given.items()})
            )
            if ours != theirs:
                given = {name: tensor for name, tensor in given.items() if name not in theirs}
        load_into(plain, given, source=config.init, fresh=tuple(part + "." for part in FRESH))
    except ValueError as error:
        raise ConfigError(f"--init {error}") from None
    anew = set()
    for (name, target), (_, source) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if source.is_meta:
            anew.add(name.partition(".")[0])
            continue
        # Partitioned parameters are whole within, and those of the first rank count.
        with deepspeed.zero.GatheredParameters([target], modifier_rank=0), torch.no_grad():
            if not hasattr(target, "ds_id") or dist.get_rank() == 0:
                target.copy_(source)
    return sorted(anew)


def _folder(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        raise ConfigError(f"--init {name}: a file; needs a model's folder, with config.json or open_clip_config.json")
    if path.is_dir():
        for folder in (path, path / "model"):
            if (folder / "open_clip_config.json").is_file() or (folder / "model.safetensors").is_file():
                return folder
        raise ConfigError(f"--init {name}: no model in this folder; a run has it in model/ when it has ended")
    if not _REPOSITORY.fullmatch(name) or path.parent.is_dir():
        known = [str(other) for other in path.parent.glob("*/")] if path.parent.is_dir() else []
        raise ConfigError(f"--init {name}: no such folder{nearest(name, known)}")
    from sycoca.hub import find_model

    try:
        return find_model(name)
    except ValueError as error:
        raise ConfigError(f"--init {error}") from None


def _described(folder: Path, name: str) -> tuple[ModelConfig, str]:
    """The configuration of the model in a folder, and what `data.tokenizer` is with it."""
    theirs = folder / "open_clip_config.json"
    path = theirs if theirs.is_file() else folder / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if path == theirs:
            from sycoca.openclip import openclip_config

            return openclip_config(data["model_cfg"]), "clip"
        if (part := {"swin": "vision", "bert": "text"}.get(data.get("model_type"))) is not None:
            raise ConfigError(f"--init {name}: {data['model_type']} of transformers; pretrained.{part}={name} takes it")
        fields = {key: value for key, value in data.items() if key not in ("architectures", "model_type")}
        return from_dict(ModelConfig, fields), str(folder / "tokenizer.json")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"--init {name}: {path.name}: {error}") from None
