"""The official datasets of the RefCOCO family: names, split providers and the size of every split."""

from __future__ import annotations

import re
from typing import NamedTuple

from vg.errors import DataError


class Counts(NamedTuple):
    """The size of one split."""

    expressions: int
    objects: int | None = None  # described objects, which RefCOCO calls refs

    def __str__(self) -> str:
        objects = f" of {self.objects:,} objects" if self.objects else ""
        return f"{self.expressions:,} expressions{objects}"


# Yu et al. 2016 (arXiv 1608.00272) and Mao et al. 2016 (arXiv 1511.02283); counts of the refer toolbox's refs(*).p.
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
_NAMES = {name.lower(): name for name, _ in COUNTS} | {"refcocoplus": "RefCOCO+", "refcoco_plus": "RefCOCO+"}
_NAME = re.compile(rf"({'|'.join(map(re.escape, sorted(_NAMES, reverse=True)))})(?:[-_](unc|umd|google))?")


def identify(name: str) -> list[tuple[str, str]]:
    """Return the official (dataset, partition) pairs that a name may mean: "jxu124/refcoco" -> [("RefCOCO", "unc")].

    Empty for other names; several pairs if the name does not determine the partition.
    """
    chosen = re.search(r"\((.+)\)$", name)  # one of several datasets at one path
    match = _NAME.fullmatch(chosen[1] if chosen else name.split("@")[0].split("/")[-1].lower())
    if not match:
        return []
    return [key for key in COUNTS if key[0] == _NAMES[match[1]] and match[2] in (None, key[1])]


def check_counts(name: str, split: str, found: Counts, strict: bool = True) -> tuple[str | None, bool | None]:
    """Compare the size of a split with the published one, if the dataset has an official name (see `identify`).

    Returns:
        The partition, and whether this is the complete official split; None where the name does not determine it.

    Raises:
        DataError: if `strict`, an official name with another size; otherwise it counts as a subset or another version.
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
        f"{name} ({split}) has {found}, but the official split of that name has {expected}: download it again if it is "
        "incomplete; for a subset or another version, give a local copy a name of its own (refcoco_mini)"
    )
