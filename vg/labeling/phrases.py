"""Phrases that are the same for all images: classes, with a threshold each, and their ODVG lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from vg.errors import ConfigError
from vg.files import read_text
from vg.inference.arguments import check_fraction
from vg.labeling.plan import PlannedImage

Thresholds: TypeAlias = dict[str, float | None]  # phrase -> minimum score of its boxes; None: that of all


class Prompt(NamedTuple):
    """The phrases of one image."""

    phrases: tuple[str, ...]  # may be empty
    spans: tuple[tuple[int, int], ...] = ()  # characters of the caption, of every phrase
    caption: str = ""


class Labels(NamedTuple):
    """The boxes of one image, best first."""

    name: str
    height: int
    width: int
    boxes: np.ndarray  # [K, 4] float64, xyxy in pixels, rounded
    scores: np.ndarray  # [K] float64, rounded
    phrase_ids: np.ndarray  # [K] int64

    def line(self, key: str, value: dict[str, Any]) -> dict[str, Any]:
        """Return an ODVG line, see vg.data.detection.odvg."""
        return {"filename": self.name, "height": self.height, "width": self.width, key: value}


class Classes:
    """The same phrases for all images; a box has the number of its phrase as its label.

    Raises:
        ConfigError: there are no phrases, one has no words, or two differ in nothing but case.
    """

    def __init__(self, phrases: Iterable[str]):
        self.prompt = Prompt(tuple(phrases))
        known: dict[str, str] = {}
        for phrase in self.prompt.phrases:
            if not phrase.strip():
                raise ConfigError("an empty phrase; every phrase has words")
            if (other := known.setdefault(phrase.strip().casefold(), phrase)) is not phrase:
                raise ConfigError(f"the phrases {other!r} and {phrase!r} are the same; leave one of them out")
        if not known:
            raise ConfigError("no phrases; give them with -p, --phrases-file or --captions")

    def prompts(self, images: Sequence[PlannedImage]) -> list[Prompt]:
        return [self.prompt] * len(images)

    def line(self, labels: Labels, prompt: Prompt) -> dict[str, Any]:
        found = zip(labels.boxes.tolist(), labels.phrase_ids.tolist(), labels.scores.tolist(), strict=True)
        instances = [
            {"bbox": box, "label": label, "category": prompt.phrases[label], "score": score}
            for box, label, score in found
        ]
        return labels.line("detection", {"instances": instances})

    def label_map(self) -> dict[str, str]:
        return {str(label): phrase for label, phrase in enumerate(self.prompt.phrases)}


def read_phrases(file: Path) -> Thresholds:
    """Read a text file with a phrase per line, or JSON: a list of phrases, or {phrase: threshold or null}.

    Raises:
        ConfigError: the file cannot be read, or has something else than phrases and thresholds from 0 to 1.
    """
    try:
        text = read_text(file)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        values: Any = json.loads(text, object_pairs_hook=tuple) if file.suffix == ".json" else lines
    except (OSError, ValueError) as error:
        raise ConfigError(f"--phrases-file {file}: {error}") from error
    wanted = 'expected phrases, as ["dog", "cat"] or {"dog": 0.4, "cat": null}'
    if not isinstance(values, (list, tuple)):
        raise ConfigError(f"--phrases-file {file}: {str(values)[:80]}; {wanted}")
    pairs = [(phrase, None) for phrase in values] if isinstance(values, list) else list(values)
    for phrase, threshold in pairs:
        if not isinstance(phrase, str) or type(threshold) not in (int, float, type(None)):
            shown = phrase if threshold is None else f"{phrase}: {threshold}"
            raise ConfigError(f"--phrases-file {file}: {str(shown)[:80]}; {wanted}")
        if threshold is not None:
            check_fraction(threshold, f"--phrases-file {file}: {phrase}:")
    if len(found := dict(pairs)) < len(pairs):
        raise ConfigError(f"--phrases-file {file}: a phrase is there twice; leave one of them out")
    return found
