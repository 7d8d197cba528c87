"""Phrases of the prompt of a detection image: all class names, or those of its boxes and some sampled negatives."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from vg.errors import DataError
from vg.settings import Settings

_STREAM = 1  # separates these random numbers from those of augmentation, which has the same seed, epoch and index


@dataclass
class VocabularyConfig(Settings):
    """By default every prompt has the names of all classes, as in closed-set fine-tuning and in all evaluation."""

    negatives: PositiveInt | None = None
    """Maximum number of negative names, sampled again for every sample; null means all. MM-Grounding-DINO: 85."""
    full: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of drawing `negatives` candidates; otherwise their number is drawn from 1 to `negatives`."""
    seed: NonNegativeInt = 0
    clean: bool = True
    """"traffic_light" becomes the phrase "traffic light", "bow_(weapon)" becomes "bow" if no other class does."""
    lower: bool = False
    """Convert phrases to lower case, for tokenizers that distinguish "TV" from "tv"."""
    alternatives: bool = False
    """In a name such as "cup/mug" both words name the class: one of them is drawn for each sample; with `negatives`
    null the first one is used."""
    phrases: dict[str, str] = field(default_factory=dict)
    """Phrases that replace uninformative names: {WBC: white blood cell}."""
    only: Annotated[list[str], Field(min_length=1)] | None = None
    """Names of the classes to use; boxes of the others are left out. null: all classes."""


class Vocabulary:
    """The classes of a detection dataset: their names in the annotations (`names`) and as phrases (`phrases`).

    Args:
        where: beginning of error messages.

    Raises:
        DataError: there are no classes, a class has no words, two have the same phrase, or `config.phrases` or
            `config.only` has an unknown name.
    """

    def __init__(self, names: Sequence[str], config: VocabularyConfig, where: str):
        if not names:
            raise DataError(f"{where}: there are no classes; a detection dataset has at least one")
        for key, given in (("phrases", config.phrases.keys()), ("only", {*(config.only or ())})):
            if unknown := given - set(names):
                known = ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
                raise DataError(f"{where}: vocabulary.{key} has {sorted(unknown)}, the classes are {known}")
        self.config = config
        self.used = [label for label, name in enumerate(names) if config.only is None or name in config.only]
        """Label of each class in the annotations."""
        self.labels = np.full(len(names), -1)
        """[labels in the annotations] int, the class of a label; -1 if it is not used."""
        self.labels[self.used] = np.arange(len(self.used))
        names = [names[label] for label in self.used]
        self.names = tuple(names)
        self._alternatives = _alternatives(names, config, where)
        self.phrases = tuple(phrases[0] for phrases in self._alternatives)

    def prompt(self, labels: np.ndarray, epoch: int, index: int) -> tuple[tuple[str, ...], np.ndarray]:
        """Return the phrases of one sample, and which of them its boxes have.

        With sampled negatives, all phrases are in random order, as in mmdetection: denoising learns their positions.
        Randomness depends on (seed, epoch, index) only.

        Args:
            labels: [N] int, the class of each box.

        Returns:
            P phrases, and phrase_ids [N] int64.
        """
        if self.config.negatives is None:
            return self.phrases, labels.astype(np.int64)
        random = np.random.default_rng((self.config.seed, epoch, index, _STREAM))
        positives = np.unique(labels)
        limit = self.config.negatives
        num = limit if random.random() < self.config.full else int(random.integers(1, limit + 1))
        candidates = random.choice(len(self.names), min(num, len(self.names)), replace=False)
        negatives = candidates[~np.isin(candidates, positives)]
        classes = random.permutation(np.concatenate([positives, negatives]).astype(np.int64))  # [P]
        alternatives = (self._alternatives[label] for label in classes.tolist())
        phrases = tuple(a[int(random.integers(len(a)))] if len(a) > 1 else a[0] for a in alternatives)
        positions = np.zeros(len(self.names), np.int64)
        positions[classes] = np.arange(len(classes))
        return phrases, positions[labels]


def normalized_name(name: str) -> str:
    """Remove case, punctuation and plural, so that variants of one name are equal."""
    words = re.sub(r"[\W_]+", " ", name).casefold().split()
    return " ".join(re.sub(r"(?<=...)(?<!s)s$", "", word) for word in words)


def _alternatives(names: Sequence[str], config: VocabularyConfig, where: str) -> list[tuple[str, ...]]:
    """Return the phrases of each class, at least one; no two classes share one."""
    short = [_phrase(name, config, keep_brackets=False) for name in names]
    count = Counter(map(str.casefold, short))
    full = [
        phrase if count[phrase.casefold()] == 1 else _phrase(name, config, keep_brackets=True)
        for name, phrase in zip(names, short, strict=True)
    ]
    split = [tuple(filter(None, map(str.strip, name.split("/") if config.alternatives else [name]))) for name in full]
    count = Counter(phrase.casefold() for phrases in split for phrase in phrases)
    unique = [tuple(phrase for phrase in phrases if count[phrase.casefold()] == 1) or phrases[:1] for phrases in split]
    owner: dict[str, int] = {}
    for label, phrases in enumerate(unique):
        if not phrases:
            raise DataError(f"{where}: the class {names[label]!r} has no word; set its phrase in vocabulary.phrases")
        other = owner.setdefault(phrases[0].casefold(), label)
        if other != label:
            # The keys of vocabulary.phrases are names.
            fix = "" if names[other] == names[label] else ", or set vocabulary.phrases for it"
            raise DataError(
                f"{where}: the classes {names[other]!r} and {names[label]!r} have the same phrase {phrases[0]!r}, so "
                f"each would be a negative of the other; merge or rename one{fix}"
            )
    return unique


def _phrase(name: str, config: VocabularyConfig, keep_brackets: bool) -> str:
    """Convert a class name to natural language; `keep_brackets` keeps the words in brackets."""
    if name in config.phrases:
        return config.phrases[name].strip()
    if config.clean:
        bare = re.sub(r"\([^)]*\)", " ", name)
        name = re.sub(r"[()_]", " ", name if keep_brackets or not bare.strip(" _") else bare)
    name = " ".join(name.split())
    return name.lower() if config.lower else name
