"""Checks of arguments that several entry points of inference have."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

from vg.errors import ConfigError, DataError


def checked_phrases(phrases: Any, classes: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return one phrase or several as a tuple; raises DataError if there is none, or one that is empty or not text.

    None stands for the classes of the model, if it has any.

    Warns of a phrase that looks like the prompts of other libraries, "cat. dog.", because it is one phrase here.
    """
    if phrases is None:
        if not classes:
            raise DataError("no phrase: this model was not trained on classes; give phrases to find")
        return classes
    if isinstance(phrases, Mapping):
        raise DataError(f"phrases are text, not a mapping {phrases!r:.80}; give its keys or its values as a list")
    is_one = isinstance(phrases, (str, bytes)) or not isinstance(phrases, Iterable)
    wanted = (phrases,) if is_one else tuple(phrases)
    for phrase in wanted:
        if not isinstance(phrase, str):
            per_image = "; predict_batch takes the phrases of each image" if isinstance(phrase, (list, tuple)) else ""
            raise DataError(f"a phrase must be text, got {phrase!r:.80} of type {type(phrase).__name__}{per_image}")
    if not wanted or not all(phrase.strip() for phrase in wanted):
        raise DataError("no phrase or an empty phrase; give at least one with words")
    for phrase in wanted:
        parts = list(filter(None, re.split(r"\s*\.\s+", phrase.strip(" ."))))
        if phrase.rstrip().endswith(".") and len(parts) > 1:
            separate = " ".join(f'"{part}"' for part in parts)
            warnings.warn(f"{phrase!r:.80} is one phrase; give several one by one: {separate:.80}", stacklevel=1)
    return wanted


def check_count(value: Any, name: str, minimum: int = 1) -> None:
    """Raise ConfigError unless a number, such as that of the images in a batch, is an integer from `minimum`."""
    if not isinstance(value, Integral) or value < minimum:
        raise ConfigError(f"{name} {value!r:.80}: expected at least {minimum}, an integer")


def check_fraction(value: Any, name: str, maximum: float = 1.0, meaning: str = "a score or IoU") -> float:
    """Return a number, such as a score; raises ConfigError unless it is in 0..maximum."""
    try:
        if 0 <= value <= maximum:
            return float(value)
    except (TypeError, ValueError):  # such as text, or several values
        pass
    shown = f"{value:g}" if isinstance(value, (int, float)) else f"{value!r:.80}"
    raise ConfigError(f"{name} {shown}: expected {meaning} from 0 to {maximum:g}, such as 0.3")
