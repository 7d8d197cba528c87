"""What is official about the RefCOCO family: its data sets, who split them, and how large every split is."""

from __future__ import annotations

import re
from typing import NamedTuple

from vg.errors import DataError


class Counts(NamedTuple):
    """How much there is in one split."""

    expressions: int
    objects: int | None = None  # described ones, which RefCOCO calls refs

    def __str__(self) -> str:
        of = f" of {self.objects:,} objects" if self.objects else ""
        return f"{self.expressions:,} expressions{of}"


# Yu et al. 2016 (arXiv 1608.00272) and Mao et al. 2016 (arXiv 1511.02283), as refs(*).p of the refer toolbox hold them.
COUNTS: dict[tuple[str, str], dict[str, Counts]] = {
    ("RefCOCO", "unc"): {
        "train": Counts(120624, 42404),
        "val": Counts(10834, 3811),
        "testA": Counts(5657, 1975),
        "testB": Counts(5095, 1810),
    },
    ("RefCOCO+", "unc"): {
        "train": Counts(120191, 42278),
        "val": Counts(10758, 3805),
        "testA": Counts(5726, 1975),
        "testB": Counts(4889, 1798),
    },
    ("RefCOCOg", "umd"): {
        "train": Counts(80512, 42226),
        "val": Counts(4896, 2573),
        "test": Counts(9602, 5023),
    },
    ("RefCOCOg", "google"): {"train": Counts(85474), "val": Counts(9536)},
    ("RefCOCO-M", "unc"): {"val": Counts(5598, 2080)},
}
_NAMES = {"refcoco": "RefCOCO", "refcoco+": "RefCOCO+", "refcocoplus": "RefCOCO+", "refcoco_plus": "RefCOCO+"}
_NAMES |= {"refcocog": "RefCOCOg", "refcoco-m": "RefCOCO-M"}
_NAME = re.compile(rf"({'|'.join(map(re.escape, sorted(_NAMES, reverse=True)))})(?:[-_](unc|umd|google))?")


def identify(name: str) -> list[tuple[str, str]]:
    """The official data sets, each with its partition, that a name stands for: "jxu124/refcoco" -> RefCOCO of unc.

    None for other names; several where a name leaves the partition open.
    """
    chosen = re.search(r"\((.+)\)$", name)  # of several data sets in one place
    match = _NAME.fullmatch(chosen[1] if chosen else name.split("@")[0].split("/")[-1].lower())
    if not match:
        return []
    return [key for key in COUNTS if key[0] == _NAMES[match[1]] and match[2] in (None, key[1])]


def check_counts(name: str, split: str, found: Counts, strict: bool = True) -> tuple[str | None, bool | None]:
    """Compare a split under an official name with what was published.

    Args:
        name: of the data set, see `identify`.
        split: under our name for it.
        found: how much it holds.
        strict: other counts are an error; else they make it a part or a version, which is not the official split.

    Returns:
        The partition, and whether it is the whole official split; None for what the name does not tell.

    Raises:
        DataError: an official name, but other counts.
    """
    known = {partition: COUNTS[data, partition].get(split) for data, partition in identify(name)}
    only = next(iter(known)) if len(known) == 1 else None
    published = {partition: counts for partition, counts in known.items() if counts is not None}
    for partition, counts in published.items():
        if found.expressions == counts.expressions and (not found.objects or counts.objects in (None, found.objects)):
            return partition, True
    if not published or not strict:
        return only, False if published else None
    expected = " or ".join(f"{counts} ({partition})" for partition, counts in published.items())
    raise DataError(
        f"{name} ({split}) has {found}, but the official split of that name has {expected}: fetch it again if it is "
        "incomplete; if it is meant to be a part or another version, give a local copy a name of its own (refcoco_mini)"
    )
