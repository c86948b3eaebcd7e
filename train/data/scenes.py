"""Rendered scenes with captions, boxes, attributes and questions: a pure function of (seed, index).

A scene holds two or three objects that every caption describes and one or two distractors that none mentions; no two
objects agree in both shape and colour. Each epoch of the training split shows scenes of its own unless `fresh=false`.
Training, validation and test indices start 2^40 apart, which keeps the splits disjoint for any number of epochs.
"""

from __future__ import annotations

from typing import NamedTuple

from train.data.order import mix, uniforms
from train.data.sample import Question, Region, Sample, Skipped, Source
from train.data.scene_shapes import BACKGROUNDS, COLOURS, SHAPES, Figure, figure_box, render
from train.data.scene_words import Thing, caption, questions

CAPTIONS = 5
# Words repeat: more scenes than these would teach a vocabulary nothing.
VOCABULARY_SCENES = 1_000
TRAIN_COUNT = 50_000
HELD_OUT_COUNT = 1_024
SPLIT_START = {"train": 0, "val": 1 << 40, "test": 2 << 40}

_SHAPE_NAMES = tuple(SHAPES)
_COLOUR_NAMES = tuple(COLOURS)
_RGB = tuple(COLOURS.values())
# Diameters as shares of the side.
_SMALL, _LARGE = (0.28, 0.33), (0.40, 0.46)
_LARGE_SHARE, _MOST_LARGE = 0.45, 2
_MARGIN, _GAP = 0.01, 0.012
_TRIES = 24
# Crowded scenes are laid out again, each time with smaller objects.
_LAYOUTS, _SHRINK = 6, 0.94
# Slow changes of the ground may be strong and leave the objects as clear as before.
_CONTRAST = {"gradient": 3.5, "clouds": 2.5}
_LAYOUT, _PLACES, _CAPTION, _QUESTION, _GROUND = range(1, 6)


class Scene(NamedTuple):
    """Things and their figures, the described ones first; the background's kind, colours and pattern draws."""

    things: tuple[Thing, ...]
    figures: tuple[Figure, ...]
    described: int
    background: str
    base: tuple[float, float, float]
    tint: tuple[float, float, float]
    pattern: list[float]


def _kinds(count: int, draws) -> list[tuple[int, int]]:
    """Pairs of shape and colour, no two alike."""
    pairs: list[int] = []
    total = len(_SHAPE_NAMES) * len(_COLOUR_NAMES)
    while len(pairs) < count:
        # A draw from what is left, without rejection.
        pair = int(next(draws) * (total - len(pairs)))
        for taken in sorted(pairs):
            pair += pair >= taken
        pairs.append(pair)
    return [divmod(pair, len(_COLOUR_NAMES)) for pair in pairs]


def _clearance(x: float, y: float, diameter: float, placed) -> float:
    """The smallest gap, along the better axis, between a circle's box and those placed."""
    return min(
        (max(abs(x - px), abs(y - py)) - (diameter + pd) / 2 for px, py, pd in placed),
        default=1.0,
    )


def _places(diameters: list[float], key: int) -> tuple[list[tuple[float, float]], float]:
    """Centres that keep the boxes apart, the largest placed first, and the smallest gap between two boxes."""
    places: list[tuple[float, float]] = [(0.0, 0.0)] * len(diameters)
    placed: list[tuple[float, float, float]] = []
    draws = uniforms(key, 2 * _TRIES * len(diameters)).tolist()
    worst = 1.0
    for rank, index in enumerate(sorted(range(len(diameters)), key=lambda i: -diameters[i])):
        diameter = diameters[index]
        low = diameter / 2 + _MARGIN
        spread = 1 - 2 * low
        best, best_gap = (0.5, 0.5), -1.0
        for i in range(2 * _TRIES * rank, 2 * _TRIES * (rank + 1), 2):
            x, y = low + draws[i] * spread, low + draws[i + 1] * spread
            gap = _clearance(x, y, diameter, placed)
            if gap > best_gap:
                best, best_gap = (x, y), gap
            if gap >= _GAP:
                break
        places[index] = best
        placed.append((*best, diameter))
        worst = min(worst, best_gap)
    return places, worst


def make_scene(seed: int, index: int) -> Scene:
    """The scene of an index.

    Args:
        seed: of the collection.
        index: of the scene.

    Returns:
        The scene, nothing drawn and nothing worded yet.
    """
    key = mix(seed, index)
    draws = iter(uniforms(mix(key, _LAYOUT), 64).tolist())
    described = 2 if next(draws) < 0.3 else 3
    count = described + (1 if next(draws) < 0.85 else 2)
    kinds = _kinds(count, draws)
    large = []
    for _ in range(count):
        large.append(next(draws) < _LARGE_SHARE and sum(large) < _MOST_LARGE)
    diameters = []
    for is_large in large:
        low, high = _LARGE if is_large else _SMALL
        diameters.append(low + (high - low) * next(draws))
    things, figures = [], []
    for layout in range(_LAYOUTS):
        places, gap = _places(diameters, mix(key, _PLACES, layout))
        if gap >= 0:
            break
        diameters = [diameter * _SHRINK for diameter in diameters]
    for (shape, colour), is_large, diameter, (x, y) in zip(kinds, large, diameters, places):
        angle = (next(draws) - 0.5) * 0.35
        rgb = tuple(min(255.0, max(0.0, value + (next(draws) - 0.5) * 24)) for value in _RGB[colour])
        things.append(Thing(_SHAPE_NAMES[shape], _COLOUR_NAMES[colour], "large" if is_large else "small", x, y))
        figures.append(Figure(shape, x, y, diameter, angle, rgb))
    ground = uniforms(mix(key, _GROUND), 40).tolist()
    background = BACKGROUNDS[int(ground[0] * len(BACKGROUNDS))]
    level = 105 + 60 * ground[1]
    base = tuple(level + (value - 0.5) * 44 for value in ground[2:5])
    strength = (7 + 7 * ground[5]) * (1 if ground[6] < 0.5 else -1) * _CONTRAST.get(background, 1.0)
    tint = tuple(strength * (0.6 + 0.8 * value) for value in ground[7:10])
    return Scene(tuple(things), tuple(figures), described, background, base, tint, ground[10:])


