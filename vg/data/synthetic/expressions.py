"""Phrases and referring expressions for drawn scenes; an expression refers to exactly one shape.

Every expression type is generated the same way: try candidates in random order and take the first unambiguous one.
Margins ensure that an expression stays unambiguous under strict and loose readings of its words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Literal, NamedTuple

import numpy as np

from vg.data.synthetic.scenes import COLORS, FORMS, STYLES, Scene, Shape, Style, pick, random_scene, some

ExpressionType = Literal["attribute", "superlative", "relation", "ordinal", "chain"]

GENERIC_NOUNS = ("thing", "object")  # in phrases without a form
SIZES = {"small": ("small", "little"), "big": ("big", "large")}
SUPERLATIVES = {  # {} is the phrase of the compared shapes
    "left": ("leftmost {}", "{} on the far left"),
    "right": ("rightmost {}", "{} on the far right"),
    "above": ("topmost {}", "highest {}"),
    "below": ("bottommost {}", "lowest {}"),
    "smaller": ("smallest {}",),
    "larger": ("largest {}", "biggest {}"),
}
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis (x, y) and sign
ORDINALS = ("second", "third")
RELATIONS = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above",),
    "below": ("below", "under"),
    "near": ("closest to", "nearest to", "next to"),
}

POSITION_LEAD = 0.10  # "leftmost": minimum distance to the runner-up, as a fraction of the image side
SIZE_LEAD = math.log(1.25)  # "largest": at least 1.25 times the runner-up (per side)
RELATION_LEAD = 0.12  # "left of": minimum distance of the target from the anchor on that side ...
RELATION_REFUSAL = 0.04  # ... and of all other candidates on the opposite side, as fractions of the image side
NEAR_RATIO = 1.75  # "closest to": the runner-up is at least this many times further away


_WORDINGS = [
    *(("the",), COLORS, FORMS, GENERIC_NOUNS, ORDINALS),
    *(*SIZES.values(), *SUPERLATIVES.values(), *RELATIONS.values()),
]
VOCABULARY = tuple(sorted({word for lines in _WORDINGS for line in lines for word in line.replace("{}", "").split()}))


class Phrase(NamedTuple):
    """A noun phrase such as "small red circle"; empty attributes are left out."""

    size: str = ""
    color: str = ""
    form: str = ""

    def matches(self, shapes: tuple[Shape, ...]) -> list[Shape]:
        """Return the shapes that this phrase describes; none if the size of a candidate is ambiguous."""
        matching = [shape for shape in shapes if self.color in ("", shape.color) and self.form in ("", shape.form)]
        if not self.size:
            return matching
        if not all(shape.size for shape in matching):
            return []
        return [shape for shape in matching if shape.size == self.size]

    def text(self, rng: np.random.Generator) -> str:
        """Return the phrase in words, without article."""
        size = pick(rng, SIZES[self.size]) if self.size else ""
        return " ".join(filter(None, (size, self.color, self.form or pick(rng, GENERIC_NOUNS))))


class Expression(NamedTuple):
    """A referring expression and the only shape it fits."""

    text: str
    type: ExpressionType
    target: Shape


def shared_phrases(scene: Scene, at_least: int = 1) -> list[Phrase]:
    """Return all phrases of color and form, each optional, that match at least this many shapes of the scene."""
    phrases = {
        Phrase("", color, form): None  # a dict, because the order of a set differs between runs
        for shape in scene.shapes
        for color, form in product(("", shape.color), ("", shape.form))
    }
    return [phrase for phrase in phrases if len(phrase.matches(scene.shapes)) >= at_least]


def unique_phrases(shape: Shape, scene: Scene) -> list[Phrase]:
    """Return all phrases that match this shape of the scene and no other."""
    phrases = map(Phrase._make, product(*({"": None, word: None} for word in (shape.size, shape.color, shape.form))))
    return [phrase for phrase in phrases if phrase.matches(scene.shapes) == [shape]]


def described_scene(
    rng: np.random.Generator, expression_type: ExpressionType, size: int = 128, style: Style = STYLES["plain"]
) -> tuple[Scene, Expression]:
    """Sample a scene and an expression of this type; scenes without one are rejected, which is rare."""
    while True:
        scene = random_scene(rng, size, style)
        if expression := DESCRIBE[expression_type](rng, scene):
            return scene, expression


def by_attribute(rng: np.random.Generator, scene: Scene) -> Expression | None:
    """Generate an expression such as "the small red circle"."""
    for shape in some(rng, scene.shapes):
        if phrases := unique_phrases(shape, scene):
            return Expression(_article(rng) + pick(rng, phrases).text(rng), "attribute", shape)
    return None


def _by_order(rng: np.random.Generator, scene: Scene, ordinal: bool) -> Expression | None:
    """Generate an expression such as "leftmost star", or "second leftmost star" for a scene with at least three."""
    for order in some(rng, tuple(SUPERLATIVES)):
        rank = 1 + int(rng.integers(len(ORDINALS))) if ordinal else 0
        for phrase in some(rng, shared_phrases(scene, at_least=rank + 2)):
            if ordinal and order not in DIRECTIONS and not phrase.form:
                continue  # comparing sizes of different forms is ambiguous
            shapes = phrase.matches(scene.shapes)
            ordered = sorted(shapes, key=lambda shape: _lead(order, shape, shapes[0], scene), reverse=True)
            target = ordered[rank]
            if all(_before(order, shape, target, scene) for shape in ordered[:rank]) and all(
                _before(order, target, shape, scene) for shape in ordered[rank + 1 :]
            ):
                wordings = [wording for wording in SUPERLATIVES[order] if not ordinal or wording.endswith("{}")]
                text = pick(rng, wordings).format(phrase.text(rng))
                if ordinal:
                    return Expression(f"{_article(rng)}{ORDINALS[rank - 1]} {text}", "ordinal", target)
                return Expression(_article(rng) + text, "superlative", target)
    return None


by_superlative = partial(_by_order, ordinal=False)
by_ordinal = partial(_by_order, ordinal=True)


def by_relation(rng: np.random.Generator, scene: Scene) -> Expression | None:
    """Generate an expression such as "circle above the red star" for a scene with several circles and one red star."""

    def describe(anchor: Shape) -> str | None:
        phrases = unique_phrases(anchor, scene)
        return _article(rng) + pick(rng, phrases).text(rng) if phrases else None

    return _by_relation(rng, scene, "relation", scene.shapes, describe)


def by_chain(rng: np.random.Generator, scene: Scene) -> Expression | None:
    """Generate an expression such as "circle next to the leftmost star", whose anchor has an expression of its own.

    The anchor's expression ends with a noun phrase, because "... on the far left" could also refer to the circle.
    """
    for describe in some(rng, (by_superlative, by_ordinal)):
        anchor = describe(rng, scene)
        if anchor and not anchor.text.endswith(("left", "right")):
            texts = {anchor.target: anchor.text}
            if found := _by_relation(rng, scene, "chain", list(texts), texts.get):
                return found
    return None


def _by_relation(
    rng: np.random.Generator,
    scene: Scene,
    expression_type: ExpressionType,
    anchors: Sequence[Shape],
    describe: Callable[[Shape], str | None],
) -> Expression | None:
    """Refer to a shape by its relation to an anchor for which `describe` returns an expression."""
    for relation in some(rng, tuple(RELATIONS)):
        for phrase in some(rng, shared_phrases(scene, at_least=2)):
            candidates = phrase.matches(scene.shapes)
            for anchor in some(rng, [shape for shape in anchors if shape not in candidates]):
                target = _related(relation, candidates, anchor, scene)
                if target and (anchor_text := describe(anchor)):
                    text = f"{phrase.text(rng)} {pick(rng, RELATIONS[relation])} {anchor_text}"
                    return Expression(_article(rng) + text, expression_type, target)
    return None


DESCRIBE: dict[ExpressionType, Callable[[np.random.Generator, Scene], Expression | None]] = {
    "attribute": by_attribute,
    "superlative": by_superlative,
    "relation": by_relation,
    "ordinal": by_ordinal,
    "chain": by_chain,
}


def _article(rng: np.random.Generator) -> str:
    return pick(rng, ("the ", ""))


def _before(order: str, shape: Shape, other: Shape, scene: Scene) -> bool:
    """Whether a shape precedes another with a sufficient margin, and its outer edge does so too."""
    lead = _lead(order, shape, other, scene)
    if order not in DIRECTIONS:
        return lead >= SIZE_LEAD
    axis, sign = DIRECTIONS[order]
    edge = axis if sign < 0 else axis + 2  # its index in a box
    return lead >= POSITION_LEAD and sign * (shape.box[edge] - other.box[edge]) >= 0


def _lead(order: str, shape: Shape, other: Shape, scene: Scene) -> float:
    """Return how far a shape precedes another: a fraction of the image side, or the log ratio of side lengths."""
    if order in DIRECTIONS:
        axis, sign = DIRECTIONS[order]
        return sign * (shape.center[axis] - other.center[axis]) / scene.size
    larger = math.log(shape.area / other.area) / 2
    return larger if order == "larger" else -larger


def _related(relation: str, candidates: list[Shape], anchor: Shape, scene: Scene) -> Shape | None:
    """Return the only candidate in the relation to the anchor; None if that is ambiguous for any candidate."""
    if relation == "near":
        first, second = sorted(candidates, key=lambda shape: math.dist(shape.center, anchor.center))[:2]
        ratio = math.dist(second.center, anchor.center) / math.dist(first.center, anchor.center)
        return first if ratio >= NEAR_RATIO else None
    leads = {shape: _lead(relation, shape, anchor, scene) for shape in candidates}
    first = max(candidates, key=leads.__getitem__)
    clear = all(lead <= -RELATION_REFUSAL for shape, lead in leads.items() if shape is not first)
    return first if clear and leads[first] >= RELATION_LEAD else None
