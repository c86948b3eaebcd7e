"""Names of classes, and the sentences that they are put into for zero-shot classification.

w_c = normalise(mean_t normalise(text(t with c)))
"""

import importlib.util
from pathlib import Path

from sycoca.config import ConfigError, nearest
from train.data.scene_shapes import COLOURS, SHAPES
from train.data.scene_words import PLACE_WORDS

_CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
_PHOTOS = ("a photo of a {}.", "a blurry photo of a {}.", "a bad photo of a {}.", "a photo of the {}.", "a small {}.")
SCENE_PLACES = tuple(words[0] for words in PLACE_WORDS.values())
_SCENES = tuple(f"a {colour} {shape} {{}}" for colour in COLOURS for shape in SHAPES)
_PLAIN = ("a photo of a {}.", "a photo of the {}.")
CLASSES = {
    "scenes": SCENE_PLACES,
    "cifar10": tuple(_CIFAR10),
}
TEMPLATES = {"scenes": _SCENES, "cifar10": _PHOTOS, "plain": _PLAIN}
_WITH_OPEN_CLIP = ("imagenet",)


def class_names(name: str | None) -> tuple[str, ...] | None:
    """The classes of a set that is known by name, or of a file with one class a line; None for None.

    Raises:
        ConfigError: neither, or a file that repeats a class or holds none.
    """
    if name is None or name in CLASSES:
        return CLASSES.get(name)
    if name == "imagenet":
        return tuple(_open_clip("IMAGENET_CLASSNAMES"))
    names = _lines(name, "classes", [*CLASSES, *_WITH_OPEN_CLIP])
    if len(set(names)) < len(names):
        twice = next(word for i, word in enumerate(names) if word in names[:i])
        raise ConfigError(f"classes={name}: {twice!r} stands twice")
    return names


def are_numbers(classes: tuple[str, ...]) -> bool:
    """Whether classes are numbered only, so that no sentence can name them."""
    return all(name.isdigit() for name in classes)


def templates(name: str | None, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The sentences of a set that is known by name, or of a file with one a line, `{}` where the class stands.

    Raises:
        ConfigError: neither, or a line without `{}`.
    """
    if name is None:
        fitting = next((known for known, names in CLASSES.items() if set(classes) <= set(names)), "plain")
        return TEMPLATES[fitting]
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name == "imagenet":
        return tuple(template("{}") for template in _open_clip("OPENAI_IMAGENET_TEMPLATES"))
    lines = _lines(name, "templates", [*TEMPLATES, *_WITH_OPEN_CLIP])
    for number, line in enumerate(lines, 1):
        if line.count("{}") != 1:
            raise ConfigError(f"templates={name}: line {number} {line!r} needs one {{}}, where the class stands")
    return lines


def _lines(name: str, option: str, known: list[str]) -> tuple[str, ...]:
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"{option}={name}: no such file{nearest(name, known) or '; known: ' + ', '.join(known)}")
    try:
        lines = tuple(filter(None, (line.strip() for line in path.read_text(encoding="utf-8").splitlines())))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option}={name}: {error}") from None
    if not lines:
        raise ConfigError(f"{option}={name}: the file is empty")
    return lines


def _open_clip(name: str):
    """A list that ships with open_clip_torch, which itself is not imported: it would need torchvision."""
    spec = importlib.util.find_spec("open_clip")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = next((p for f in folders if (p := Path(f) / "zero_shot_metadata.py").is_file()), None)
    if path is None:
        raise ConfigError('ImageNet\'s classes and templates come with open_clip_torch: pip install "sycoca[openclip]"')
    loaded = importlib.util.spec_from_file_location("open_clip_zero_shot_metadata", path)
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    return getattr(module, name)
