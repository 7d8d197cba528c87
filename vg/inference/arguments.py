"""Checks of arguments that several entry points of inference have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vg.errors import ConfigError, DataError


def checked_phrases(phrases: Any) -> tuple[str, ...]:
    """Return one phrase or several as a tuple; raises DataError if there is none, or one that is empty or not text."""
    is_one = isinstance(phrases, (str, bytes)) or not isinstance(phrases, Iterable)
    wanted = (phrases,) if is_one else tuple(phrases)
    for phrase in wanted:
        if not isinstance(phrase, str):
            raise DataError(f"a phrase must be text, got {phrase!r:.80} of type {type(phrase).__name__}")
    if not wanted or not all(phrase.strip() for phrase in wanted):
        raise DataError("no phrase or an empty phrase; give at least one with words")
    return wanted


def check_count(value: int, name: str, minimum: int = 1) -> None:
    """Raise ConfigError unless a number, such as that of the images in a batch, is at least `minimum`."""
    if value < minimum:
        raise ConfigError(f"{name} {value}: expected at least {minimum}")


def check_fraction(value: Any, name: str) -> None:
    """Raise ConfigError unless a score or IoU is in 0..1."""
    try:
        valid = 0 <= value <= 1
    except (TypeError, ValueError):  # such as text, or several values
        valid = False
    if not valid:
        shown = f"{value:g}" if isinstance(value, (int, float)) else f"{value!r:.80}"
        raise ConfigError(f"{name} {shown}: expected a score or IoU from 0 to 1, such as 0.3")
