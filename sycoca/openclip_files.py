"""OpenCLIP's files: a folder with open_clip_config.json, or weights alone and the name of what they are weights of.

open_clip keeps its flag `correct_cls_mask` in no file: without being told, both sides take the mask as released.
"""

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sycoca.checked import nearest, to_dict
from sycoca.config import CLIP_IDS, ConfigError, ModelConfig
from sycoca.hub_mixin import check_normalisation, read_json, write_json
from sycoca.images import IMAGE_MEAN, IMAGE_STD
from sycoca.openclip import from_openclip, openclip_config, openclip_model_cfg, openclip_names, to_openclip
from sycoca.tokenizer import Tokenizer
from sycoca.weights import WeightsError, architecture_differs, read_weights, write_weights

OPENCLIP_CONFIG = "open_clip_config.json"
OPENCLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pt")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def read_openclip(
    path: Path, name: str | None = None, *, correct_cls_mask: bool = False, allow_pickle: bool = False
) -> tuple[dict[str, Tensor], ModelConfig, Tokenizer]:
    """Weights of open_clip's CoCa under our names, their configuration and CLIP's tokenizer.

    Args:
        path: a folder with open_clip_config.json, or a weight file.
        name: of one of open_clip's models, or a JSON file like theirs; needed with a weight file alone.
        correct_cls_mask: the weights were trained with open_clip's flag of this name.
        allow_pickle: unpickle arbitrary Python objects, which can run any code.

    Raises:
        WeightsError: unreadable, no CoCa, or weights of another architecture.
    """
    if path.is_dir():
        source = path / OPENCLIP_CONFIG
        weights = next((path / file for file in OPENCLIP_WEIGHTS if (path / file).is_file()), None)
        if weights is None:
            raise WeightsError(f"{path}: {OPENCLIP_CONFIG}, but none of {', '.join(OPENCLIP_WEIGHTS)}")
    else:
        source, weights = _model_config(path, name), path
    data = read_json(source)
    how = data.get("preprocess_cfg") or {}
    check_normalisation(source, how.get("mean"), how.get("std"))
    if how.get("resize_mode", "shortest") != "shortest":
        raise WeightsError(f"{source}: resize_mode {how['resize_mode']!r}, this package knows 'shortest' alone")
    try:
        config = openclip_config(data.get("model_cfg", data), correct_cls_mask=correct_cls_mask)
        tokenizer = Tokenizer.clip()
    except (WeightsError, ConfigError, ModuleNotFoundError) as error:
        raise WeightsError(f"{source}: {error}") from None
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise WeightsError(f"{source}: no configuration of open_clip ({type(error).__name__}: {error})") from None
    state = read_weights(weights, allow_pickle=allow_pickle)
    # Old releases stored masks, which are no weights.
    state = {key: tensor for key, tensor in state.items() if not key.endswith("attn_mask")}
    architecture_differs(openclip_names(config), state, source=str(weights))
    return from_openclip(state, config), config, tokenizer


def save_openclip(model: Any, path: str | os.PathLike) -> None:
    """Writes a model as open_clip reads it; image decoder and score heads are left out.

    Args:
        model: of open_clip's structure, as `load_pretrained` makes from its files.
        path: `.safetensors`, `.pt`, `.pth` or `.bin` for the state dict alone, else a folder, made where missing.

    Raises:
        WeightsError: built otherwise than open_clip's CoCa can be; the first difference is named.
    """
    path = Path(path)
    model_cfg = openclip_model_cfg(model.config)
    _check_same(model.config, model_cfg)
    state = to_openclip(model.state_dict(), model.config)
    if path.suffix in SUFFIXES:
        write_weights(state, path)
        return
    path.mkdir(parents=True, exist_ok=True)
    write_weights(state, path / OPENCLIP_WEIGHTS[0])
    how = {"mean": list(IMAGE_MEAN), "std": list(IMAGE_STD), "interpolation": "bicubic", "resize_mode": "shortest"}
    write_json(path / OPENCLIP_CONFIG, {"model_cfg": model_cfg, "preprocess_cfg": how})


def _check_same(config: ModelConfig, model_cfg: Mapping[str, Any]) -> None:
    """Refuses what would be another model after a way there and back."""
    special = {name: getattr(config.text, name) for name in CLIP_IDS}
    if special != CLIP_IDS:
        raise WeightsError(f"not of open_clip's structure: text has {special}, CLIP's are {CLIP_IDS}")
    back = openclip_config(model_cfg, correct_cls_mask=config.text.cls_place == "last")
    for part in ("vision", "text", "caption_decoder"):
        ours, theirs = to_dict(getattr(config, part)), to_dict(getattr(back, part))
        for key, value in ours.items():
            if value != theirs[key] and not (config.vision.pooler == "cls" and key.startswith("pooler_")):
                raise WeightsError(f"not of open_clip's structure: {part}.{key} {value}, there {theirs[key]}")


def _model_config(weights: Path, name: str | None) -> Path:
    """The file of a model configuration of open_clip."""
    if name is None:
        raise WeightsError(
            f'{weights}: a file of weights alone; say what they are weights of, as in config="coca_ViT-B-32", or give '
            "the folder of a model"
        )
    if name.endswith(".json"):
        return Path(name)
    spec = importlib.util.find_spec("open_clip")
    folders = [Path(folder) / "model_configs" for folder in (spec.submodule_search_locations or ())] if spec else []
    known = {path.stem: path for folder in folders for path in folder.glob("*.json")}
    if not known:
        raise WeightsError(
            f"config={name}: the names are open_clip_torch's, which is not installed: pip install "
            '"sycoca[openclip]"; a JSON file of theirs does as well'
        )
    if name not in known:
        models = sorted(stem for stem, path in known.items() if "multimodal_cfg" in json.loads(path.read_text("utf-8")))
        raise WeightsError(f"config={name}: no model of open_clip{nearest(name, models)}; CoCa: {', '.join(models)}")
    return known[name]
