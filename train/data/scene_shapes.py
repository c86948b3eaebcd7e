"""Pictures of scenes: shapes as signed distances, backgrounds as plane patterns.

    alpha = clip(1/2 - d, 0, 1), d the signed distance to the outline in pixels     coverage of a pixel, anti-aliased
    image = image + alpha (colour - image)

A shape lives in the unit circle, y downwards; its distances are exact but for corners, where coverage does not show it.
"""

from functools import lru_cache
from math import cos, pi, sin, sqrt
from typing import NamedTuple

import numpy as np

RIM_PX = 1.0
RIM_SHADE = 0.55


def _circle(x, y):
    return np.sqrt(x * x + y * y) - 0.95


def _square(x, y):
    return np.maximum(np.abs(x), np.abs(y)) - 0.87


def _triangle(x, y):
    y = y - 0.22
    # Edges at distance 0.56 from the centroid, the corners at 1.12.
    return np.maximum(y, (sqrt(3) / 2) * np.abs(x) - 0.5 * y) - 0.56


def _star(x, y):
    sector = 2 * pi / 5
    radius = np.sqrt(x * x + y * y)
    angle = np.abs(np.mod(np.arctan2(x, -y) + sector / 2, sector) - sector / 2)
    # The edge from the outer corner (1.05, 0) to the inner one, at radius 0.47 half a sector on.
    ax, bx, by = 1.05, 0.47 * cos(sector / 2), 0.47 * sin(sector / 2)
    length = sqrt((bx - ax) ** 2 + by * by)
    return (by * (radius * np.cos(angle) - ax) - (bx - ax) * radius * np.sin(angle)) / length


def _ring(x, y):
    return np.abs(np.sqrt(x * x + y * y) - 0.7) - 0.26


def _cross(x, y):
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 0.95, y - 0.32), np.maximum(x - 0.32, y - 0.95))


SHAPES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
COLOURS = {
    "red": (214, 38, 40),
    "orange": (245, 138, 20),
    "yellow": (250, 225, 40),
    "green": (40, 158, 62),
    "blue": (40, 84, 214),
    "purple": (146, 52, 186),
    "white": (246, 246, 246),
    "black": (22, 22, 24),
}
BACKGROUNDS = ("gradient", "stripes", "checks", "dots", "waves", "clouds")
_FUNCTIONS = tuple(SHAPES.values())


class Figure(NamedTuple):
    """A shape to draw: centre and diameter as shares of the image's side, angle in radians, RGB in 0..255."""

    shape: int
    x: float
    y: float
    diameter: float
    angle: float
    rgb: tuple[float, float, float]


def _window(figure: Figure, size: int) -> tuple[int, int, int, int]:
    reach = 0.56 * figure.diameter * size + 1
    x, y = figure.x * size, figure.y * size
    return max(0, int(x - reach)), max(0, int(y - reach)), min(size, int(x + reach) + 1), min(size, int(y + reach) + 1)


def _distance(figure: Figure, size: int, window: tuple[int, int, int, int]) -> np.ndarray:
    """Signed distance in pixels over the window, at pixel centres."""
    x0, y0, x1, y1 = window
    radius = np.float32(figure.diameter * size / 2)
    dx = (np.arange(x0, x1, dtype=np.float32) + np.float32(0.5 - figure.x * size)) / radius
    dy = ((np.arange(y0, y1, dtype=np.float32) + np.float32(0.5 - figure.y * size)) / radius)[:, None]
    c, s = np.float32(cos(figure.angle)), np.float32(sin(figure.angle))
    return _FUNCTIONS[figure.shape](c * dx + s * dy, c * dy - s * dx) * radius


def figure_box(figure: Figure, size: int) -> tuple[float, float, float, float]:
    """The box around a figure's drawn pixels.

    Args:
        figure: the figure.
        size: side of the image in pixels.

    Returns:
        (x0, y0, x1, y1) in 0..1.
    """
    x0, y0, x1, y1 = _window(figure, size)
    inside = _distance(figure, size, (x0, y0, x1, y1)) < 0
    columns, rows = np.flatnonzero(inside.any(axis=0)), np.flatnonzero(inside.any(axis=1))
    if not columns.size:
        return x0 / size, y0 / size, x1 / size, y1 / size
    return (
        (x0 + int(columns[0])) / size,
        (y0 + int(rows[0])) / size,
        (x0 + int(columns[-1]) + 1) / size,
        (y0 + int(rows[-1]) + 1) / size,
    )


