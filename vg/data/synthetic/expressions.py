"""Phrases and referring expressions for scenes; an expression refers to one object, or by its type to none or several.

Every expression type is generated the same way: try candidates in random order and take the first unambiguous one.
The margins of comparisons ensure that an expression stays unambiguous under strict and loose readings of its words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product, starmap
from typing import Any, Generic, Literal, NamedTuple

import numpy as np

from vg.data.synthetic.comparisons import DIRECTIONS, all_opposite, lead_of, precedes, related
from vg.data.synthetic.layout import GENERIC_NOUN, AnyScene, Noun, Object, SceneObject, pick, some
from vg.errors import DataError

ExpressionType = Literal["attribute", "superlative", "relation", "closest", "ordinal", "chain", "absent", "several"]
GENERALIZED: frozenset[ExpressionType] = frozenset(("absent", "several"))  # the others refer to exactly one object

SIZES = {"small": ("small", "little"), "big": ("big", "large")}
SUPERLATIVES = {  # {} is the phrase of the compared objects
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
MAX_SCENES = 1000  # that are sampled for one expression
QUANTIFIERS = {2: ("both", "the two"), 3: ("the three",)}  # by number of objects, besides those for any number:
ANY_NUMBER = ("all", "all the", "the")
PLURALS = {"knife": "knives", "mouse": "mice", "person": "people"} | {x: x for x in ("scissors", "sheep", "skis")}


class Phrase(NamedTuple):
    """A noun phrase such as "small red circle"; empty attributes are left out."""

    size: str = ""
    color: str = ""
    noun: Noun = GENERIC_NOUN

    def matches(self, objects: Sequence[Object]) -> list[Object]:
        """Return the objects that this phrase describes; none if the size of a candidate is ambiguous."""
        matching = [item for item in objects if self.color in ("", item.color) and self.noun in item.nouns]
        if not self.size:
            return matching
        if not all(item.size for item in matching):
            return []
        return [item for item in matching if item.size == self.size]

    def text(self, rng: np.random.Generator) -> str:
        """Return the phrase in words, without article."""
        size = pick(rng, SIZES[self.size]) if self.size else ""
        noun = pick(rng, self.noun) if len(self.noun) > 1 else self.noun[0]
        return " ".join(filter(None, (size, self.color, noun)))


class Expression(NamedTuple, Generic[Object]):
    """A referring expression and all objects it fits."""

    text: str
    type: ExpressionType
    targets: tuple[Object, ...]

    @property
    def target(self) -> Object:
        """Return the only object."""
        (target,) = self.targets
        return target


def shared_phrases(scene: AnyScene[Object], at_least: int = 1) -> list[Phrase]:
    """Return all phrases of color (optional) and noun that match at least this many objects of the scene."""
    phrases = {
        Phrase("", color, noun): None  # a dict, because the order of a set differs between runs
        for item in scene.objects
        for color, noun in product(("", item.color), item.nouns)
    }
    return [phrase for phrase in phrases if len(phrase.matches(scene.objects)) >= at_least]


def unique_phrases(item: Object, scene: AnyScene[Object]) -> list[Phrase]:
    """Return all phrases that match this object of the scene and no other."""
    return [phrase for phrase in _phrases(item) if phrase.matches(scene.objects) == [item]]


def _phrases(item: SceneObject) -> Iterator[Phrase]:
    """Yield all phrases of this object, whether they match another one or not."""
    return starmap(Phrase, product({"": None, item.size: None}, {"": None, item.color: None}, item.nouns))


def described_scene(
    rng: np.random.Generator, expression_type: ExpressionType, sample: Callable[[np.random.Generator], AnyScene[Object]]
) -> tuple[AnyScene[Object], Expression[Object]]:
    """Sample a scene and an expression of this type; scenes without one are rejected.

    Raises:
        DataError: MAX_SCENES in a row have none.
    """
    for _ in range(MAX_SCENES):
        scene = sample(rng)
        if expression := DESCRIBE[expression_type](rng, scene):
            return scene, expression
    raise DataError(
        f"none of {MAX_SCENES} scenes can be described by an expression of the type {expression_type!r}: leave it out "
        "of `kinds`, or use objects of more categories"
    )


def further_expressions(
    rng: np.random.Generator, scene: AnyScene[Object], first: Expression[Object], types: Sequence[ExpressionType]
) -> list[Expression[Object]]:
    """Return one more expression per type; where the scene has none of that type, one of the next type in `types`."""
    found = []
    for index in range(len(types)):
        candidates = (DESCRIBE[expression_type](rng, scene) for expression_type in (*types[index:], *types[:index]))
        found.append(next(filter(None, candidates), first))
    return found


def by_attribute(rng: np.random.Generator, scene: AnyScene[Object]) -> Expression[Object] | None:
    """Generate an expression such as "the small red circle"."""
    for item in some(rng, scene.objects):
        if text := _attributes(rng, scene, item):
            return Expression(text, "attribute", (item,))
    return None


def _by_order(rng: np.random.Generator, scene: AnyScene[Object], ordinal: bool) -> Expression[Object] | None:
    """Generate an expression such as "leftmost star", or "second leftmost star" for a scene with at least three."""
    for order in some(rng, tuple(SUPERLATIVES)):
        rank = 1 + int(rng.integers(len(ORDINALS))) if ordinal else 0
        for phrase in some(rng, shared_phrases(scene, at_least=rank + 2)):
            if ordinal and order not in DIRECTIONS and phrase.noun == GENERIC_NOUN:
                continue  # comparing sizes of different forms is ambiguous
            objects = phrase.matches(scene.objects)
            ordered = sorted(objects, key=lambda item: lead_of(order, item, objects[0], scene), reverse=True)
            target = ordered[rank]
            if all(precedes(order, item, target, scene) for item in ordered[:rank]) and all(
                precedes(order, target, item, scene) for item in ordered[rank + 1 :]
            ):
                wordings = [wording for wording in SUPERLATIVES[order] if not ordinal or wording.endswith("{}")]
                text = pick(rng, wordings).format(phrase.text(rng))
                if ordinal:
                    return Expression(f"{_article(rng)}{ORDINALS[rank - 1]} {text}", "ordinal", (target,))
                return Expression(_article(rng) + text, "superlative", (target,))
    return None


by_superlative = partial(_by_order, ordinal=False)
by_ordinal = partial(_by_order, ordinal=True)


def by_relation(rng: np.random.Generator, scene: AnyScene[Object]) -> Expression[Object] | None:
    """Generate an expression such as "circle above the red star" for a scene with several circles and one red star."""
    return _by_relation(rng, scene, "relation", scene.objects, partial(_attributes, rng, scene))


def by_closest(rng: np.random.Generator, scene: AnyScene[Object]) -> Expression[Object] | None:
    """Generate an expression such as "circle next to the red star" where something else is closer to another circle.

    Other relations can mostly be guessed: a circle left of anything is the leftmost one, one next to something is often
    that in the middle.
    """
    describe = partial(_attributes, rng, scene)
    return _by_relation(rng, scene, "closest", scene.objects, describe, ("near",), decisive=True)


def by_chain(rng: np.random.Generator, scene: AnyScene[Object]) -> Expression[Object] | None:
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
    scene: AnyScene[Object],
    expression_type: ExpressionType,
    anchors: Sequence[Object],
    describe: Callable[[Object], str | None],
    relations: Sequence[str] = tuple(RELATIONS),
    decisive: bool = False,
) -> Expression[Object] | None:
    """Refer to an object by its relation to an anchor for which `describe` returns an expression.

    With `decisive`, not all anchors have the same object closest to them.
    """
    shared = [(phrase, phrase.matches(scene.objects)) for phrase in shared_phrases(scene, at_least=2)]
    for relation in some(rng, relations):
        for phrase, candidates in some(rng, shared):
            remaining = [item for item in anchors if item not in candidates]
            if decisive and len({min(candidates, key=item.distance) for item in remaining}) < 2:
                continue
            for anchor in some(rng, remaining):
                target = related(relation, candidates, anchor, scene)
                if target and (anchor_text := describe(anchor)):
                    text = f"{phrase.text(rng)} {pick(rng, RELATIONS[relation])} {anchor_text}"
                    return Expression(_article(rng) + text, expression_type, (target,))
    return None


def by_absent(rng: np.random.Generator, scene: AnyScene[Object]) -> Expression[Object] | None:
    """Generate an expression that fits no object but nearly does.

    Such as "red star" for a scene with stars and red circles, or "star above the circle" where every star is below it.
    """
    for missing in some(rng, (_missing_object, _missing_relation)):
        if text := missing(rng, scene):
            return Expression(_article(rng) + text, "absent", ())
    return None


def _missing_object(rng: np.random.Generator, scene: AnyScene[Object]) -> str | None:
    """Return a combination of attributes that no object has, although objects have them in other combinations."""
    sizes, colors = ({"": None} | {getattr(x, name): None for x in scene.objects} for name in ("size", "color"))
    nouns = {noun: None for item in scene.objects for noun in item.nouns}
    missing = []
    for phrase in starmap(Phrase, product(sizes, colors, nouns)):
        of_any_size = phrase._replace(size="").matches(scene.objects)
        if not phrase.size or (of_any_size and all(item.size for item in of_any_size)):
            missing += [] if phrase.matches(scene.objects) else [phrase]
    return pick(rng, missing).text(rng) if missing else None


def _missing_relation(rng: np.random.Generator, scene: AnyScene[Object]) -> str | None:
    """Return a relation to an object on whose other side all objects of that phrase are."""
    for relation in some(rng, tuple(DIRECTIONS)):
        for phrase in some(rng, shared_phrases(scene)):
            candidates = phrase.matches(scene.objects)
            for anchor in some(rng, [item for item in scene.objects if item not in candidates]):
                opposite = all_opposite(relation, candidates, anchor, scene)
                if opposite and (anchor_text := _attributes(rng, scene, anchor)):
                    return f"{phrase.text(rng)} {pick(rng, RELATIONS[relation])} {anchor_text}"
    return None


def by_several(rng: np.random.Generator, scene: AnyScene[Object]) -> Expression[Object] | None:
    """Generate an expression such as "all red circles" or "both small stars"."""
    phrases = {phrase: None for item in scene.objects for phrase in _phrases(item)}
    for phrase in some(rng, tuple(phrases)):
        objects = phrase.matches(scene.objects)
        if len(objects) > 1:
            *words, noun = phrase.text(rng).split()
            noun = PLURALS.get(noun, noun + ("es" if noun.endswith(("s", "x", "z", "ch", "sh")) else "s"))
            quantifier = pick(rng, (*ANY_NUMBER, *QUANTIFIERS.get(len(objects), ())))
            return Expression(" ".join((quantifier, *words, noun)), "several", tuple(objects))
    return None


DESCRIBE: dict[ExpressionType, Callable[[np.random.Generator, AnyScene[Any]], Expression[Any] | None]] = {
    "attribute": by_attribute,
    "superlative": by_superlative,
    "relation": by_relation,
    "closest": by_closest,
    "ordinal": by_ordinal,
    "chain": by_chain,
    "absent": by_absent,
    "several": by_several,
}


def _article(rng: np.random.Generator) -> str:
    return pick(rng, ("the ", ""))


def _attributes(rng: np.random.Generator, scene: AnyScene[Object], item: Object) -> str | None:
    """Return a phrase that matches only this object, such as "the red star"; None if there is none."""
    phrases = unique_phrases(item, scene)
    return _article(rng) + pick(rng, phrases).text(rng) if phrases else None
