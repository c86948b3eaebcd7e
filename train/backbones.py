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


def with_backbones(config: RunConfig, overrides: list[str]) -> RunConfig:
    """The configuration with the sizes of the encoders that it names, and their tokenizer.

    Args:
        config: of the run.
        overrides: the command line's `key=value`; those that name encoders are applied, others may depend on these.

    Raises:
        ConfigError: not to be had, or not such encoders; one line naming the key.
    """
    config = apply_overrides(config, split_overrides([text for text in overrides if _names_one(text, config)], config))
    given, data = config.pretrained, config.data
    if given.text is not None:
        with _named("text", given.text):
            data = replace(data, tokenizer=str(bert_tokenizer(given.text)))
    return replace(config, model=_sized(config), data=data)


def check_sizes(config: RunConfig) -> None:
    """Refuses an override of what the named encoders decide."""
    old = leaves(config.model)
    for key, value in leaves(_sized(config)).items():
        if old.get(key) != value and not key.endswith(("dropout", "drop_path")):
            part = "vision" if key.startswith("vision.") else "text"
            name = getattr(config.pretrained, part)
            raise ConfigError(f"pretrained.{part}={name}: model.{key} is {value} there, not {old.get(key)}")


def _names_one(text: str, config: RunConfig) -> bool:
    with contextlib.suppress(ConfigError):
        return full_key(text.partition("=")[0], config).startswith("pretrained.")
    return False


def _sized(config: RunConfig) -> ModelConfig:
    given, model = config.pretrained, config.model
    if given.vision is not None:
        with _named("vision", given.vision):
            model = replace(model, vision=like_swin(model.vision, given.vision))
    if given.text is not None:
        with _named("text", given.text):
            model = like_bert(model, given.text)
    return model


@contextlib.contextmanager
def _named(part: str, name: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        told = str(error).removeprefix(f"{name}: ")
        raise ConfigError(f"pretrained.{part}={name}: {told}") from None
