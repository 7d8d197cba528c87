"""The text field of phrases, taken apart and checked."""

from __future__ import annotations

import csv
import unicodedata

from vg.errors import DataError
from vg.inference.arguments import checked_phrases

MAX_CHARACTERS = 2_000  # of the field
MAX_PHRASES = 80


def split_phrases(text: str, classes: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the phrases of a text, once each: separated by commas or lines; double quotes keep commas in a phrase.

    Args:
        classes: the phrases of a text without any.

    Raises:
        DataError: no phrase, too many of them, too long a text, or a control character.
    """
    if len(text) > MAX_CHARACTERS:
        raise DataError(f"the phrases have {len(text):,} characters; use at most {MAX_CHARACTERS:,}")
    phrases = (phrase for line in text.splitlines() for phrase in next(csv.reader([line], skipinitialspace=True), ()))
    unique = tuple(dict.fromkeys(checked_label(phrase) for phrase in phrases if phrase.strip()))
    if len(unique) > MAX_PHRASES:
        raise DataError(f"{len(unique)} phrases; use at most {MAX_PHRASES} at a time")
    return checked_phrases(unique or classes)


def checked_label(text: str) -> str:
    """Return a phrase with single spaces; raises DataError for control characters and broken Unicode."""
    text = " ".join(text.split())
    for char in text:
        if unicodedata.category(char) in ("Cc", "Cs"):  # not Cf, which joins emoji and orders Arabic and Hebrew
            raise DataError(f"a phrase contains the control character U+{ord(char):04X}; remove it")
    return text