def draw_scene(scene: Scene, size: int):
    """The picture of a scene, (size, size, 3) uint8; a distractor never hides a described object."""
    return render(scene.background, scene.base, scene.tint, scene.pattern, reversed(scene.figures), size)


class Scenes(Source):
    """The built-in data set.

    Args:
        split: train, val or test.
        seed: of the collection.
        image_size: side of the pictures in pixels.
        count: scenes in an epoch; None for the split's own number.
        fresh: whether each epoch of the training split has scenes of its own.
    """

    exact = True

    def __init__(
        self, split: str, *, seed: int = 0, image_size: int = 64, count: int | None = None, fresh: bool = True
    ) -> None:
        self.name = "scenes"
        self.split = split
        self.seed = seed
        self.image_size = image_size
        self.fresh = fresh and split == "train"
        self.skipped = Skipped()
        self._count = count or (TRAIN_COUNT if split == "train" else HELD_OUT_COUNT)
        self._start = SPLIT_START[split]

    def __len__(self) -> int:
        return self._count

    def _caption(self, scene: Scene, index: int, which: int) -> tuple[str, list[str]]:
        draws = iter(uniforms(mix(self.seed, index, _CAPTION, which), 32).tolist())
        return caption(list(scene.things[: scene.described]), draws)

    def _global_index(self, index: int) -> int:
        if index < 0 or (index >= self._count and not self.fresh) or index >= SPLIT_START["val"]:
            raise IndexError(f"scene {index} of {self._count}")
        return self._start + index

    def scene(self, index: int) -> Scene:
        """What the sample of this index shows."""
        return make_scene(self.seed, self._global_index(index))

    def questions(self, index: int) -> tuple[Question, ...]:
        """The questions about the scene of this index, with their answers."""
        number = self._global_index(index)
        scene = make_scene(self.seed, number)
        return self._questions(scene, number)

    def _questions(self, scene: Scene, number: int) -> tuple[Question, ...]:
        draws = iter(uniforms(mix(self.seed, number, _QUESTION), 64).tolist())
        return questions(list(scene.things), _SHAPE_NAMES, _COLOUR_NAMES, draws)

    def __getitem__(self, index: int) -> Sample:
        number = self._global_index(index)
        scene = make_scene(self.seed, number)
        said = [self._caption(scene, number, which) for which in range(CAPTIONS)]
        regions = []
        for i, (thing, figure) in enumerate(zip(scene.things, scene.figures)):
            described = i < scene.described
            phrase = said[0][1][i] if described else f"a {thing.size} {thing.color} {thing.shape}"
            kind = f"{thing.color} {thing.shape}"
            attributes = {**thing._asdict(), "described": described, "kind": kind}
            box = figure_box(figure, self.image_size)
            regions.append(Region(phrase, box, 0 if described else -1, attributes))
        return Sample(
            draw_scene(scene, self.image_size),
            tuple(text for text, _ in said),
            self._key(index),
            tuple(regions),
            self._questions(scene, number),
            # What a detector would find that misses nothing.
            detections=tuple(region.box for region in regions),
        )

    def _key(self, index: int) -> str:
        return f"scenes/{self.split}/{self.seed}/{index}"

    def pair(self, index: int, pick: int):
        number = self._global_index(index)
        scene = make_scene(self.seed, number)
        text, _ = self._caption(scene, number, pick % CAPTIONS)
        return draw_scene(scene, self.image_size), text, self._key(index)

    def _captions(self, scene: Scene, number: int) -> tuple[str, ...]:
        return tuple(self._caption(scene, number, which)[0] for which in range(CAPTIONS))

    def captions(self, index: int) -> tuple[str, ...]:
        number = self._global_index(index)
        return self._captions(make_scene(self.seed, number), number)

    def captioned(self, index: int):
        number = self._global_index(index)
        scene = make_scene(self.seed, number)
        return draw_scene(scene, self.image_size), self._captions(scene, number), self._key(index)

    def region_count(self, index: int) -> int:
        return len(self.scene(index).things)

    def texts(self, limit: int | None = None):
        for index in range(min(len(self), VOCABULARY_SCENES, len(self) if limit is None else limit)):
            yield from self.captions(index)
