"""A reader of expressions that is independent of the code under test: its own grammar, evaluated without margins."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

RELATION = (
    r" (?:(?:(?:to|on) the )?(?P<side>left|right) of|(?P<above>above)|(?P<below>below|under)"
    r"|(?P<near>closest to|nearest to|next to)) (?P<anchor>.+)"
)
SUPERLATIVE = re.compile(
    r"(?:the )?(?:(?P<ordinal>second|third) )?"
    r"(?P<word>leftmost|rightmost|topmost|highest|bottommost|lowest|smallest|largest|biggest) (?P<noun>.+)"
    r"|(?P<far_noun>.+) on the far (?P<far>left|right)"
)


def x(item: Any) -> float:
    return (item.box[0] + item.box[2]) / 2


def y(item: Any) -> float:
    return (item.box[1] + item.box[3]) / 2


def side(item: Any) -> float:
    return math.sqrt((item.box[2] - item.box[0]) * (item.box[3] - item.box[1]))


class Reader:
    """Evaluates expressions on the boxes and attributes of a scene.

    Args:
        noun: pattern of a noun phrase, in which {0} is a prefix of its groups.
        fitting: the objects of a scene that a match of this pattern describes.
        size: by which "largest" compares.
    """

    def __init__(
        self, noun: str, fitting: Callable[[re.Match, str, Any], list], size: Callable[[Any], float] = side
    ) -> None:
        self.noun, self.fitting, self.size = re.compile(noun.format("")), fitting, size
        self.relation = re.compile(noun.format("t_") + RELATION)

    def read(self, text: str, scene: Any) -> tuple[str, Sequence]:
        """Return the type of an expression and all objects that satisfy it."""
        if match := self.relation.fullmatch(text):
            anchor_type, (anchor,) = self.read(match["anchor"], scene)
            assert anchor_type in ("attribute", "superlative", "ordinal"), "nested relations are ambiguous"
            assert anchor_type == "attribute" or not text.endswith(("left", "right")), "left of which object?"
            expression_type = "relation" if anchor_type == "attribute" else "chain"
            candidates = [item for item in self.fitting(match, "t_", scene) if item is not anchor]
            assert len(candidates) >= 2, "the phrase alone is unique, without the relation"
            if match["near"]:
                distances = [math.hypot(x(item) - x(anchor), y(item) - y(anchor)) for item in candidates]
                return expression_type, [s for s, d in zip(candidates, distances, strict=True) if d == min(distances)]
            if match["side"]:
                sign = 1 if match["side"] == "right" else -1
                return expression_type, [item for item in candidates if sign * (x(item) - x(anchor)) > 0]
            sign = 1 if match["below"] else -1
            return expression_type, [item for item in candidates if sign * (y(item) - y(anchor)) > 0]
        if match := SUPERLATIVE.fullmatch(text):
            noun = self.noun.fullmatch(match["noun"] or match["far_noun"])
            assert noun, text
            candidates = self.fitting(noun, "", scene)
            rank = {None: 0, "second": 1, "third": 2}[match["ordinal"]]
            assert len(candidates) >= 2 + rank, "the phrase alone is unique, without the superlative"
            word = match["word"] or {"left": "leftmost", "right": "rightmost"}[match["far"]]
            measure = {
                "leftmost": lambda item: -x(item),
                "rightmost": x,
                "topmost": lambda item: -y(item),
                "highest": lambda item: -y(item),
                "bottommost": y,
                "lowest": y,
                "smallest": lambda item: -self.size(item),
                "largest": self.size,
                "biggest": self.size,
            }[word]
            values = sorted(map(measure, candidates), reverse=True)
            expression_type = "ordinal" if match["ordinal"] else "superlative"
            return expression_type, [item for item in candidates if measure(item) == values[rank]]
        match = self.noun.fullmatch(text)
        assert match, f"not in the grammar: {text}"
        return "attribute", self.fitting(match, "", scene)
