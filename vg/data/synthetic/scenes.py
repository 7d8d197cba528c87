"""Random scenes of colored shapes on a gray background, drawn in a fraction of a millisecond."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from vg.data.synthetic.layout import (
    GENERIC_NOUN,
    Box,
    Grid,
    Noun,
    Scene,
    SceneObject,
    Style,
    laid_out,
    pick,
    smooth_background,
    some,
)

COLORS = {
    "red": (215, 35, 40),
    "green": (35, 150, 60),
    "blue": (40, 85, 215),
    "yellow": (245, 220, 45),
    "purple": (145, 50, 185),
    "orange": (245, 130, 20),
    "black": (25, 25, 25),
    "white": (250, 250, 250),
}
FORMS = {  # width / height; some are not square, so swapping width and height in code is noticed
    "circle": 1.0,
    "square": 1.0,
    "triangle": 1.15,
    "star": 1.05,
    "cross": 1.0,
    "diamond": 0.75,
}
_OVERSAMPLING = 8

STYLES = {  # the scale of a shape is sqrt(width x height)
    "plain": Style(counts=(3, 6), scales=(0.14, 0.35), small=0.20, big=0.27, gap=0.025, min_side=48),
    "crowded": Style(counts=(8, 14), scales=(0.08, 0.20), small=0.115, big=0.155, gap=0.015, min_side=80),
}


@dataclass(frozen=True)
class Shape(SceneObject):
    """One shape in a scene."""

    form: str  # a key of FORMS
    color: str  # a key of COLORS
    size: str
    box: Box
    paint: tuple[int, int, int]  # RGB, close to COLORS[color]

    @property
    def nouns(self) -> tuple[Noun, ...]:
        return GENERIC_NOUN, (self.form,)


def random_scene(rng: np.random.Generator, size: int = 128, style: Style = STYLES["plain"]) -> Scene[Shape, Grid]:
    """Sample a scene of size x size pixels with few colors and forms: most shapes share an attribute with another."""
    colors = some(rng, tuple(COLORS), int(rng.integers(2, 4)))
    forms = some(rng, tuple(FORMS), int(rng.integers(2, 4)))

    def sides(choice: tuple[str, str], scale: float) -> tuple[float, float]:
        aspect = math.sqrt(FORMS[choice[0]])
        return scale * aspect, scale / aspect

    shapes = []
    for (form, color), word, box in laid_out(rng, size, style, lambda: (pick(rng, forms), pick(rng, colors)), sides):
        paint = np.clip(np.add(COLORS[color], rng.integers(-8, 9, size=3)), 0, 255)
        shapes.append(Shape(form, color, word, box, tuple(paint.tolist())))
    if len(shapes) < style.counts[0]:
        return random_scene(rng, size, style)
    cells = pick(rng, (1, 3, 8))  # plain, soft gradient, light texture
    levels = rng.integers(150, 185) + rng.integers(-9, 10, size=(cells, cells))
    return Scene(tuple(shapes), size, tuple(map(tuple, levels.tolist())))


def draw(scene: Scene[Shape, Grid]) -> np.ndarray:
    """Draw a scene with antialiased edges: [H, W, 3] uint8, RGB."""
    image = smooth_background(scene)
    for shape in scene.objects:
        left, top, right, bottom = shape.box
        image.paste(shape.paint, (left, top), _mask(shape.form, right - left, bottom - top))
    return np.array(image)


@cache  # a few hundred small masks; training draws tens of thousands of shapes per epoch
def _mask(form: str, width: int, height: int) -> Image.Image:
    """Return the coverage (0..255) of each pixel by a shape that touches all four sides of its box."""
    right, bottom = width * _OVERSAMPLING - 1, height * _OVERSAMPLING - 1
    mask = Image.new("L", (right + 1, bottom + 1))
    if form == "circle":
        ImageDraw.Draw(mask).ellipse((0, 0, right, bottom), fill=255)
    else:
        ImageDraw.Draw(mask).polygon([(x * right, y * bottom) for x, y in _outline(form)], fill=255)
    return mask.reduce(_OVERSAMPLING)


def _outline(form: str) -> list[tuple[float, float]]:
    """Return the corners of a form; x and y each range from exactly 0 to exactly 1, y points down."""
    if form == "square":
        return [(0, 0), (1, 0), (1, 1), (0, 1)]
    if form == "triangle":
        return [(0.5, 0), (1, 1), (0, 1)]
    if form == "diamond":
        return [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)]
    if form == "cross":
        a, b = 0.33, 0.67
        return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    radii = (1, 0.45) * 5  # star: tips and notches alternate
    points = [
        (radius * math.sin(turn * math.pi / 5), -radius * math.cos(turn * math.pi / 5))
        for turn, radius in enumerate(radii)
    ]
    (left, right), (top, bottom) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    return [((x - left) / (right - left), (y - top) / (bottom - top)) for x, y in points]
