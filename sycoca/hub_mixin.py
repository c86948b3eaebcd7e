"""A model as a folder: what huggingface_hub's mixin asks of a model class, and the files that make up the folder.

config.json  model.safetensors  tokenizer.json  preprocessor_config.json  README.md (the model card)
"""

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from huggingface_hub import ModelHubMixin

from sycoca.checked import from_dict, to_dict
from sycoca.config import ConfigError, ModelConfig
from sycoca.images import IMAGE_MEAN, IMAGE_STD
from sycoca.weights import WeightsError, write_weights

if TYPE_CHECKING:
    from sycoca.tokenizer import Tokenizer

CONFIG, WEIGHTS, TOKENIZER, PREPROCESSING = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "preprocessor_config.json",
)
_KIND = {"architectures": ["SyCoCa"], "model_type": "sycoca"}
_CARD = """---
{{ card_data }}
---

# A SyCoCa model

An image encoder, a causal text encoder and a captioning decoder: image and text features in one space, and captions.

```python
from sycoca import load_pretrained

model, tokenizer, config = load_pretrained("{{ repo_id | default('this folder', true) }}")
```
"""


class HubMixin(
    ModelHubMixin,
    library_name="sycoca",
    license="apache-2.0",
    pipeline_tag="image-to-text",
    tags=["image-text", "contrastive", "captioning"],
    model_card_template=_CARD,
):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` of a model whose constructor takes a ModelConfig.

    Attributes:
        tokenizer: the one the model was trained with; set by `from_pretrained`, None on a fresh model.
    """

    tokenizer: "Tokenizer | None" = None

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, **options: Any) -> Self:
        """The model of a folder, a weight file or a repository of the hub; as `sycoca.hub.load_pretrained`."""
        from sycoca.hub import load_pretrained

        return load_pretrained(name_or_path, **options).model

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, tokenizer: "Tokenizer | None" = None, **options: Any
    ) -> str | None:
        """Writes the model's folder, file by file whole or not at all.

        Args:
            save_directory: made where missing; files of other names in it stay.
            tokenizer: the one the model was trained with, where the model does not hold it.
            options: as `huggingface_hub.ModelHubMixin.save_pretrained`.

        Returns:
            The address of the commit with `push_to_hub=True`, else None.

        Raises:
            WeightsError: no tokenizer.
        """
        self.tokenizer = tokenizer or self.tokenizer
        if self.tokenizer is None:
            raise WeightsError("save_pretrained: a folder holds its tokenizer too; give tokenizer=...")
        save_directory = Path(save_directory)
        save_directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=save_directory) as partial:
            address = super().save_pretrained(partial, **{"repo_id": save_directory.name, **options})
            # The configuration last: a folder that has one is complete.
            for path in sorted(Path(partial).iterdir(), key=lambda path: path.name == CONFIG):
                os.replace(path, save_directory / path.name)
        return address

    def push_to_hub(self, repo_id: str, *, tokenizer: "Tokenizer | None" = None, **options: Any) -> str:
        """Uploads the model's folder; as `huggingface_hub.ModelHubMixin.push_to_hub`. Returns the commit's address."""
        self.tokenizer = tokenizer or self.tokenizer
        options["model_card_kwargs"] = {"repo_id": repo_id, **(options.get("model_card_kwargs") or {})}
        return super().push_to_hub(repo_id, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        write_weights(self.state_dict(), save_directory / WEIGHTS)
        self.tokenizer.save(save_directory / TOKENIZER)
        write_json(save_directory / PREPROCESSING, preprocessing(self.config.vision.image_size))
        write_json(save_directory / CONFIG, _KIND | to_dict(self.config))


def read_config(path: Path) -> ModelConfig:
    """The configuration in a folder's config.json.

    Raises:
        WeightsError: unreadable, or not of a model of this package.
    """
    data = read_json(path)
    kind = data.pop("model_type", None)
    if kind != _KIND["model_type"]:
        raise WeightsError(f"{path}: model_type {kind!r}, needs {_KIND['model_type']!r}")
    data.pop("architectures", None)
    try:
        return from_dict(ModelConfig, data)
    except ConfigError as error:
        raise WeightsError(f"{path}: {error}") from None


def preprocessing(image_size: int) -> dict:
    """How images are prepared, in the words of transformers' CLIPImageProcessor."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }


def check_normalisation(source: Path, mean: Any, std: Any) -> None:
    """Refuses images normalised otherwise than this package does; None means as here."""
    for name, given, ours in (("mean", mean, IMAGE_MEAN), ("std", std, IMAGE_STD)):
        if given is not None and tuple(given) != ours:
            raise WeightsError(f"{source}: images of {name} {tuple(given)}, this package normalises with {ours}")


def read_json(path: Path) -> dict:
    """The object in a JSON file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise WeightsError(f"{path}: no JSON ({error})") from None
    if not isinstance(data, dict):
        raise WeightsError(f"{path}: no JSON object")
    return data


def write_json(path: Path, data: dict) -> None:
    """Writes an object as JSON."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
