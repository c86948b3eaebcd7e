"""What a fine-tuning starts from: a model as it is, or one made ready for what the task asks of it."""

from dataclasses import replace
from typing import Any

from sycoca.checked import require
from sycoca.generate import opening
from sycoca.hub import load_pretrained
from sycoca.model import SyCoCa
from sycoca.weights import load_into
from sycoca.xvlm import build_model
from train.tasks.launch import FinetuneConfig

# Of the published fine-tuning of X-VLM for captions.
_SMOOTHING = 0.1
# What no other objective than masked words has made.
_OF_WORDS = ("word_head.", "text.sequence.tokens.bias")


def starting_model(config: FinetuneConfig, device: Any) -> tuple[SyCoCa, Any]:
    """The model and tokenizer that a fine-tuning starts from, the same on every rank that has the same seed.

    Raises:
        WeightsError: nothing there, or not such a model; one line.
        ConfigError: a prompt that leaves no room for captions.
    """
    model, tokenizer, _ = load_pretrained(config.model, device=device)
    if config.task == "captioning":
        options = config.options
        model = able_to_write(model, options.label_smoothing, options.prompt)
        most, taken = model.config.text.context_length, 2 + len(opening(model, tokenizer))
        require(taken < most, f"prompt: '{model.config.text.prompt}' leaves no room for a caption within {most} tokens")
    return model, tokenizer


def able_to_write(model: SyCoCa, label_smoothing: float | None = None, prompt: str | None = None) -> SyCoCa:
    """The model with the same weights, but able to write captions; where it is X-VLM, by its fusion encoder.

    Args:
        model: one that writes, or X-VLM with a bidirectional encoder; the head of masked words begins anew where that
            objective has not made one.
        label_smoothing: of the captioning loss, 0..1; where None the model's own, that of the published code for one
            that is yet to learn.
        prompt: what captions begin with, without being part of them; where None the model's own.
    """
    config = model.config
    if label_smoothing is None:
        label_smoothing = config.loss.caption_label_smoothing if config.writes else _SMOOTHING
    prompt = config.text.prompt if prompt is None else " ".join(prompt.split())
    text = replace(config.text, prompt=prompt, writes=not config.learns("ic"))
    changed = replace(config, text=text, loss=replace(config.loss, caption_label_smoothing=label_smoothing))
    if changed == config:
        return model
    made = build_model(changed)
    load_into(made, model.state_dict(), source="the model", fresh=_OF_WORDS)
    made.tokenizer = model.tokenizer
    return made.to(next(model.parameters()).device).eval()
