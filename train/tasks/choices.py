"""Choices among texts: A-OKVQA's multiple choice, SugarCrepe's hard negatives, and both made of the built-in scenes.

multiple choice  scenes | aokvqa:FILE.json?images=FOLDER
hard negatives   scenes | sugarcrepe:FILE_OR_FOLDER?images=FOLDER
"""

from typing import Any, NamedTuple

from train.data import DataError, Source, open_dataset
from train.data.order import mix
from train.data.sample import Skipped
from train.data.scene_shapes import COLOURS, SHAPES
from train.tasks.annotations import Pictures, complete, parse_annotations, read_json, require_some

CHOICE_KINDS = {"aokvqa": ("images",)}
PAIR_KINDS = {"sugarcrepe": ("images",)}
_CHOICES = 4


class Choice(NamedTuple):
    """A prompt, which may be empty, the texts that may follow it, and which of them is right."""

    prompt: str
    texts: tuple[str, ...]
    right: int
    kind: str
    key: str


class ChoiceSource(Source):
    """A map-style data set of images with choices."""

    def __init__(self, name: str, split: str) -> None:
        self.name, self.split, self.skipped = name, split, Skipped()
        self._choices: list[tuple[str, tuple[Choice, ...]]] = []
        self._pictures: Pictures | None = None

    def __len__(self) -> int:
        return len(self._choices)

    def choices(self, index: int) -> tuple[Choice, ...]:
        """The choices about an image, without touching it."""
        return self._choices[index][1]

    def image(self, index: int) -> tuple[Any, str]:
        """An image and its key; raises BadSample where it cannot be used."""
        name = self._choices[index][0]
        return self._pictures.read(name), name

    def _add(self, choices: dict[str, list[Choice]]) -> None:
        self._choices = [(name, tuple(found)) for name, found in choices.items()]


class Aokvqa(ChoiceSource):
    """Multiple choice of A-OKVQA."""

    def __init__(self, path, images: str | None, split: str) -> None:
        super().__init__(str(path), split)
        self._pictures = Pictures(images, path)
        content = read_json(path)
        if not isinstance(content, list):
            raise DataError(f"data source '{path}': no list of questions")
        fields = {"question_id": str, "image_id": int, "question": str, "choices": list, "correct_choice_idx": int}
        found: dict[str, list[Choice]] = {}
        for entry in complete(content, fields, "question_id", path, self.skipped):
            name, texts, right = (
                self._pictures.find_coco(entry["image_id"]),
                entry["choices"],
                entry["correct_choice_idx"],
            )
            if name is None:
                self.skipped.sample(str(entry["image_id"]), "image of a question is absent")
            elif len(texts) < 2 or not all(isinstance(t, str) and t.strip() for t in texts):
                self.skipped.row("choices are fewer than two, or empty", f"question {entry['question_id']}")
            elif not 0 <= right < len(texts):
                self.skipped.row("right choice is none of the choices", f"question {entry['question_id']}")
            else:
                choice = Choice(entry["question"], tuple(texts), right, "question", entry["question_id"])
                found.setdefault(name, []).append(choice)
        require_some(len(found), "question", path, self.skipped)
        self._add(found)


class SugarCrepe(ChoiceSource):
    """True captions against hard negatives; the right text is the first."""

    def __init__(self, path, images: str | None, split: str) -> None:
        super().__init__(str(path), split)
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not files:
            raise DataError(f"data source '{path}': no .json file in the folder")
        self._pictures = Pictures(images, files[0])
        found: dict[str, list[Choice]] = {}
        for file in files:
            content = read_json(file)
            entries = list(content.values()) if isinstance(content, dict) else content
            if not isinstance(entries, list):
                raise DataError(f"data source '{file}': no object of captions")
            fields = {"filename": str, "caption": str, "negative_caption": str}
            for number, entry in enumerate(complete(entries, fields, None, file, self.skipped)):
                where, texts = f"{file.stem}/{number}", (entry["caption"], entry["negative_caption"])
                name = self._pictures.find(entry["filename"])
                if name is None:
                    self.skipped.sample(entry["filename"], "image of a caption is absent")
                elif not all(text.strip() for text in texts) or texts[0] == texts[1]:
                    self.skipped.row("captions are empty or equal", where)
                else:
                    found.setdefault(name, []).append(Choice("", texts, 0, file.stem, where))
        require_some(len(found), "pair of captions", path, self.skipped)
        self._add(found)


class SceneChoices(ChoiceSource):
    """Choices about the built-in scenes: answers of the question's kind, or captions with one word exchanged."""

    def __init__(self, scenes: Source, make) -> None:
        super().__init__(scenes.name, scenes.split)
        self._scenes, self._make = scenes, make

    def __len__(self) -> int:
        return len(self._scenes)

    def choices(self, index: int) -> tuple[Choice, ...]:
        return self._make(self._scenes, index)

    def image(self, index: int) -> tuple[Any, str]:
        image, _, key = self._scenes.pair(index, 0)
        return image, key


def _scene_questions(scenes: Source, index: int) -> tuple[Choice, ...]:
    words = {"color": tuple(COLOURS), "shape": tuple(SHAPES)}
    made = []
    for number, asked in enumerate(scenes.questions(index)):
        if asked.kind not in words:
            continue
        others = [word for word in words[asked.kind] if word != asked.answer]
        first = mix(index, number) % len(others)
        texts = [others[(first + i) % len(others)] for i in range(_CHOICES - 1)]
        right = mix(index, number, 1) % _CHOICES
        texts.insert(right, asked.answer)
        made.append(Choice(asked.question, tuple(texts), right, asked.kind, f"{index}/{number}"))
    return tuple(made)


def _scene_pairs(scenes: Source, index: int) -> tuple[Choice, ...]:
    caption = scenes[index].captions[0]
    made = []
    for kind, known in (("replace_color", tuple(COLOURS)), ("replace_shape", tuple(SHAPES))):
        words = caption.split(" ")
        places = [i for i, word in enumerate(words) if word.strip(",") in known]
        if not places:
            continue
        place = places[mix(index, len(places)) % len(places)]
        said = words[place].strip(",")
        others = [word for word in known if word not in caption]
        words[place] = words[place].replace(said, others[mix(index, place) % len(others)])
        made.append(Choice("", (caption, " ".join(words)), 0, kind, f"{index}/{kind}"))
    return tuple(made)


def open_choices(spec: str, split: str, *, image_size: int) -> ChoiceSource:
    """Opens multiple choice, without importing torch; raises DataError."""
    named = parse_annotations(spec, CHOICE_KINDS)
    if named is not None:
        return Aokvqa(named.path, named.options.get("images"), split)
    if spec.partition("?")[0] == "scenes":
        return SceneChoices(open_dataset(spec, split, image_size=image_size), _scene_questions)
    raise DataError(f"data source {spec!r} has no choices; give scenes or aokvqa:FILE?images=FOLDER")


def open_pairs(spec: str, split: str, *, image_size: int) -> ChoiceSource:
    """Opens captions with hard negatives, without importing torch; raises DataError."""
    named = parse_annotations(spec, PAIR_KINDS)
    if named is not None:
        return SugarCrepe(named.path, named.options.get("images"), split)
    if spec.partition("?")[0] == "scenes":
        return SceneChoices(open_dataset(spec, split, image_size=image_size), _scene_pairs)
    raise DataError(f"data source {spec!r} has no hard negatives; give scenes or sugarcrepe:FILE?images=FOLDER")
