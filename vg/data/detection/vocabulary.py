"""Which phrases the prompt of a detection image has: the name of every class, or those shown and some that are not."""

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

_STREAM = 1  # keeps these random numbers apart from those of augmentation, which has the same seed, epoch and index


@dataclass
class VocabularyConfig(Settings):
    """The defaults name every class in every prompt, as closed-set fine-tuning and all evaluation do."""

    negatives: PositiveInt | None = None
    """Names besides those of the boxes: a number up to this, drawn anew for every sample. MM-Grounding-DINO: 85."""
    full: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of that many candidates; otherwise their number is drawn from 1 to `negatives`."""
    seed: NonNegativeInt = 0
    clean: bool = True
    """ "traffic_light" is asked for as "traffic light", "bow_(weapon)" as "bow" unless there is another one."""
    lower: bool = False
    """Phrases are in lower case, as a tokenizer that tells "TV" from "tv" may want."""
    alternatives: bool = False
    """In a name such as "cup/mug" each part names the class: one is drawn for a sample, with `negatives` null the first
    is taken."""
    phrases: dict[str, str] = field(default_factory=dict)
    """What to ask for instead of a name that says little: {WBC: white blood cell}."""


class Vocabulary:
    """The classes of a detection set, under the names it has for them (`names`) and as phrases (`phrases`).

    Raises:
        DataError: no class, a class without a name, two with the same, or `config.phrases` renames what is not there.
    """

    def __init__(self, names: Sequence[str], config: VocabularyConfig, where: str):
        if not names:
            raise DataError(f"{where}: there are no classes; a detection set names at least one")
        if unknown := config.phrases.keys() - set(names):
            raise DataError(f"{where}: vocabulary.phrases has {sorted(unknown)}, the classes are {_some(names)}")
        self.config = config
        self.names = tuple(names)
        self._alternatives = _alternatives(names, config, where)
        self.phrases = tuple(each[0] for each in self._alternatives)

    def prompt(self, labels: np.ndarray, epoch: int, index: int) -> tuple[tuple[str, ...], np.ndarray]:
        """The phrases of one sample, and which of them each of its boxes shows.

        With sampled negatives, phrases of boxes come first and both kinds in random order: whoever has no room for all
        cuts at the end. What is random depends on (seed, epoch, index) alone.

        Args:
            labels: [N] int, the class of each box.

        Returns:
            P phrases, and phrase_ids [N] int64.
        """
        if self.config.negatives is None:
            return self.phrases, labels.astype(np.int64)
        random = np.random.default_rng((self.config.seed, epoch, index, _STREAM))
        positives = random.permutation(np.unique(labels))
        most = self.config.negatives
        number = most if random.random() < self.config.full else int(random.integers(1, most + 1))
        candidates = random.choice(len(self.names), min(number, len(self.names)), replace=False)
        negatives = candidates[~np.isin(candidates, positives)]
        asked = np.concatenate([positives, negatives]).astype(np.int64)  # [P] classes
        phrases = tuple(self._drawn(self._alternatives[label], random) for label in asked.tolist())
        place = np.zeros(len(self.names), np.int64)
        place[asked] = np.arange(len(asked))
        return phrases, place[labels]

    @staticmethod
    def _drawn(alternatives: Sequence[str], random: np.random.Generator) -> str:
        return alternatives[int(random.integers(len(alternatives)))] if len(alternatives) > 1 else alternatives[0]


def _alternatives(names: Sequence[str], config: VocabularyConfig, where: str) -> list[tuple[str, ...]]:
    """The phrases that may stand for each class, at least one; no two classes share one."""
    bare = [_spoken(name, config, brackets=False) for name in names]
    count = Counter(map(str.casefold, bare))
    spoken = [
        phrase if count[phrase.casefold()] == 1 else _spoken(name, config, brackets=True)
        for name, phrase in zip(names, bare, strict=True)
    ]
    parts = [tuple(filter(None, map(str.strip, each.split("/") if config.alternatives else [each]))) for each in spoken]
    count = Counter(phrase.casefold() for phrases in parts for phrase in phrases)
    own = [tuple(phrase for phrase in phrases if count[phrase.casefold()] == 1) or phrases[:1] for phrases in parts]
    owner: dict[str, int] = {}
    for label, phrases in enumerate(own):
        if not phrases:
            raise DataError(f"{where}: the class {names[label]!r} has no word in it; give it one in vocabulary.phrases")
        other = owner.setdefault(phrases[0].casefold(), label)
        if other != label:
            raise DataError(
                f"{where}: the classes {names[other]!r} and {names[label]!r} are both asked for as {phrases[0]!r}; "
                "each would be wrong where the other is right; merge or rename one, or set vocabulary.phrases for it"
            )
    return own


def _spoken(name: str, config: VocabularyConfig, brackets: bool) -> str:
    """A class name as one would say it; `brackets` keeps the words in them."""
    if name in config.phrases:
        return config.phrases[name].strip()
    if config.clean:
        bare = re.sub(r"\([^)]*\)", " ", name)
        name = re.sub(r"[()_]", " ", name if brackets or not bare.strip(" _") else bare)
    name = " ".join(name.split())
    return name.lower() if config.lower else name


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
