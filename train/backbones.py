"""Encoders that others have trained, in the configuration of a run: sizes and vocabulary are theirs.

Nothing here imports torch.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from sycoca.backbones import bert_tokenizer, like_bert, like_swin
from sycoca.config import ConfigError, ModelConfig
from train.command_line import apply_overrides, full_key, leaves, split_overrides
from train.config import RunConfig

_BESIDE = {"model.vision.image_size": "image_size", "model.text.context_length": "context_length"}


def with_backbones(config: RunConfig, overrides: list[str]) -> RunConfig:
    """The configuration with the sizes of the encoders that it names, and their tokenizer.

    Args:
        config: of the run.
        overrides: the command line's `key=value`; those that name encoders are applied, others may depend on these.

    Raises:
        ConfigError: not to be had, or not such encoders; one line naming the key.
    """
    asked = split_overrides([text for text in overrides if _is_first(text, config)], config)
    config = apply_overrides(config, {key: value for key, value in asked.items() if key not in _BESIDE})
    # What the published sizes have to fit; a value of another type is refused later, as everywhere.
    beside = {_BESIDE[key]: value for key, value in asked.items() if key in _BESIDE and type(value) is int}
    model, data, text = _sized(config, **beside), config.data, config.pretrained.text
    if text is not None:
        data = replace(data, tokenizer=str(bert_tokenizer(text)))
    return replace(config, model=model, data=data)


def check_sizes(config: RunConfig) -> None:
    """Refuses an override of what the named encoders decide."""
    old = leaves(config.model)
    for key, value in leaves(_sized(config)).items():
        # Windows of another side take interpolated tables.
        if old.get(key) != value and not key.endswith(("dropout", "drop_path", "swin.window")):
            part = "vision" if key.startswith("vision.") else "text"
            name = getattr(config.pretrained, part)
            raise ConfigError(f"pretrained.{part}={name}: model.{key} is {value} there, not {old.get(key)}")


def _is_first(text: str, config: RunConfig) -> bool:
    with contextlib.suppress(ConfigError):
        key = full_key(text.partition("=")[0], config)
        return "=" in text and (key in _BESIDE or key.startswith("pretrained."))
    return False


def _sized(config: RunConfig, image_size: int | None = None, context_length: int | None = None) -> ModelConfig:
    given, model = config.pretrained, config.model
    if given.vision is not None:
        with _named("vision", given.vision):
            model = replace(model, vision=like_swin(model.vision, given.vision, image_size=image_size))
    if given.text is not None:
        with _named("text", given.text):
            model = like_bert(model, given.text, context_length=context_length)
    return model


@contextlib.contextmanager
def _named(part: str, name: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        told = str(error).removeprefix(f"{name}: ")
        raise ConfigError(f"pretrained.{part}={name}: {told}") from None
