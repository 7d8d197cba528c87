"""What all synthetic scenes have in common: objects that do not touch, and how they are laid out at random."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from PIL import Image

_NUM_POSITIONS_TRIED = 40

Box = tuple[int, int, int, int]  # xyxy in pixels
Grid = tuple[tuple[int, ...], ...]  # coarse square grid of gray levels, upsampled to the image
Noun = tuple[str, ...]  # wordings of one noun, such as ("digit", "number")
Option = TypeVar("Option")
Object = TypeVar("Object", bound="SceneObject")
Background = TypeVar("Background")

GENERIC_NOUN: Noun = ("thing", "object")  # for phrases that name nothing else


class SceneObject(ABC):
    """Base of the objects in a scene: what expressions say about them."""

    size: str  # "small", "big", or empty if ambiguous
    color: str  # empty if it has no single color
    box: Box  # tight around the drawn pixels

    @property
    @abstractmethod
    def nouns(self) -> tuple[Noun, ...]:
        """Return all nouns for this object, the most general one first."""

    @property
    def center(self) -> tuple[float, float]:
        """Return x and y in pixels."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    def distance(self, other: SceneObject) -> float:
        """Return the distance of the centers in pixels."""
        return math.dist(self.center, other.center)

    @property
    def areas(self) -> tuple[float, ...]:
        """Return the areas in square pixels by which people may compare sizes, by default that of the box."""
        left, top, right, bottom = self.box
        return ((right - left) * (bottom - top),)


@dataclass(frozen=True)
class Scene(Generic[Object, Background]):
    """Objects that do not touch, in a square image."""

    objects: tuple[Object, ...]
    size: int  # image side in pixels
    background: Background
    margin: float = 1.0  # of comparisons in its expressions, see WorldConfig


AnyScene: TypeAlias = Scene[Object, Any]


def smooth_background(scene: Scene[Any, Grid]) -> Image.Image:
    """Return the background of a scene without its objects: RGB, smooth between the gray levels of its grid."""
    grid = Image.fromarray(np.array(scene.background, dtype=np.uint8))
    return grid.resize((scene.size, scene.size), Image.Resampling.BICUBIC).convert("RGB")


@dataclass(frozen=True)
class Style:
    """Parameters of scenes; lengths are fractions of the image side."""

    counts: tuple[int, int]  # of objects
    scales: tuple[float, float]  # of objects, see `laid_out`
    small: float  # objects up to this scale are small ...
    big: float  # ... and from this scale on big; scales in between are ambiguous
    gap: float  # minimum distance of two objects
    min_side: int  # of the image in pixels; in smaller ones objects are indistinguishable


def laid_out(
    rng: np.random.Generator,
    size: int,
    style: Style,
    choose: Callable[[], Option],
    sides: Callable[[Option, float], tuple[float, float]],
) -> Iterator[tuple[Option, str, Box]]:
    """Yield what is where: a choice, "small", "big" or "", and the box of each object for which there is room.

    Args:
        size: image side in pixels.
        choose: draws what the next object is.
        sides: width and height in pixels of a choice at a scale in pixels.
    """
    fewest, most = style.counts
    smallest, largest = style.scales
    scales = np.exp(rng.uniform(math.log(smallest), math.log(largest), size=rng.integers(fewest, most + 1)))
    boxes: list[Box] = []
    for scale in sorted(scales.tolist(), reverse=True):  # large ones first, as they need the most room
        choice = choose()
        width, height = map(round, sides(choice, scale * size))
        if box := _free_position(rng, width, height, size, style.gap * size, boxes):
            boxes.append(box)
            yield choice, "small" if scale <= style.small else "big" if scale >= style.big else "", box


def _free_position(
    rng: np.random.Generator, width: int, height: int, size: int, gap: float, boxes: list[Box]
) -> Box | None:
    """Find a box of this size with a gap to all boxes; None if there is no room."""
    if max(width, height) > size - 2 or min(width, height) < 1:
        return None
    for x, y in rng.random((_NUM_POSITIONS_TRIED, 2)).tolist():
        left, top = 1 + int(x * (size - width - 1)), 1 + int(y * (size - height - 1))
        right, bottom = left + width, top + height
        if all(
            left >= other[2] + gap or top >= other[3] + gap or other[0] >= right + gap or other[1] >= bottom + gap
            for other in boxes
        ):
            return left, top, right, bottom
    return None


def some(rng: np.random.Generator, options: Sequence[Option], count: int | None = None) -> list[Option]:
    """Return `count` distinct options (by default all) in random order."""
    return [options[index] for index in rng.permutation(len(options))[:count].tolist()]


def pick(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    """Return one of the options at random."""
    return options[int(rng.random() * len(options))]
