"""Encoders that others have trained, in the configuration of a run: sizes and vocabulary are theirs.

Nothing here imports torch.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from sycoca.backbones import bert_tokenizer, like_bert, like_swin
from sycoca.config import ConfigError, ModelConfig
from train.command_line import leaves
from train.config import RunConfig


def with_backbones(config: RunConfig) -> RunConfig:
    """The configuration with the sizes of the encoders that it names, and their tokenizer.

    Raises:
        ConfigError: not to be had, or not such encoders; one line naming the key.
    """
    given, data = config.pretrained, config.data
    if given.text is not None:
        with _named("text"):
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


def _sized(config: RunConfig) -> ModelConfig:
    given, model = config.pretrained, config.model
    if given.vision is not None:
        with _named("vision"):
            model = replace(model, vision=like_swin(model.vision, given.vision))
    if given.text is not None:
        with _named("text"):
            model = like_bert(model, given.text)
    return model


@contextlib.contextmanager
def _named(part: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"pretrained.{part}={error}") from None
