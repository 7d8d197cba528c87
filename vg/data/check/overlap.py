"""What can be wrong between sets: the same picture in two of them, and classes that only the evaluation has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from vg.data.check.findings import Findings, Reading, Severity
from vg.data.check.images import Look
from vg.data.check.phrases import plain_name
from vg.data.images import image_key


def check_copies(reading: Reading, looks: Mapping[int, Look], findings: Findings) -> None:
    """Files of one set that are the same byte for byte."""
    files: dict[bytes, list[str]] = defaultdict(list)
    for number, each in looks.items():
        if each.digest:
            files[each.digest].append(reading.pictures[number].file)
    groups = [" = ".join(sorted(set(group))) for group in files.values() if len(set(group)) > 1]
    mend = "keep one of each, with all boxes"
    findings.add("warning", reading.set, "pictures that are there under several names", mend, groups)


def check_pair(train: Reading, other: Reading, looks: Mapping[str, Mapping[int, Look]], findings: Findings) -> None:
    """Pictures that an evaluation set shares with a training set."""
    names = set(_keys(train))
    shared = [number for number, key in enumerate(_keys(other)) if key in names]
    examples = [other.pictures[number].file for number in shared]
    mend = "take another split, or set data.drop_overlap=true, which leaves them out of training"
    what = f"pictures that are also in {train.set}: what is measured on them is too good"
    findings.add("warning", other.set, what, mend, examples)
    digests = {
        each.digest: train.pictures[number].file for number, each in looks.get(train.set, {}).items() if each.digest
    }
    copies = [
        f"{other.pictures[number].file} is {digests[each.digest]} of {train.set}"
        for number, each in looks.get(other.set, {}).items()
        if each.digest in digests and number not in set(shared)
    ]
    what = f"pictures that are also in {train.set} under another name: what is measured on them is too good"
    findings.add("warning", other.set, what, f"remove them from {train.set}", copies)


def _keys(reading: Reading) -> list[str]:
    if reading.keys is None:
        reading.keys = [image_key(picture.file, reading.root) for picture in reading.pictures]
    return reading.keys


def check_classes(trained: Sequence[Reading], other: Reading, findings: Findings) -> None:
    """Classes with boxes in an evaluation set that have none in any training set."""
    known, judged = set[str]().union(*map(_shown, trained)), _shown(other)
    if not known or not all(each.num_classes for each in trained):
        return  # phrases may name anything
    near = {plain_name(name): name for name in known}
    unknown = sorted(judged - known)
    examples = [
        name + (f" (spelled {near[plain_name(name)]!r} in training)" if plain_name(name) in near else "")
        for name in unknown
    ]
    is_other_task = not judged & known and not any("spelled" in example for example in examples)
    mend = "nothing, if the set is there to measure what else the model knows; else mend names or splits"
    severity: Severity = "note" if is_other_task else "warning"
    findings.add(severity, other.set, "classes that training has no box of", mend, examples)


def _shown(reading: Reading) -> set[str]:
    """The classes that have boxes."""
    return {reading.names[box.label] for box in reading.boxes if box.label < reading.num_classes}
