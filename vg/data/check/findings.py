"""What the doctor writes down: findings, and a data set as its files have it, whatever that is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from vg.data.detection.vocabulary import VocabularyConfig

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
NUM_EXAMPLES = 3


@dataclass
class Finding:
    """One kind of trouble in one data set, however often it occurs there.

    An error stops a run or makes it learn the wrong thing; a warning costs data or makes a result hard to believe; a
    note is good to know.
    """

    severity: Severity
    set: str  # "train"
    what: str  # "boxes that end before they begin"
    mend: str
    count: int = 0
    examples: list[str] = field(default_factory=list)  # the first few: file or row, and what it says
    pictures: list[int] = field(default_factory=list)  # numbers of the first few pictures that show it


class Findings(list[Finding]):
    """The findings so far; the same trouble in the same set is counted up."""

    def add(
        self,
        severity: Severity,
        set: str,
        what: str,
        mend: str,
        examples: Iterable[str],
        pictures: Sequence[int] = (),
        count: int | None = None,
    ) -> None:
        """Note trouble.

        Args:
            examples: one text for each occurrence; nothing is noted where there is none.
            pictures: the pictures that show it.
            count: how often it occurs, if not every occurrence is among the examples.
        """
        told = list(examples)
        number = len(told) if count is None else count
        if not number:
            return
        finding = next((each for each in self if (each.set, each.what) == (set, what)), None)
        if finding is None:
            finding = Finding(severity, set, what, mend)
            self.append(finding)
        finding.count += number
        finding.examples += told[: NUM_EXAMPLES - len(finding.examples)]
        finding.pictures += list(pictures)[: NUM_EXAMPLES - len(finding.pictures)]

    def ranked(self) -> list[Finding]:
        """Errors first, else in the order they were found."""
        return sorted(self, key=lambda finding: SEVERITIES.index(finding.severity))

    def num(self, severity: Severity) -> int:
        return sum(finding.severity == severity for finding in self)


class Picture(NamedTuple):
    where: str  # "image 17", "line 3"
    file: str  # below the root, as written
    size: tuple[int, int]  # (height, width) in pixels as written; 0, 0 where it is not


class Box(NamedTuple):
    picture: int  # number of the picture it is in
    where: str  # "annotation 25"
    numbers: tuple[float, float, float, float]  # as written
    label: int  # number of the class or phrase it shows
    crowd: bool = False


@dataclass
class Reading:
    """A data set as its files have it; what could not be read is left out, and among the findings.

    The first `num_classes` of the names are classes, which every prompt names; the others are phrases of one picture.
    """

    set: str
    title: str
    form: str  # "coco": decides what the numbers of a box mean
    root: Path
    task: str = "detection"
    vocabulary: VocabularyConfig | None = None
    num_classes: int = 0
    names: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    keys: list[str] | None = None  # of the pictures, see vg.data.source.HasImageKeys; None: made from their files
    load: Callable[[int], np.ndarray] | None = None  # [H, W, 3] uint8 of a picture that is not in a file of its own

    @property
    def trains(self) -> bool:
        """Whether it is the training set, or a part of it."""
        return self.set.split(".")[0] == "train"

    def example(self, box: Box, says: object = None) -> str:
        """ "annotation 25 (a.jpg, cat): [1, 2, 3, 4]": where a box is, and what it says."""
        numbers = "[" + ", ".join(f"{number:g}" for number in box.numbers) + "]"
        name = f", {self.names[box.label]}" if 0 <= box.label < len(self.names) else ""
        return f"{box.where} ({self.pictures[box.picture].file}{name}): {numbers if says is None else says}"
