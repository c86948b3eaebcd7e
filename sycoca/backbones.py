"""Encoders that others have trained, from a folder or the hub: a Swin for the images, a BERT for the texts.

    BERT of n layers    0 .. n/2 - 1 the text encoder;  n/2 .. n - 1 the fusion encoder, whose cross-attention is new

Sizes come from the published config.json, without torch; weights from transformers' own `from_pretrained`, which knows
every older layout of them.
"""

import contextlib
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sycoca.backbone_config import BertConfig, SwinConfig
from sycoca.checked import ConfigError, nearest, require
from sycoca.config import FusionConfig, ModelConfig, VisionConfig

if TYPE_CHECKING:
    from torch import Tensor

    from sycoca.xvlm import XVLM

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_TOKENIZER = "tokenizer.json"
_WORD_HEAD = ("word_head.", "text.sequence.tokens.bias")
_SPECIAL = {"pad_id": "[PAD]", "sot_id": "[CLS]", "eot_id": "[SEP]", "mask_id": "[MASK]"}


def like_swin(vision: VisionConfig, name: str, *, image_size: int | None = None) -> VisionConfig:
    """The image encoder's configuration with the sizes of a published Swin.

    Args:
        vision: whose image size stays where none is given.
        name: folder, or repository of the hub, with the config.json of transformers.
        image_size: pixels, at least a window on the last grid.

    Raises:
        ConfigError: nothing there, no Swin, or one that this package does not build; one line.
    """
    data = _described(name, "swin")
    fixed = {"qkv_bias": True, "hidden_act": "gelu", "use_absolute_embeddings": False, "num_channels": 3}
    _require_values(name, data, fixed | {"layer_norm_eps": 1e-5})
    with _read(name):
        swin = SwinConfig(
            embed_width=data["embed_dim"],
            depths=tuple(data["depths"]),
            heads=tuple(data["num_heads"]),
            window=data["window_size"],
            patch_size=data["patch_size"],
            drop_path=data.get("drop_path_rate", SwinConfig.drop_path),
        )
        mlp_ratio = float(data.get("mlp_ratio", 4.0))
    size = vision.image_size if image_size is None else image_size
    given = {"region_form": "pooled", "cls_position": False, "stem": "patch", "mlp_ratio": mlp_ratio}
    return replace(vision, image_size=size, swin=swin, **swin.implied, **given)


def like_bert(model: ModelConfig, name: str, *, context_length: int | None = None) -> ModelConfig:
    """The configuration with text and fusion encoder of the sizes, and the vocabulary, of a published BERT.

    Args:
        model: whose context length stays where none is given.
        name: folder, or repository of the hub, with config.json and tokenizer.json.
        context_length: tokens, at most its positions.

    Raises:
        ConfigError: nothing there, no BERT, or one that this package does not build; one line.
    """
    data = _described(name, "bert")
    _require_values(name, data, {"hidden_act": "gelu", "position_embedding_type": "absolute", "layer_norm_eps": 1e-12})
    with _read(name):
        layers, width, rows = (data[key] for key in ("num_hidden_layers", "hidden_size", "vocab_size"))
        sizes = {"heads": data["num_attention_heads"], "mlp_ratio": data["intermediate_size"] / width}
        bert = BertConfig(
            positions=data["max_position_embeddings"],
            segments=data["type_vocab_size"],
            dropout=data["hidden_dropout_prob"],
        )
    ids = _special_ids(bert_tokenizer(name))
    first = layers if model.fusion is None else layers // 2
    length = model.text.context_length if context_length is None else context_length
    given = {"kind": "bidirectional", "bert": bert, "vocab_size": rows, "width": width, "depth": first}
    given |= {"context_length": length}
    text = replace(model.text, **given, **sizes, **ids)
    fusion = None if model.fusion is None else FusionConfig(depth=layers - first, **sizes)
    return replace(model, text=text, fusion=fusion)


def bert_tokenizer(name: str) -> Path:
    """The tokenizer.json of a published BERT."""
    return _file(name, _TOKENIZER)


def load_backbones(model: "XVLM", *, vision: str | None = None, text: str | None = None) -> list[str]:
    """Gives a model's encoders published weights, in place.

    Args:
        model: whole, of a configuration as `like_swin` and `like_bert` make it.
        vision: folder of a Swin, or its name on the hub; for windows of another side its tables are interpolated.
        text: of a BERT; its second half goes to the fusion encoder, its head, where it has one, to the masked words.

    Returns:
        Parts that begin anew.

    Raises:
        ConfigError: weights of other sizes, none, or no transformers; one line.
    """
    own, state = model.state_dict(), {}
    if vision is not None:
        from sycoca.weights import resize_windows

        require(model.config.vision.swin, f"{vision}: a Swin, and model.vision.swin is none")
        wanted = [key for key in own if begins_given(key, vision=True, text=False)]
        given = resize_windows(_swin_state(vision), model.config.vision.swin.window)
        state |= _fitting(vision, given, own, wanted)
    if text is not None:
        require(model.config.text.bert, f"{text}: a BERT, and model.text.bert is none")
        wanted = [key for key in own if begins_given(key, vision=False, text=True)]
        state |= _fitting(text, _bert_state(text, model.config), own, wanted)
    model.load_state_dict(state, strict=False)
    return sorted({name.partition(".")[0] for name in own if name not in state})


