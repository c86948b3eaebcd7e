"""Models by name: from a folder, a run or the hub, or fresh from a preset."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from sycoca.checked import from_dict, nearest, to_dict
from sycoca.config import ConfigError, ModelConfig
from sycoca.hub_file import download
from sycoca.hub_mixin import (
    CONFIG,
    PREPROCESSING,
    TOKENIZER,
    WEIGHTS,
    check_normalisation,
    read_config,
    read_json,
)
from sycoca.model import SyCoCa
from sycoca.openclip_files import OPENCLIP_CONFIG, OPENCLIP_WEIGHTS, SUFFIXES, read_openclip
from sycoca.presets import MODEL_PRESETS
from sycoca.tokenizer import Tokenizer
from sycoca.weights import WeightsError, load_into, read_weights, resize_positions, resize_windows
from sycoca.xvlm import build_model

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class Pretrained(NamedTuple):
    """A model in evaluation mode, the tokenizer it was trained with, and its configuration."""

    model: SyCoCa
    tokenizer: Tokenizer
    config: ModelConfig


def load_pretrained(
    name_or_path: str | os.PathLike,
    *,
    device: torch.device | str = "cpu",
    image_size: int | None = None,
    swin_window: int | None = None,
    revision: str | None = None,
    config: str | None = None,
    correct_cls_mask: bool = False,
    allow_pickle: bool = False,
) -> Pretrained:
    """A trained model, ready for use.

    Args:
        name_or_path: a folder of `save_pretrained` or of open_clip (with `open_clip_config.json`), the folder of a
            run, a repository of the hub ("owner/name") with either, or a weight file of open_clip's CoCa.
        device: where the model computes.
        image_size: pixels, a multiple of the patch size, where it shall differ from the one the model was trained at;
            positions are interpolated.
        swin_window: cells of a side of a Swin's windows, where it shall differ; its tables are interpolated.
        revision: branch, tag or commit of a repository of the hub.
        config: what a weight file alone is of: the name of a CoCa of open_clip, or a JSON file like theirs.
        correct_cls_mask: open_clip's weights were trained with its flag of this name.
        allow_pickle: unpickle arbitrary Python objects from a `.pt` or `.bin` you trust, which can run any code.

    Returns:
        The model in fp32, its tokenizer and its configuration.

    Raises:
        WeightsError: nothing there, or not such a model; one line.
    """
    found = find_model(name_or_path, revision)
    theirs = found.is_file() or (found / OPENCLIP_CONFIG).is_file()
    if config is not None and not found.is_file():
        raise WeightsError(f"config={config}: for a weight file alone; {found} says itself what it is")
    if correct_cls_mask and not theirs:
        raise WeightsError(f"correct_cls_mask: for weights of open_clip; {found} says itself which mask it has")
    if theirs:
        state, made, tokenizer = read_openclip(
            found, config, correct_cls_mask=correct_cls_mask, allow_pickle=allow_pickle
        )
        check_tokenizer(tokenizer, made, source=str(found))
    else:
        made = read_config(found / CONFIG)
        if (found / PREPROCESSING).is_file():
            how = read_json(found / PREPROCESSING)
            check_normalisation(found / PREPROCESSING, how.get("image_mean"), how.get("image_std"))
        tokenizer = read_tokenizer(found, made)
        state = read_weights(found / WEIGHTS)
    model = build(state, made, tokenizer, source=str(found), image_size=image_size, swin_window=swin_window)
    return Pretrained(model.to(device).eval(), tokenizer, model.config)


def list_models() -> list[str]:
    """Names that `create_model` knows."""
    return sorted(MODEL_PRESETS)


def create_model(name: str, **changes: Any) -> SyCoCa:
    """A fresh model of a preset.

    Args:
        name: one of `list_models()`.
        changes: fields of ModelConfig; a dictionary changes single fields of a part, as in `vision={"depth": 6}`.

    Raises:
        ConfigError: no such preset or field, or a value that cannot be built.
    """
    if name not in MODEL_PRESETS:
        known = nearest(name, MODEL_PRESETS) or "; known: " + ", ".join(list_models())
        raise ConfigError(f"{name}: no such model{known}")
    data = to_dict(MODEL_PRESETS[name])
    for key, value in changes.items():
        data[key] = data[key] | value if isinstance(value, dict) and isinstance(data.get(key), dict) else value
    return build_model(from_dict(ModelConfig, data))


def build(
    state: dict,
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    source: str,
    image_size: int | None = None,
    swin_window: int | None = None,
) -> SyCoCa:
    """The model of a configuration with the given weights, its positions fitted to image size and windows."""
    vision = config.vision
    image_size, swin = image_size or vision.image_size, vision.swin
    if swin_window is not None:
        if swin is None:
            raise WeightsError(f"swin_window={swin_window}: {source} has no Swin")
        swin, state = replace(swin, window=swin_window), resize_windows(state, swin_window)
    config = replace(config, vision=replace(vision, image_size=image_size, swin=swin))
    if image_size != vision.image_size:
        for name in ("vision.sequence.pos", "image_decoder.pos", "fusion.places.pos"):
            if name in state:
                state[name] = resize_positions(state[name], config.vision.grid)
    # No memory is filled twice: every parameter becomes the tensor that was read.
    with torch.device("meta"):
        model = build_model(config)
    load_into(model, state, source=source)
    model.tokenizer = tokenizer
    return model


def read_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer in a folder; refused where its ids mean something else to the model."""
    try:
        tokenizer = Tokenizer.load(folder / TOKENIZER)
    except ValueError as error:
        raise WeightsError(str(error)) from None
    check_tokenizer(tokenizer, config, source=str(folder / TOKENIZER))
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig, *, source: str) -> None:
    """Refuses a tokenizer whose ids mean something else to the model."""
    text = config.text
    ids, wanted = (tokenizer.pad_id, tokenizer.sot_id, tokenizer.eot_id), (text.pad_id, text.sot_id, text.eot_id)
    if tokenizer.vocab_size > text.vocab_size or ids != wanted:
        raise WeightsError(
            f"{source}: {tokenizer.vocab_size} entries and the special ids {ids}, "
            f"the model has {text.vocab_size} and {wanted}"
        )


