"""Runs all checks on the data sets of a run, and keeps what they found."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vg.data.check.boxes import Boxes, check_boxes
from vg.data.check.findings import Findings, Reading
from vg.data.check.folders import read_samples, read_voc, read_yolo, spread
from vg.data.check.images import Look, look_through, sizes_of
from vg.data.check.overlap import check_classes, check_copies, check_pair
from vg.data.check.phrases import CountTokens, check_words, num_words
from vg.data.check.reading import read_coco, read_odvg
from vg.data.detection.coco import CocoConfig
from vg.data.detection.odvg import OdvgConfig
from vg.data.detection.voc import VocConfig
from vg.data.detection.yolo import YoloConfig
from vg.data.images import find_image, read_image
from vg.data.mixture import MixtureConfig, SourceConfig
from vg.errors import BadSampleError, DataError

_UNREADABLE = "a set that training cannot read"


@dataclass
class Examined:
    """One data set after all checks."""

    reading: Reading
    boxes: Boxes
    looks: dict[int, Look]  # the pictures that were opened


@dataclass
class Diagnosis:
    """All data sets, and what is wrong with them."""

    sets: list[Examined]
    findings: Findings

    def pictures(self, number: int) -> list[tuple[str, np.ndarray, np.ndarray, list[str]]]:
        """Pictures to look at: those of findings first, then others, evenly spaced, the same number of each set.

        Returns:
            Up to `number` of: what it is, image [H, W, 3] uint8, boxes [N, 4] xyxy pixels, their names.
        """
        shown: list[tuple[str, np.ndarray, np.ndarray, list[str]]] = []
        for each in self.sets:
            room, reading = number // len(self.sets), each.reading
            reasons = {
                picture: finding.what
                for finding in reversed(self.findings.ranked())
                if finding.set == reading.set and finding.severity != "note"
                for picture in finding.pictures[:2]
            }
            chosen = dict.fromkeys([*list(reasons)[: room // 2], *spread(len(reading.pictures), room)])
            for picture in list(chosen)[:room]:
                try:
                    image = _image(reading, picture)
                except (BadSampleError, OSError):
                    continue  # it is among the findings
                own = np.flatnonzero(each.boxes.owners == picture)
                edges = each.boxes.xyxy[own]
                good = np.isfinite(edges).all(axis=1) & (edges[:, 2:] >= edges[:, :2]).all(axis=1)
                names = [reading.names[label] for label in each.boxes.labels[own[good]].tolist()]
                title = f"{reading.set}: {reasons.get(picture, reading.pictures[picture].file)}"
                shown.append((title, image, edges[good], names))
        return shown


def diagnose(
    sets: Mapping[str, SourceConfig],
    max_tokens: int,
    count_tokens: CountTokens | None = None,
    quick: int | None = None,
) -> Diagnosis:
    """Check data sets, on their own and against the one called train.

    Args:
        sets: by name; parts of a mixture become sets of their own.
        max_tokens: what a prompt of the model holds.
        count_tokens: the number of tokens of each phrase; by default the least there can be is taken.
        quick: read so many pictures of each set, instead of all.
    """
    findings, examined = Findings(), []
    for name, config in _flat(sets).items():
        reading, looks = _read(name, config, findings, quick)
        if reading.form != "samples":
            looks = look_through(reading, list(spread(len(reading.pictures), quick)), findings)
        boxes = check_boxes(reading, sizes_of(reading, looks), findings)
        if not reading.pictures:
            findings.add("error", name, "no picture at all", "see the other findings", [reading.title])
        elif not reading.boxes:
            findings.add("error", name, "no box at all", "annotate it, or take the right file", [reading.title])
        counter = count_tokens or num_words
        check_words(reading, boxes, counter, count_tokens is not None, max_tokens, findings)
        check_copies(reading, looks, findings)
        _check_loader(reading, config, findings)
        examined.append(Examined(reading, boxes, looks))
    looks_of = {each.reading.set: each.looks for each in examined}
    readings = [each.reading for each in examined]
    trained = [each for each in readings if each.trains]
    for other in readings:
        if not other.trains:
            for train in trained:
                check_pair(train, other, looks_of, findings)
            check_classes(trained, other, findings)
    return Diagnosis(examined, findings)


def _flat(sets: Mapping[str, SourceConfig]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, config in sets.items():
        parts = config.datasets if isinstance(config, MixtureConfig) else None
        flat |= {name: config} if parts is None else {f"{name}.datasets.{i}": part for i, part in enumerate(parts)}
    return flat


def _read(name: str, config: Any, findings: Findings, quick: int | None) -> tuple[Reading, dict[int, Look]]:
    path = Path(str(getattr(config, "path", "")))
    vocabulary = getattr(config, "vocabulary", None)
    reading = Reading(name, f"{config.name} {path}".strip(), config.name, path, vocabulary=vocabulary)
    try:
        if isinstance(config, CocoConfig | OdvgConfig):
            folder = path.resolve().parent
            if folder.name == "annotations" and isinstance(config, CocoConfig):
                folder = folder.parent
            reading.root = Path(config.image_root) if config.image_root is not None else folder
            read_coco(config, reading, findings) if isinstance(config, CocoConfig) else read_odvg(
                config, reading, findings
            )
        elif isinstance(config, VocConfig):
            reading.root = path / "JPEGImages" if (path / "JPEGImages").is_dir() else path
            read_voc(config, reading, findings)
        elif isinstance(config, YoloConfig):
            read_yolo(config, reading, findings)
        else:
            reading.form = "samples"
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                source = config.build()
            reading.task = source.provenance.task
            reading.title = f"{source.provenance.data} ({source.provenance.split})"
            told = [str(each.message) for each in said if each.category is UserWarning]
            findings.add("warning", name, "said by the data set itself", "see there", told)
            read_samples(source, reading, findings, quick)
    except (DataError, OSError) as error:
        findings.add("error", name, _UNREADABLE, "see the message", [str(error)])
    return reading, {}


def _check_loader(reading: Reading, config: Any, findings: Findings) -> None:
    """What training would refuse for a reason that no check has seen is an error, too."""
    if reading.form == "samples" or any(each.severity == "error" and each.set == reading.set for each in findings):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config.build()
        except (DataError, ValueError, TypeError, KeyError, OSError) as error:
            findings.add("error", reading.set, _UNREADABLE, "see the message", [str(error)])


def _image(reading: Reading, picture: int) -> np.ndarray:
    if reading.load is not None:
        return reading.load(picture)
    file = find_image(reading.pictures[picture].file, reading.root)
    return read_image(file, str(file), upright=reading.form == "yolo")
