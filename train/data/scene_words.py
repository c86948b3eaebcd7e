"""Words for scenes: captions of the described objects, questions about all objects.

A phrase says nothing that the picture does not show, and every caption mentions every described object.
"""

from __future__ import annotations

from typing import NamedTuple

from train.data.sample import Question

SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
RELATION_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
# Where B is seen from A, as in "A with B on its left".
BESIDE_WORDS = {
    "left": ("on its left",),
    "right": ("on its right",),
    "above": ("above it", "over it"),
    "below": ("below it", "under it"),
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
# Keyed by (column, row), each -1, 0 or 1 from the left and from the top.
PLACE_WORDS = {
    (-1, -1): ("at the top left", "in the upper left"),
    (0, -1): ("at the top",),
    (1, -1): ("at the top right", "in the upper right"),
    (-1, 0): ("on the left",),
    (0, 0): ("in the middle", "in the center"),
    (1, 0): ("on the right",),
    (-1, 1): ("at the bottom left", "in the lower left"),
    (0, 1): ("at the bottom",),
    (1, 1): ("at the bottom right", "in the lower right"),
}
# ab: the relation of A to B; ba: of B to A; its: where B is, seen from A; pa, pb, pc: places.
PAIRS = (
    "{a} {pa} and {b} {pb}",
    "{a} {pa}, {ab} {b}",
    "{pa} there is {a}, {pb} {b}",
    "{a} {pa} with {b} {its}",
    "{b} {pb} is {ba} {a}",
    "there is {a} {pa}, {ab} {b}",
    "{b}, {ba} {a} {pa}",
    "{a} and {b}, {pa} and {pb}",
)
TRIPLES = (
    "{a} {ab} {b}, and {c} {pc}",
    "{a} {pa}, {b} and {c} {pc}",
    "{c} {pc}, and {a} {ab} {b}",
    "{a} {pa}, {b} {pb} and {c}",
    "{pa} there is {a}, {pb} {b} and {c}",
    "there is {a} {pa}, {b} {pb} and {c}",
    "{a} with {b} {its} and {c} {pc}",
    "{a} {ab} {b} {bc} {c}",
)
# A place counts as left, right, top or bottom outside this band around the middle.
_BAND = (0.42, 0.58)
# Centres must lie this far apart along an axis for a relation to be said.
_APART = 0.15
# The axis of a relation must hold at least this share of the larger displacement.
_DOMINANCE = 0.6


class Thing(NamedTuple):
    """An object as words see it; x and y its centre in 0..1, `size` one of small, large."""

    shape: str
    color: str
    size: str
    x: float
    y: float


def place(thing: Thing) -> tuple[int, int]:
    """Column and row of a thing, each -1, 0 or 1."""
    low, high = _BAND
    return (thing.x > high) - (thing.x < low), (thing.y > high) - (thing.y < low)


def relations(a: Thing, b: Thing) -> list[str]:
    """What A is to B: left, right, above, below, those that are plain to see."""
    dx, dy = a.x - b.x, a.y - b.y
    least = max(_APART, _DOMINANCE * max(abs(dx), abs(dy)))
    found = []
    if abs(dx) >= least:
        found.append("left" if dx < 0 else "right")
    if abs(dy) >= least:
        found.append("above" if dy < 0 else "below")
    return found


def _one(words, draw: float):
    return words[int(draw * len(words))]


def _with_article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _phrase(thing: Thing, sized: bool, draws) -> str:
    words = f"{thing.color} {thing.shape}"
    if sized:
        words = f"{_one(SIZE_WORDS[thing.size], next(draws))} {words}"
    return _with_article(words)


def caption(things: list[Thing], draws) -> tuple[str, list[str]]:
    """A caption of two or three objects.

    Args:
        things: the described objects.
        draws: iterator of numbers in 0..1, at least 24 of them.

    Returns:
        The caption, and the phrase of each thing in the order given.
    """
    order = list(range(len(things)))
    for i in range(len(order) - 1, 0, -1):
        j = int(next(draws) * (i + 1))
        order[i], order[j] = order[j], order[i]
    template = _one(PAIRS if len(things) == 2 else TRIPLES, next(draws))
    # Long templates leave the sizes out.
    sized_share = 0.6 if len(things) == 2 else 0.25
    words: dict[str, str] = {}
    phrases = [""] * len(things)
    for name, index in zip("abc", order):
        phrases[index] = words[name] = _phrase(things[index], next(draws) < sized_share, draws)
        words[f"p{name}"] = _one(PLACE_WORDS[place(things[index])], next(draws))
    a, b = things[order[0]], things[order[1]]
    relation = _one(relations(a, b), next(draws))
    words["ab"] = _one(RELATION_WORDS[relation], next(draws))
    words["ba"] = _one(RELATION_WORDS[OPPOSITE[relation]], next(draws))
    words["its"] = _one(BESIDE_WORDS[OPPOSITE[relation]], next(draws))
    if len(things) == 3:
        words["bc"] = _one(RELATION_WORDS[_one(relations(b, things[order[2]]), next(draws))], next(draws))
    return template.format(**words), phrases


def _name(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def questions(things: list[Thing], shapes, colors, draws) -> tuple[Question, ...]:
    """Questions with their answers, about everything in the picture.

    Args:
        things: all objects, no two of them alike in shape and colour.
        shapes: the names of all shapes.
        colors: the names of all colours.
        draws: iterator of numbers in 0..1, at least 40 of them.

    Returns:
        At least one of each of the kinds exists, count and relation; color and shape where one object alone answers.
    """
    made = []
    there = {(t.color, t.shape) for t in things}
    made.append(Question(f"is there {_with_article(_name(_one(things, next(draws))))}?", "yes", "exists"))
    absent = [(c, s) for c in colors for s in shapes if (c, s) not in there]
    color, shape = _one(absent, next(draws))
    made.append(Question(f"is there {_with_article(f'{color} {shape}')}?", "no", "exists"))

    made.append(Question("how many objects are there?", str(len(things)), "count"))
    color = _one(things, next(draws)).color
    made.append(Question(f"how many {color} objects are there?", str(sum(t.color == color for t in things)), "count"))

    by_shape = [t for t in things if sum(o.shape == t.shape for o in things) == 1]
    if by_shape:
        thing = _one(by_shape, next(draws))
        made.append(Question(f"what color is the {thing.shape}?", thing.color, "color"))
    by_color = [t for t in things if sum(o.color == t.color for o in things) == 1]
    if by_color:
        thing = _one(by_color, next(draws))
        made.append(Question(f"what shape is the {thing.color} object?", thing.shape, "shape"))

    a = int(next(draws) * len(things))
    b = (a + 1 + int(next(draws) * (len(things) - 1))) % len(things)
    relation = _one(relations(things[a], things[b]), next(draws))
    said, answer = (relation, "yes") if next(draws) < 0.5 else (OPPOSITE[relation], "no")
    names = _name(things[a]), RELATION_WORDS[said][0], _name(things[b])
    made.append(Question(f"is the {names[0]} {names[1]} the {names[2]}?", answer, "relation"))
    axis = "left or right of" if relation in ("left", "right") else "above or below"
    made.append(Question(f"is the {names[0]} {axis} the {names[2]}?", relation, "relation"))
    return tuple(made)
