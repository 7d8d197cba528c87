"""Phrases of one text field."""

from __future__ import annotations

import pytest

from vg.errors import DataError
from vg.web.phrases import MAX_CHARACTERS, MAX_PHRASES, split_phrases


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("dog", ("dog",)),
        ("dog, hot dog,, cat ,dog", ("dog", "hot dog", "cat")),
        ('"man in red, left", dog', ("man in red, left", "dog")),
        ("dog\ncat\r\n\tbird", ("dog", "cat", "bird")),
        ('a 5" pipe', ('a 5" pipe',)),
        ("👩‍🚀 in space, كلب, שׁלום", ("👩‍🚀 in space", "كلب", "שׁלום")),
        ('"open, to the end', ("open, to the end",)),
    ],
)
def test_phrases(text: str, phrases: tuple[str, ...]) -> None:
    assert split_phrases(text, ("bird",)) == phrases


def test_an_empty_text_stands_for_the_classes() -> None:
    assert split_phrases(" ,\n", ("bird", "a, b")) == ("bird", "a, b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no phrase"),
        (" , ,\n", "no phrase"),
        ("x" * 100_000, f"100,000 characters; use at most {MAX_CHARACTERS:,}"),
        (",".join(map(str, range(MAX_PHRASES + 1))), f"at most {MAX_PHRASES}"),
        ("a\x1b[31mdog", r"control character U\+001B"),
        ("dog\x00", r"control character U\+0000"),
        ("dog\ud800", r"control character U\+D800"),
    ],
)
def test_unusable_text(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_phrases(text)