def begins_given(name: str, *, vision: bool, text: bool) -> bool:
    """Whether a model's parameter begins with published weights, where such a Swin or such a BERT is loaded."""
    part, _, rest = name.partition(".")
    if part == "fusion":
        return text and rest.startswith("blocks.") and "cross" not in rest
    return (vision and part == "vision") or (text and part in ("text", "word_head"))


def _fitting(name: str, given: dict[str, "Tensor"], own: dict[str, "Tensor"], wanted: list[str]) -> dict[str, "Tensor"]:
    """The given tensors, each of the model's shape; only the head of masked words may be missing."""
    for key, tensor in given.items():
        found = tuple(own[key].shape) if key in own else "no such parameter"
        require(found == tuple(tensor.shape), f"{name}: {key} {tuple(tensor.shape)}, the model has {found}")
    missing = [key for key in wanted if key not in given and not key.startswith(_WORD_HEAD)]
    require(not missing, f"{name}: its weights lack {', '.join(missing[:1])}, {len(missing)} in all")
    return given


def _swin_state(name: str) -> dict[str, "Tensor"]:
    with _loading(name):
        from transformers import SwinModel

        found, told = SwinModel.from_pretrained(name, add_pooling_layer=False, **_how())
    _require_all(name, told["missing_keys"])
    return {f"vision.swin.{key}": tensor for key, tensor in found.state_dict().items()}


def _bert_state(name: str, config: ModelConfig) -> dict[str, "Tensor"]:
    with _loading(name):
        from transformers import BertForMaskedLM

        found, told = BertForMaskedLM.from_pretrained(name, **_how())
    head = {key for key in told["missing_keys"] if key.startswith("cls.")}
    _require_all(name, set(told["missing_keys"]) - head)
    first, learns_words = config.text.depth, config.learns("mlm") and not head
    state = {}
    for key, tensor in found.state_dict().items():
        part, _, rest = key.removeprefix("bert.").partition(".")
        match part:
            case "embeddings":
                table = rest == "word_embeddings.weight"
                state["text.sequence.tokens.weight" if table else f"text.sequence.embeddings.{rest}"] = tensor
            case "encoder":
                layer, _, rest = rest.removeprefix("layer.").partition(".")
                if int(layer) < first:
                    state[f"text.blocks.{layer}.{rest}"] = tensor
                elif config.fuses:
                    state[f"fusion.blocks.{int(layer) - first}.{rest}"] = tensor
            case "cls" if learns_words and rest == "predictions.bias":
                state["text.sequence.tokens.bias"] = tensor
            case "cls" if learns_words and rest.startswith("predictions.transform."):
                rest = rest.removeprefix("predictions.transform.")
                state[f"word_head.{rest.replace('LayerNorm', 'norm')}"] = tensor
    return state


def _how() -> dict[str, Any]:
    from sycoca.hub_file import reachable

    return {"dtype": "float32", "output_loading_info": True, "local_files_only": not reachable()}


def _require_all(name: str, missing: Collection[str]) -> None:
    # What it does not find, transformers leaves at random.
    require(not missing, f"{name}: its weights lack {min(missing, default='')}, {len(missing)} in all")


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """transformers without its reports and bars; its long explanations become one line."""
    try:
        from transformers.utils import logging
    except ImportError:
        raise ConfigError(f'{name}: needs transformers: pip install -e ".[transformers]"') from None
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{name}: {_told(error)}") from None
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _described(name: str, kind: str) -> dict[str, Any]:
    """The config.json of transformers, of a model of one kind."""
    path = _file(name, "config.json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = data.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{name}: config.json: {_told(error)}") from None
    require(found == kind, f"{name}: config.json: model_type {found!r}, needs {kind!r}")
    return data


def _require_values(name: str, data: dict[str, Any], fixed: dict[str, Any]) -> None:
    for key, value in fixed.items():
        found = data.get(key, value)
        require(found == value, f"{name}: config.json: {key} {found!r}, this package builds {value!r}")


@contextlib.contextmanager
def _read(name: str) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise ConfigError(f"{name}: config.json: no {error.args[0]}") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"{name}: config.json: {_told(error)}") from None


def _special_ids(path: Path) -> dict[str, int]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = data["model"]["vocab"]
        return {key: vocabulary[token] for key, token in _SPECIAL.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: no WordPiece vocabulary with {', '.join(_SPECIAL.values())} ({error})") from None


def _file(name: str, file: str) -> Path:
    """A file of a folder, or of a repository of the hub in the cache of huggingface_hub."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / file).is_file():
            raise ConfigError(f"{name}: no {file} in this folder")
        return folder / file
    if not _REPOSITORY.fullmatch(name) or folder.parent.is_dir():
        known = [str(other) for other in folder.parent.glob("*/")] if folder.parent.is_dir() else []
        raise ConfigError(f"{name}: no such folder{nearest(name, known)}")
    from huggingface_hub.errors import HfHubHTTPError

    from sycoca.hub_file import download

    try:
        return Path(download(name, file))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(f"{name}: no such folder, and not to be had from the hub ({_told(error)})") from None


def _told(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
