"""What can be said about a drawn scene: phrases and referring expressions that name exactly one shape beyond doubt.

Each kind of expression is found the same way: go through what could be said in random order and take the first that
is clear. "Clear" leaves margins, so that strict readers and generous ones agree on the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Literal, NamedTuple

import numpy as np

from vg.data.synthetic.scenes import COLORS, FORMS, STYLES, Scene, Shape, Style, pick, random_scene, some

Kind = Literal["attribute", "superlative", "relation", "ordinal", "chain"]

THINGS = ("thing", "object")  # for a phrase that leaves the form open
SIZES = {"small": ("small", "little"), "big": ("big", "large")}
SUPERLATIVES = {  # {} is the class of which one shape stands out
    "left": ("leftmost {}", "{} on the far left"),
    "right": ("rightmost {}", "{} on the far right"),
    "above": ("topmost {}", "highest {}"),
    "below": ("bottommost {}", "lowest {}"),
    "smaller": ("smallest {}",),
    "larger": ("largest {}", "biggest {}"),
}
ORDINALS = ("second", "third")
RELATIONS = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above",),
    "below": ("below", "under"),
    "near": ("closest to", "nearest to", "next to"),
}

POSITION_LEAD = 0.10  # "leftmost": so much of the image side before the runner-up
SIZE_LEAD = math.log(1.25)  # "largest": 1.25 times the runner-up (per side)
RELATION_LEAD = 0.12  # "left of": the answer is so far on that side of the anchor ...
RELATION_REFUSAL = 0.04  # ... and every other candidate so far on the opposite side
NEAR_RATIO = 1.75  # "closest to": the runner-up is so many times further away


def _words() -> tuple[str, ...]:
    wordings = [*SIZES.values(), *SUPERLATIVES.values(), *RELATIONS.values()]
    lines = ["the", *COLORS, *FORMS, *THINGS, *ORDINALS, *(line for lines in wordings for line in lines)]
    return tuple(sorted({word for line in lines for word in line.replace("{}", "").split()}))


VOCABULARY = _words()


class Phrase(NamedTuple):
    """A noun phrase such as "small red circle"; empty means not said."""

    size: str = ""
    color: str = ""
    form: str = ""

    def named(self, shapes: tuple[Shape, ...]) -> list[Shape]:
        """The shapes this phrase names; none where one of them is neither clearly small nor clearly big."""
        alike = [shape for shape in shapes if self.color in ("", shape.color) and self.form in ("", shape.form)]
        if not self.size:
            return alike
        if not all(shape.size for shape in alike):
            return []
        return [shape for shape in alike if shape.size == self.size]

    def text(self, rng: np.random.Generator) -> str:
        """The phrase in words, without article."""
        size = pick(rng, SIZES[self.size]) if self.size else ""
        return " ".join(filter(None, (size, self.color, self.form or pick(rng, THINGS))))


class Expression(NamedTuple):
    """A referring expression and the only shape it fits."""

    text: str
    kind: Kind
    target: Shape


def classes(scene: Scene, at_least: int = 1) -> list[Phrase]:
    """All phrases of color and form that name at least so many shapes of the scene, "thing" among them."""
    phrases = {
        Phrase("", color, form): None  # a dict and not a set: its order is the same in every run
        for shape in scene.shapes
        for color, form in product(("", shape.color), ("", shape.form))
    }
    return [phrase for phrase in phrases if len(phrase.named(scene.shapes)) >= at_least]


def names(shape: Shape, scene: Scene) -> list[Phrase]:
    """All phrases that name this shape of the scene and no other."""
    phrases = map(Phrase._make, product(*({"": None, word: None} for word in (shape.size, shape.color, shape.form))))
    return [phrase for phrase in phrases if phrase.named(scene.shapes) == [shape]]


def described_scene(
    rng: np.random.Generator, kind: Kind, size: int = 128, style: Style = STYLES["plain"]
) -> tuple[Scene, Expression]:
    """A random scene with an expression of this kind; most scenes have some, so this rarely draws many."""
    while True:
        scene = random_scene(rng, size, style)
        if expression := DESCRIBE[kind](rng, scene):
            return scene, expression


def by_attribute(rng: np.random.Generator, scene: Scene) -> Expression | None:
    """For example "the small red circle"."""
    for shape in some(rng, scene.shapes):
        if phrases := names(shape, scene):
            return Expression(_article(rng) + pick(rng, phrases).text(rng), "attribute", shape)
    return None


def by_superlative(rng: np.random.Generator, scene: Scene) -> Expression | None:
    """For example "leftmost star"; there are at least two stars."""
    for order in some(rng, tuple(SUPERLATIVES)):
        for phrase in some(rng, classes(scene, at_least=2)):
            first, *others = _ordered(order, phrase.named(scene.shapes), scene)
            if all(_before(order, first, other, scene) for other in others):
                text = pick(rng, SUPERLATIVES[order]).format(phrase.text(rng))
                return Expression(_article(rng) + text, "superlative", first)
    return None


def by_ordinal(rng: np.random.Generator, scene: Scene) -> Expression | None:
    """For example "second leftmost star"; there are more stars than one has to count."""
    for order in some(rng, tuple(SUPERLATIVES)):
        place = 1 + int(rng.integers(len(ORDINALS)))
        for phrase in some(rng, classes(scene, at_least=place + 2)):
            if order in ("smaller", "larger") and not phrase.form:
                continue  # which of two forms is larger depends on what is meant
            ordered = _ordered(order, phrase.named(scene.shapes), scene)
            target = ordered[place]
            if all(_before(order, shape, target, scene) for shape in ordered[:place]) and all(
                _before(order, target, shape, scene) for shape in ordered[place + 1 :]
            ):
                wordings = [wording for wording in SUPERLATIVES[order] if wording.endswith("{}")]
                text = pick(rng, wordings).format(phrase.text(rng))
                return Expression(f"{_article(rng)}{ORDINALS[place - 1]} {text}", "ordinal", target)
    return None


def by_relation(rng: np.random.Generator, scene: Scene) -> Expression | None:
    """For example "circle above the red star"; there are at least two circles, and one red star."""

    def named(anchor: Shape) -> str | None:
        phrases = names(anchor, scene)
        return _article(rng) + pick(rng, phrases).text(rng) if phrases else None

    return _by_relation(rng, scene, "relation", scene.shapes, named)


def by_chain(rng: np.random.Generator, scene: Scene) -> Expression | None:
    """For example "circle next to the leftmost star": a relation to a shape that has to be found by another.

    Its name ends in a noun phrase, so that nothing can be taken for a part of what is said about the circle.
    """
    for describe in some(rng, (by_superlative, by_ordinal)):
        anchor = describe(rng, scene)
        if anchor and not anchor.text.endswith(("left", "right")):
            words = {anchor.target: anchor.text}
            if found := _by_relation(rng, scene, "chain", list(words), words.get):
                return found
    return None


def _by_relation(
    rng: np.random.Generator, scene: Scene, kind: Kind, anchors: Sequence[Shape], name: Callable[[Shape], str | None]
) -> Expression | None:
    """A shape that stands in a relation to one of the anchors, which `name` names if it can."""
    for relation in some(rng, tuple(RELATIONS)):
        for phrase in some(rng, classes(scene, at_least=2)):
            candidates = phrase.named(scene.shapes)
            for anchor in some(rng, [shape for shape in anchors if shape not in candidates]):
                target = _related(relation, candidates, anchor, scene)
                if target and (anchor_text := name(anchor)):
                    text = f"{phrase.text(rng)} {pick(rng, RELATIONS[relation])} {anchor_text}"
                    return Expression(_article(rng) + text, kind, target)
    return None


DESCRIBE: dict[Kind, Callable[[np.random.Generator, Scene], Expression | None]] = {
    "attribute": by_attribute,
    "superlative": by_superlative,
    "relation": by_relation,
    "ordinal": by_ordinal,
    "chain": by_chain,
}


def _article(rng: np.random.Generator) -> str:
    return pick(rng, ("the ", ""))


def _ordered(order: str, shapes: list[Shape], scene: Scene) -> list[Shape]:
    """The one that is furthest in the order comes first."""
    return sorted(shapes, key=lambda shape: _lead(order, shape, shapes[0], scene), reverse=True)


def _before(order: str, shape: Shape, other: Shape, scene: Scene) -> bool:
    """Whether a shape is before another beyond doubt."""
    margin = SIZE_LEAD if order in ("smaller", "larger") else POSITION_LEAD
    return _lead(order, shape, other, scene) >= margin and not _reaches_further(order, other, shape)


def _lead(order: str, shape: Shape, other: Shape, scene: Scene) -> float:
    """How far a shape is before another in an order: share of the image side, or logarithm of the ratio of sides."""
    if order in ("smaller", "larger"):
        larger = math.log(shape.area / other.area) / 2
        return larger if order == "larger" else -larger
    axis = 0 if order in ("left", "right") else 1
    forward = (shape.center[axis] - other.center[axis]) / scene.size
    return forward if order in ("right", "below") else -forward


def _reaches_further(order: str, shape: Shape, other: Shape) -> bool:
    """Whether the edge of a shape lies further out than that of another, whatever their centers say."""
    match order:
        case "left":
            return shape.box[0] < other.box[0]
        case "above":
            return shape.box[1] < other.box[1]
        case "right":
            return shape.box[2] > other.box[2]
        case "below":
            return shape.box[3] > other.box[3]
    return False  # sizes have no second reading


def _related(relation: str, candidates: list[Shape], anchor: Shape, scene: Scene) -> Shape | None:
    """The one candidate that clearly stands in the relation to the anchor while all others clearly do not."""
    if relation == "near":
        first, second = sorted(candidates, key=lambda shape: math.dist(shape.center, anchor.center))[:2]
        ratio = math.dist(second.center, anchor.center) / math.dist(first.center, anchor.center)
        return first if ratio >= NEAR_RATIO else None
    leads = {shape: _lead(relation, shape, anchor, scene) for shape in candidates}
    first = max(candidates, key=leads.__getitem__)
    clear = all(lead <= -RELATION_REFUSAL for shape, lead in leads.items() if shape is not first)
    return first if clear and leads[first] >= RELATION_LEAD else None
