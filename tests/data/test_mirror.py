"""Left and right in phrases of mirrored images: sides swap, adverbs stay, doubtful phrases are recognized."""

from __future__ import annotations

import pytest

from vg.data.mirror import mirrored
from vg.data.synthetic.shapes import ShapesConfig


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("left man", "right man"),
        ("man on the right", "man on the left"),
        ("Left of the Right one", "Right of the Left one"),
        ("RIGHT SIDE", "LEFT SIDE"),
        ("leftmost, not rightmost", "rightmost, not leftmost"),
        ("right-hand cup", "left-hand cup"),
        ("righthand cup, leftside", "lefthand cup, rightside"),
        ("far right next to the door", "far left next to the door"),
        ("the one on the right behind him", "the one on the left behind him"),
        ("right behind him", "right behind him"),  # an adverb, not a side
        ("dog right next to the left cat", "dog right next to the right cat"),
        ("right in front of the sofa", "right in front of the sofa"),
        ("bright upright copyright kite", "bright upright copyright kite"),
        ("red circle above the square", "red circle above the square"),
        ("bottom right next to the cup", "bottom left next to the cup"),
        ("2nd right behind the car", "2nd left behind the car"),
        ("apple top right in front", "apple top left in front"),
        ("right in the middle", "right in the middle"),
        ("right beneath the sign", "right beneath the sign"),
        ("bottomright one, topleft one", "bottomleft one, topright one"),
        ("leftest person", "rightest person"),
        ("Upper-Right corner", "Upper-Left corner"),
        ("half of the pizza on the left", "half of the pizza on the right"),
        ("right half of pizza", "left half of pizza"),
        ("guy he left of the door", "guy he right of the door"),
        ("leftovers on a plate", "leftovers on a plate"),
        ("the right in front of the left", "the left in front of the right"),
    ],
)
def test_sides_are_swapped(phrase: str, expected: str) -> None:
    assert mirrored(phrase) == expected
    assert mirrored(expected) == phrase


@pytest.mark.parametrize(
    "phrase",
    [
        *(
            "half of pizza left",
            "half of the pizza left",
            "what little is left, nothing much left",
            "the man who left",
            "only one left",
        ),
        *("man right behind the bike", "umbrella right in front", "pizza slice at 4 oclock", "western most bike"),
        *("rigth bike", "leftguy", "shirt l", "girl on righ", "leftpurple shirt", "first rowleft"),
    ],
)
def test_doubtful_phrases_are_not_mirrored(phrase: str) -> None:
    assert mirrored(phrase) is None


def test_drawn_expressions_are_never_doubtful() -> None:
    source = ShapesConfig(split="train", size=500).build()
    phrases = {source.load(index, 0).phrases[0] for index in range(len(source))}
    assert len(phrases) > 200
    for phrase in phrases:
        swapped = mirrored(phrase)
        assert swapped is not None, phrase
        assert mirrored(swapped) == phrase
        assert (swapped == phrase) == (not {"left", "right", "leftmost", "rightmost"} & set(phrase.split())), phrase
