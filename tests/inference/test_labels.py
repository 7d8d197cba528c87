"""Labels stay inside the image and do not overlap; texts of any script have glyphs or are spelled out."""

from __future__ import annotations

import time

import numpy as np
import pytest
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from PIL import ImageFont, features

from vg.inference import labels
from vg.inference.labels import make_label, place_labels, typeset, wrap


def overlaps(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((np.minimum(one[2:], other[2:]) > np.maximum(one[:2], other[:2])).all())


@pytest.mark.parametrize("side", [64, 300, 640, 1500, 4000])
def test_labels_are_inside_the_image_and_never_over_each_other(side: int) -> None:
    generator = np.random.default_rng(side)
    for num_boxes in (1, 5, 40):
        corners = np.sort(generator.uniform(0, side, (num_boxes, 2, 2)), axis=1)
        boxes = corners.reshape(-1, 4)
        sizes = [(round(side * generator.uniform(0.02, 0.3)), max(1, side // 30)) for _ in boxes]
        found = place_labels(sizes, boxes, (side, side))
        placed = np.array(
            [(*at, at[0] + size[0], at[1] + size[1]) for at, size in zip(found, sizes, strict=True) if at]
        )
        assert len(placed) >= min(num_boxes, 10)
        assert placed.min() >= 0
        assert placed.max() <= side
        assert not any(overlaps(one, other) for i, one in enumerate(placed) for other in placed[:i])


@pytest.mark.parametrize("side", [64, 300, 640, 1500, 4000])
def test_every_label_has_a_place_where_there_is_room(side: int) -> None:
    generator = np.random.default_rng(side)
    for _ in range(20):
        cells = np.stack(np.meshgrid(range(4), range(4)), axis=-1).reshape(-1, 2) * side / 4  # [16, 2] upper left
        inset = generator.uniform(0.1, 0.4, (16, 4)) * side / 4
        boxes = np.concatenate((cells + inset[:, :2], cells + side / 4 - inset[:, 2:]), axis=1)
        assert None not in place_labels([(side // 5, side // 30)] * 16, boxes, (side, side))


def test_labels_prefer_places_that_cover_no_object() -> None:
    box, above = [40.0, 40, 80, 80], [40.0, 20, 80, 39]
    assert place_labels([(30, 10)], np.array([box]), (200, 200)) == [(40, 30)]
    assert place_labels([(30, 10), (30, 10)], np.array([box, above]), (200, 200)) == [(40, 80), (40, 10)]


def test_a_label_without_room_has_no_place() -> None:
    boxes = np.array([[0.0, 0, 20, 20]] * 3)
    assert place_labels([(20, 15)] * 3, boxes, (20, 20)) == [None] * 3, "they cover most of three objects"
    assert place_labels([(20, 15)] * 3, boxes[:1].repeat(3, axis=0) + 100, (300, 300)).count(None) == 0
    assert place_labels([(20, 30)], boxes[:1], (20, 20)) == [None], "higher than the image"


def test_labels_are_shortened_but_keep_the_score() -> None:
    label = make_label("the man in the white shirt on the left of the bench 0.91", 14, 200)
    assert label.width <= 200
    assert label.text.startswith("the man in")
    assert label.text.endswith("… 0.91")
    assert make_label("a star 0.91", 14, 200).text == "a star 0.91"
    assert make_label("wide", 14, 3).width == 3


def test_texts_without_glyphs_are_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "_font_file_with", lambda characters: None)

    def shown(text: str) -> str:
        return typeset(text, 14)[0]

    assert shown("größte Tür") == "größte Tür"
    assert shown("кот, γάτα, قطة, חתול 😀") == "кот, γάτα, قطة, חתול 😀"
    assert shown("🐶 0.91") == "(dog face) 0.91"
    assert shown("犬 0.91") == "\\u72ac 0.91"
    assert shown("a\x00b\ud800") == "a\\x00b\\ud800"
    assert shown(" two\nlines\t") == "two lines"
    assert shown("") == ""


def test_a_font_that_has_all_characters_is_used() -> None:
    text, font = typeset("ᶁ 0.91", 14)  # matplotlib brings STIX, which has it
    assert text == "ᶁ 0.91"
    assert {*map(ord, text)} <= set(FT2Font(font.path).get_charmap())
    assert typeset("\U000f1234", 14)[0] == "\\U000f1234", (
        "the font of last resort is not used: all its glyphs are boxes"
    )


def test_fonts_are_found_that_the_list_of_matplotlib_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fontManager, "ttflist", [])  # as if it was written before they were installed
    for cached in (labels._font_files, labels._font_file_with):
        cached.cache_clear()
    assert typeset("ᶁ 0.91", 14)[0] == "ᶁ 0.91"


@pytest.mark.skipif(not features.check("raqm"), reason="this Pillow sets texts from left to right only: no Raqm")
def test_right_to_left_texts_are_in_their_order() -> None:
    _, font = typeset("חתול", 30)
    left_to_right = ImageFont.truetype(font.path, 30, layout_engine=ImageFont.Layout.BASIC)
    shown, reversed_text = font.getmask("חתול"), left_to_right.getmask("לותח")
    assert shown.size == reversed_text.size
    assert bytes(shown) == bytes(reversed_text)


def test_a_huge_text_is_set_at_once() -> None:
    start = time.process_time()
    assert make_label("dog " * 25_000, 14, 500).text.endswith("…")
    assert len(wrap(*typeset("dog " * 25_000, 14), 500, lines=3)) == 3
    assert time.process_time() - start < 1


def test_captions_wrap_between_words_and_end_with_an_ellipsis_if_cut() -> None:
    font = typeset("", 17)[1]
    lines = wrap("the small red star left of the big blue circle " * 3, font, 200, lines=2)
    assert len(lines) == 2
    assert all(font.getlength(line) <= 200 for line in lines)
    assert lines[0] in "the small red star left of the big blue circle"
    assert lines[1].endswith("…")
    assert wrap("a star", font, 200, lines=2) == ["a star"]
    assert wrap("a" * 100, font, 200, lines=2)[0].endswith("…")
    assert wrap("", font, 200, lines=2) == [""]