def find_model(name_or_path: str | os.PathLike, revision: str | None = None) -> Path:
    """The folder that holds the model, that of a run or of the hub where such is named; or a weight file."""
    path = Path(name_or_path)
    if path.is_dir():
        if (path / OPENCLIP_CONFIG).is_file():
            return path
        if (path / CONFIG).is_file() and (path / WEIGHTS).is_file():
            return path
        if (path / "model" / CONFIG).is_file():
            return path / "model"
        if (path / "checkpoints").is_dir():
            raise WeightsError(
                f"{path}: a run without model/; make it with: python -m train.export {path} {path}/model"
            )
        missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
        raise WeightsError(f"{path}: no {' and no '.join(missing)} in this folder")
    if path.exists():
        if path.suffix in SUFFIXES:
            return path
        raise WeightsError(f"{path}: a file; a model is a folder with {CONFIG} and {WEIGHTS}")
    parent = path.parent
    if _REPOSITORY.fullmatch(str(name_or_path)) and not parent.is_dir():
        return _downloaded(str(name_or_path), revision)
    known = [str(other) for other in parent.iterdir() if other.is_dir()] if parent.is_dir() else []
    raise WeightsError(f"{path}: no such folder{nearest(str(path), known)}")


def _downloaded(repository: str, revision: str | None) -> Path:
    """The folder of a repository of the hub, in the cache of huggingface_hub."""
    try:
        try:
            path = download(repository, OPENCLIP_CONFIG, revision=revision)
        except EntryNotFoundError:
            for name in (CONFIG, TOKENIZER, PREPROCESSING, WEIGHTS):
                path = download(repository, name, revision=revision)
        else:
            _download_first(repository, OPENCLIP_WEIGHTS, revision)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(f"{repository}: no such folder, and not to be had from the hub ({reason})") from None
    return Path(path).parent


def _download_first(repository: str, names: tuple[str, ...], revision: str | None) -> None:
    """The first of the files that the repository has."""
    for name in names:
        try:
            download(repository, name, revision=revision)
        except EntryNotFoundError:
            if name == names[-1]:
                raise
        else:
            return
