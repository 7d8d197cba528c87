"""Warnings about phrases of which the tokenizer knows no word."""

from __future__ import annotations

import logging
from multiprocessing import RawValue
from multiprocessing.context import get_spawning_popen
from typing import Any

logger = logging.getLogger(__name__)

_MOST_UNKNOWN = 10  # phrases that are reported


class UnknownWords:
    """Reports phrases without a known word, each once and only the first ones."""

    def __init__(self, count: Any = None) -> None:
        self.phrases: set[str] = set()
        # Of all data workers together, roughly: a lock could not be shared with processes of every start method.
        self.count = RawValue("i", 0) if count is None else count

    def __reduce__(self) -> Any:
        """Share the count with a process that is being started; other copies count from 0."""
        return UnknownWords, (self.count,) if get_spawning_popen() else ()

    def report(self, name: str, phrase: str) -> None:
        if phrase in self.phrases or self.count.value > _MOST_UNKNOWN:
            return
        self.phrases.add(phrase)
        self.count.value += 1
        if self.count.value > _MOST_UNKNOWN:
            logger.warning("%s: and more phrases of unknown words, which are not reported", name)
            return
        logger.warning(
            "%s: all tokens of the phrase %r are unknown to the tokenizer, so the model confuses it with other unknown "
            "phrases; use other words, or set model.text.tokenizer or data.*.vocabulary.phrases",
            *(name, phrase),
        )
