"""Classifiers on top of a model, and the folder in which they lie beside it.

image label    logits = s W f + b                 f unit image feature, s the logit scale
statement      logits = W2 GELU(LN(W1 [z; z'])) + b   z the fusion encoder's [CLS] with either image
answer         logits = W LN(h_EOT) + b           h the caption decoder's state at the end of the question,
                                                  or the fusion encoder's [CLS] where no captions are learned
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sycoca.config import ConfigError
from train.tasks.facts import FACTS

_WEIGHTS = "head.safetensors"


class LabelHead(nn.Module):
    """Logits of image labels.

    Args:
        width: of the image features.
        labels: how many.
        scale: of the unit features.
        weight: (labels, width) to begin with; zeros where None. Features of the classes' names make it a zero-shot
            classifier.
    """

    def __init__(self, width: int, labels: int, scale: float, weight: Tensor | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(width, labels)
        self.register_buffer("scale", torch.tensor(float(scale)))
        nn.init.zeros_(self.linear.bias)
        nn.init.zeros_(self.linear.weight)
        if weight is not None:
            self.linear.weight.data.copy_(weight)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(self.scale * features)


class AnswerHead(nn.Module):
    """Logits of the known answers, from the state (B, D) at the end of the question."""

    def __init__(self, width: int, answers: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, answers)
        nn.init.zeros_(self.linear.bias)
        nn.init.normal_(self.linear.weight, std=0.02)

    def forward(self, state: Tensor) -> Tensor:
        return self.linear(self.norm(state))


class StatementHead(nn.Module):
    """Logits (B, 2) of "false" and "true", from the fused states (B, 2 D) of a sentence with two images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, 2)
        for linear in (self.hidden, self.linear):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        return self.linear(nn.functional.gelu(self.norm(self.hidden(states))))


def label_logits(model: Any, head: LabelHead, images: Tensor) -> Tensor:
    """Logits (B, classes) of images (B, 3, H, W)."""
    return head(model.encode_image(images).features)


def answer_logits(model: Any, head: AnswerHead, images: Any, questions: Tensor) -> Tensor:
    """Logits (B, answers) of questions (B, T) int64 about B encoded images."""
    if model.caption_decoder is None:
        return head(model.fused(model.encode_text(questions), model.view_images(images)))
    states = model.caption_decoder.states(model.text.words(questions), images.memory)
    last = (questions == model.config.text.eot_id).int().argmax(1)
    return head(states.gather(1, last[:, None, None].expand(-1, 1, states.shape[2])).squeeze(1))


class Head(NamedTuple):
    """A classifier and the names of what it tells apart."""

    module: nn.Module
    names: tuple[str, ...]


def save_task(folder: Path, task: str, facts: dict[str, Any], head: Head | None) -> None:
    """Writes beside a model what it was fine-tuned for, and its classifier."""
    if head is not None:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in head.module.state_dict().items()}
        save_file(state, folder / _WEIGHTS)
        facts = facts | {"names": list(head.names)}
    (folder / FACTS).write_text(json.dumps({"task": task, **facts}, indent=1) + "\n", encoding="utf-8")


def load_head(facts: dict[str, Any], config: Any) -> Head:
    """The classifier of a folder that `task_facts` read.

    Raises:
        ConfigError: none there, or one of other sizes.
    """
    path, names = Path(facts["folder"]) / _WEIGHTS, tuple(facts.get("names", ()))
    if not path.is_file() or not names:
        raise ConfigError(
            f"{facts['folder']}: no classifier; it is left there by train/finetune.py {facts.get('task')}"
        )
    state = load_file(path)
    if "scale" in state:
        module: nn.Module = LabelHead(config.embed_dim, len(names), float(state["scale"]))
    elif "hidden.weight" in state:
        module = StatementHead(config.text.width)
    else:
        module = AnswerHead(config.text.width, len(names))
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[1].strip()}") from None
    return Head(module.eval(), names)
