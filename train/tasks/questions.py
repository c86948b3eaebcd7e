"""Questions about images, with human answers: VQAv2's files, and the questions of the built-in scenes.

scenes | vqav2:QUESTIONS.json?annotations=ANNOTATIONS.json&images=FOLDER

A sample is an image with all its questions, so that it is encoded once; an epoch of training asks one question of
every image.
"""

import json
from typing import Any, NamedTuple

from train.data import DataError, Source, open_dataset
from train.data.sample import BadSample, Skipped
from train.tasks.annotations import Pictures, complete, listed, parse_annotations, read_json, require_some

KINDS = {"vqav2": ("annotations", "images")}


class Asked(NamedTuple):
    """A question; `answers` are those of the people asked, those that agree repeated, and none where unknown."""

    question: str
    answers: tuple[str, ...]
    kind: str
    key: str


class QuestionSource(Source):
    """A map-style data set of images with questions."""

    def asked(self, index: int) -> tuple[Asked, ...]:
        """The questions about an image, without touching it."""
        raise NotImplementedError

    def image(self, index: int) -> tuple[Any, str]:
        """An image and its key; raises BadSample where it cannot be used."""
        raise NotImplementedError

    def pair(self, index: int, pick: int) -> tuple[Any, str, str]:
        """Image, one question with its answers as JSON, and key."""
        image, key = self.image(index)
        asked = [a for a in self.asked(index) if a.answers]
        if not asked:
            raise BadSample("image without an answered question", key)
        chosen = asked[pick % len(asked)]
        return image, json.dumps([chosen.question, chosen.answers, pick // len(asked)]), key


class SceneQuestions(QuestionSource):
    """The questions of the built-in scenes."""

    def __init__(self, scenes: Source) -> None:
        self.name, self.split, self.fresh, self.skipped = scenes.name, scenes.split, scenes.fresh, scenes.skipped
        self._scenes = scenes

    def __len__(self) -> int:
        return len(self._scenes)

    def asked(self, index: int) -> tuple[Asked, ...]:
        made = self._scenes.questions(index)
        return tuple(Asked(q.question, (q.answer,), q.kind, f"{index}/{i}") for i, q in enumerate(made))

    def image(self, index: int) -> tuple[Any, str]:
        image, _, key = self._scenes.pair(index, 0)
        return image, key


class Vqav2(QuestionSource):
    """Questions and annotations of the VQA challenge.

    Args:
        questions: path of the file of questions.
        annotations: path of the file of answers; without it the questions have none.
        images: folder of COCO's images; None for that of the questions.

    Raises:
        DataError: not such files, or nothing usable in them.
    """

    def __init__(self, questions, annotations: str | None, images: str | None, split: str) -> None:
        self.name, self.split, self.skipped = str(questions), split, Skipped()
        content = read_json(questions)
        subtype = str(content.get("data_subtype", "")) if isinstance(content, dict) else ""
        entries = listed(content, "questions", questions)
        answers = self._answers(annotations)
        self._pictures = Pictures(images, questions)
        asked: dict[str, list[Asked]] = {}
        fields = {"question_id": int, "image_id": int, "question": str}
        for entry in complete(entries, fields, "question_id", questions, self.skipped):
            number = entry["question_id"]
            name = self._pictures.find_coco(entry["image_id"], subtype)
            if name is None:
                self.skipped.sample(str(entry["image_id"]), "image of a question is absent")
            elif not entry["question"].strip():
                self.skipped.row("empty question", f"question {number}")
            elif annotations is not None and number not in answers:
                self.skipped.row("question without an annotation", f"question {number}")
            else:
                given, kind = answers.get(number, ((), "unknown"))
                asked.setdefault(name, []).append(Asked(entry["question"], given, kind, str(number)))
        require_some(len(asked), "question", questions, self.skipped)
        self._names = list(asked)
        self._asked = [tuple(asked[name]) for name in self._names]

    def _answers(self, annotations: str | None) -> dict[int, tuple[tuple[str, ...], str]]:
        if annotations is None:
            return {}
        from pathlib import Path

        path, found = Path(annotations).expanduser(), {}
        entries = listed(read_json(path), "annotations", path)
        for entry in complete(entries, {"question_id": int, "answers": list}, "question_id", path, self.skipped):
            given = tuple(
                a["answer"] for a in entry["answers"] if isinstance(a, dict) and isinstance(a.get("answer"), str)
            )
            if len(given) < len(entry["answers"]) or not given:
                self.skipped.row("answers without text", f"question {entry['question_id']}")
            if given:
                found[entry["question_id"]] = given, str(entry.get("answer_type", "unknown"))
        require_some(len(found), "annotation", path, self.skipped)
        return found

    def __len__(self) -> int:
        return len(self._names)

    def asked(self, index: int) -> tuple[Asked, ...]:
        return self._asked[index]

    def image(self, index: int) -> tuple[Any, str]:
        return self._pictures.read(self._names[index]), self._names[index]


def open_questions(spec: str, split: str, *, image_size: int, seed: int = 0) -> QuestionSource:
    """Opens questions, without importing torch.

    Raises:
        DataError: one line that names what is wrong.
    """
    named = parse_annotations(spec, KINDS)
    if named is not None:
        if "annotations" not in named.options and split == "train":
            raise DataError(f"data source {spec!r}: training needs ?annotations=FILE")
        return Vqav2(named.path, named.options.get("annotations"), named.options.get("images"), split)
    if spec.partition("?")[0] == "scenes":
        return SceneQuestions(open_dataset(spec, split, seed=seed, image_size=image_size))
    raise DataError(f"data source {spec!r} has no questions; give scenes or vqav2:FILE?annotations=FILE&images=FOLDER")
