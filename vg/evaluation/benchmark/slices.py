"""Subsets of expressions (slices) by their words and annotations, for separate results."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from vg.data.refcoco.source import Annotation

SMALL, LARGE = 128**2, 256**2  # square pixels, limits of Ref-L4; with those of COCO all of RefCOCO is large
YES_NO = ("yes", "no")

_LOCATIONS = (
    "left right leftmost rightmost top bottom topmost bottommost middle mid center centre front back background "
    "foreground upper lower above below corner side edge end far near nearest closest closer furthest farthest first "
    "second third fourth last 1st 2nd 3rd 4th"
)
_RELATIONS = (
    "next to|beside|besides|behind|in front of|under|underneath|beneath|above|below|between|near|by|over|against|"
    "across from|around|holding|touching|riding|facing|carrying|closest to|nearest to|closer to|left of|right of|"
    "on top of|sitting on|standing on|lying on|laying on|leaning on|attached to|surrounded by"
)
_ATTRIBUTES = (
    "red orange yellow green blue purple violet pink brown black white gray grey gold golden silver beige tan blond "
    "blonde dark light bright colorful colored small little tiny short tall big large huge long thin fat skinny wide "
    "old young bald striped stripes stripe plaid checkered spotted dotted patterned floral plain wooden metal plastic "
    "glass round square empty full open closed dirty clean wet shiny furry fluffy wearing"
)
_PERSONS = (
    "person people man men woman women guy guys gal girl girls boy boys lady ladies kid kids child children baby "
    "toddler dude player batter catcher pitcher umpire umpires skier surfer skater snowboarder rider biker cyclist "
    "driver chef cook waiter waitress bride groom mom mother dad father son daughter couple crowd officer policeman "
    "soldier teacher student male female human he she him her his"
)


def _has_words(words: str) -> Callable[[str], bool]:
    known = frozenset(words.split())
    return lambda text: not known.isdisjoint(re.findall(r"[a-z0-9]+", text.lower()))


has_location, has_attribute, names_person = map(_has_words, (_LOCATIONS, _ATTRIBUTES, _PERSONS))
_RELATION = re.compile(rf"\b({_RELATIONS})\s+\w+")


def has_relation(text: str) -> bool:
    """Return whether a text relates its object to another one: "left of the dog" does, "on the left" does not."""
    return _RELATION.search(text.lower()) is not None


def _length(annotation: Annotation) -> str:
    count = len(annotation.expression.split())
    return next(label for limit, label in ((2, "1-2"), (5, "3-5"), (9, "6-9"), (10**9, "10+")) if count <= limit)


def _size(annotation: Annotation) -> str:
    if len(annotation.boxes) != 1:
        return ""
    width, height = annotation.boxes[0, 2:] - annotation.boxes[0, :2]
    return "small" if width * height < SMALL else "medium" if width * height < LARGE else "large"


def _others(annotation: Annotation) -> str:
    return "" if annotation.num_others is None else ("0", "1", "2", "3+")[min(max(annotation.num_others, 0), 3)]


def _person(annotation: Annotation) -> bool:
    return names_person(annotation.expression) if annotation.person is None else annotation.person


def _yes_no(holds: Callable[[Annotation], bool]) -> Callable[[Annotation], str]:
    return lambda annotation: YES_NO[not holds(annotation)]


# Attribute -> its labels in order, and the label of an expression; "" for no label.
ATTRIBUTES: dict[str, tuple[tuple[str, ...], Callable[[Annotation], str]]] = {
    "words": (("1-2", "3-5", "6-9", "10+"), _length),
    "box": (("small", "medium", "large"), _size),
    "others of its class": (("0", "1", "2", "3+"), _others),
    "location words": (YES_NO, _yes_no(lambda annotation: has_location(annotation.expression))),
    "attributes": (YES_NO, _yes_no(lambda annotation: has_attribute(annotation.expression))),
    "relations": (YES_NO, _yes_no(lambda annotation: has_relation(annotation.expression))),
    "person": (YES_NO, _yes_no(_person)),
}


def slices(annotations: Sequence[Annotation]) -> dict[str, dict[str, np.ndarray]]:
    """Return attribute -> label -> [expressions] bool mask, without empty masks."""
    found = {}
    for name, (labels, label_of) in ATTRIBUTES.items():
        values = np.array([label_of(annotation) for annotation in annotations])  # [expressions]
        if masks := {label: values == label for label in labels if label in values}:
            found[name] = masks
    return found