def _draw(planes: np.ndarray, figure: Figure) -> None:
    """Paints a figure, its rim darker, over planes (3, size, size)."""
    size = planes.shape[-1]
    x0, y0, x1, y1 = window = _window(figure, size)
    distance = _distance(figure, size, window)
    np.subtract(np.float32(0.5), distance, out=distance)
    cover = np.minimum(np.maximum(distance, 0), 1)
    distance -= np.float32(RIM_PX * size / 64)
    inner = np.minimum(np.maximum(distance, 0, out=distance), 1, out=distance)
    inner *= np.float32(1 - RIM_SHADE)
    inner += np.float32(RIM_SHADE)
    inner *= cover
    view = planes[:, y0:y1, x0:x1]
    view *= np.float32(1) - cover
    view += inner * np.array(figure.rgb, dtype=np.float32)[:, None, None]


@lru_cache(maxsize=8)
def _plane(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixel centres in 0..1 along an axis, and the smooth interpolation from 5 nodes to them, (size, 5)."""
    t = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    nearness = np.clip(1 - np.abs(t[:, None] * 4 - np.arange(5, dtype=np.float32)), 0, 1)
    weights = nearness * nearness * (3 - 2 * nearness)
    return t, t[:, None], weights


def _pattern(kind: str, draws: list[float], size: int) -> np.ndarray:
    """A pattern in -1..1 over the image, (size, size)."""
    x, y, weights = _plane(size)
    turn, phase_x, phase_y, period = draws[0] * pi, draws[1] * 2 * pi, draws[2] * 2 * pi, draws[3]
    c, s = np.float32(cos(turn)), np.float32(sin(turn))
    if kind == "gradient":
        sign = 1 if draws[4] < 0.5 else -1
        return sign * (c * (2 * x - 1) + s * (2 * y - 1)) * np.float32(0.8)
    frequency = np.float32(2 * pi * (4 + 4 * period))
    if kind == "stripes":
        return np.clip(3 * np.sin(frequency * (c * x + s * y) + np.float32(phase_x)), -1, 1)
    if kind == "checks":
        waves = np.sin(frequency * x / 2 + np.float32(phase_x)) * np.sin(frequency * y / 2 + np.float32(phase_y))
        return np.clip(5 * waves, -1, 1)
    if kind == "dots":
        waves = np.sin(frequency * x + np.float32(phase_x)) + np.sin(frequency * y + np.float32(phase_y))
        return np.clip(4 * waves - 4, -1, 1) * np.float32(0.9)
    if kind == "waves":
        bend = np.float32(0.7 + draws[4]) * np.sin(np.float32(4 * pi) * y + np.float32(phase_y))
        return np.sin(frequency * x + bend + np.float32(phase_x))
    nodes = np.asarray(draws[5:30], dtype=np.float32).reshape(5, 5) * 2 - 1
    return weights @ nodes @ weights.T


def render(background: str, base, tint, draws: list[float], figures, size: int) -> np.ndarray:
    """A picture of figures, the first at the back.

    Args:
        background: one of `BACKGROUNDS`.
        base: RGB of the background.
        tint: RGB by which the pattern moves it at full strength; base + tint and base - tint lie in 0..255.
        draws: 30 numbers in 0..1 that shape the pattern.
        figures: iterable of Figure.
        size: side of the image in pixels.

    Returns:
        (size, size, 3) uint8.
    """
    pattern = _pattern(background, draws, size)
    planes = pattern * np.array(tint, dtype=np.float32)[:, None, None]
    planes += np.array(base, dtype=np.float32)[:, None, None] + np.float32(0.5)
    for figure in figures:
        _draw(planes, figure)
    return np.ascontiguousarray(planes.astype(np.uint8).transpose(1, 2, 0))
