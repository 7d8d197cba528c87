"""Reads COCO json and ODVG lines without ever giving up: a wrong row becomes a finding, and the rest is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vg.data.check.findings import Box, Findings, Picture, Reading
from vg.data.detection.coco import CocoConfig
from vg.data.detection.odvg import OdvgConfig

REMOVE = "correct or remove it"


def four_numbers(value: object) -> tuple[float, float, float, float] | None:
    """A box as it is written, if it is one."""
    if not isinstance(value, list | tuple) or len(value) != 4:
        return None
    if not all(isinstance(number, int | float) and abs(number) < 1e15 for number in value):
        return None
    left, top, third, fourth = map(float, value)
    return left, top, third, fourth


def size_of(row: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) as written, 0 where that is no number; what no picture can have, such as -3, becomes -1."""
    values = (row.get("height"), row.get("width"))
    sides = [int(side) if isinstance(side, int | float) and abs(side) < math.inf else 0 for side in values]
    height, width = (side if 0 <= side < 10**9 else -1 for side in sides)
    return height, width


def _known(value: object) -> int | str:
    """An id that can be looked up, whatever is written there."""
    return value if isinstance(value, int | str) else repr(value)


def read_coco(config: CocoConfig, reading: Reading, findings: Findings) -> None:
    """The numbers of a box are x, y, width, height in pixels."""
    set = reading.set
    try:
        document = json.loads(Path(config.path).read_bytes())
    except (OSError, ValueError) as error:
        findings.add(
            "error", set, "a file that cannot be read", "mend its path, or the file", [f"{config.path}: {error}"]
        )
        return
    parts: dict[str, list[Any]] = {}
    for part in ("categories", "images", "annotations"):
        value = document.get(part) if isinstance(document, Mapping) else None
        parts[part] = value if isinstance(value, list) else []
        if not isinstance(value, list):
            mend = "take the file with images, annotations and categories; a list of results is not one"
            findings.add("error", set, "a part of the file is missing", mend, [f"{config.path} has no list of {part}"])
    labels: dict[int | str, int] = {}
    for number, row in enumerate(parts["categories"]):
        if not isinstance(row, Mapping) or "id" not in row or not str(row.get("name") or "").strip():
            wheres = [f"category {number}: {str(row)[:80]}"]
            findings.add("error", set, "classes without id or name", "add both", wheres)
        elif _known(row["id"]) in labels:
            wheres = [f"category {number}: {str(row)[:80]}"]
            findings.add("error", set, "classes with the id of another", "renumber them", wheres)
        else:
            labels[_known(row["id"])] = len(reading.names)
            reading.names.append(str(row["name"]))
    reading.num_classes = len(reading.names)
    numbers = _coco_images(parts["images"], reading, findings)
    for place, row in enumerate(parts["annotations"]):
        if not isinstance(row, Mapping):
            wheres = [f"entry {place} of annotations: {str(row)[:80]}"]
            findings.add("error", set, "annotations that are no objects", "remove them", wheres)
            continue
        where, values = f"annotation {row.get('id', f'number {place}')}", four_numbers(row.get("bbox"))
        picture = numbers.get(_known(row.get("image_id")))
        label = labels.get(_known(row.get("category_id")))
        for key, found in (("image_id", picture), ("category_id", label)):
            if found is None:
                part = "images" if key == "image_id" else "categories"
                mend = f"add it to {part} (numbers and texts differ: 7 is not '7'), or remove the annotation"
                what = f"annotations whose {key} is not among the {part}"
                findings.add("error", set, what, mend, [f"{where}: {key} {row.get(key)!r}"])
        if values is None:
            wheres = [f"{where}: bbox {str(row.get('bbox'))[:80]}"]
            findings.add("error", set, "boxes that are not four numbers", REMOVE, wheres)
        elif picture is not None and label is not None:
            reading.boxes.append(Box(picture, where, values, label, bool(row.get("iscrowd"))))


def _coco_images(rows: list[Any], reading: Reading, findings: Findings) -> dict[int | str, int]:
    """Id -> number of the picture."""
    seen: dict[int | str, int] = {}
    files: dict[str, str] = {}
    for place, row in enumerate(rows):
        name = row.get("file_name") if isinstance(row, Mapping) else None
        if isinstance(row, Mapping) and not name:
            name = "/".join(str(row.get("coco_url") or "").split("/")[-2:])  # as in LVIS
        if not isinstance(row, Mapping) or "id" not in row or not name:
            wheres = [f"entry {place} of images: {str(row)[:80]}"]
            findings.add("error", reading.set, "pictures without id or file_name", "add both", wheres)
            continue
        where = f"image {_known(row['id'])}"
        if _known(row["id"]) in seen:
            mend = "renumber them, and their annotations"
            findings.add("error", reading.set, "pictures with the id of another", mend, [f"{where}: {name}"])
            continue
        if str(name) in files:
            mend = "make them one, with the boxes of both: each now lacks the boxes of the other"
            wheres = [f"{where} and {files[str(name)]}: {name}"]
            findings.add("warning", reading.set, "pictures that are listed twice", mend, wheres)
        seen[_known(row["id"])] = len(reading.pictures)
        files.setdefault(str(name), where)
        reading.pictures.append(Picture(where, str(name), size_of(row)))
    return seen


def read_odvg(config: OdvgConfig, reading: Reading, findings: Findings) -> None:
    """The numbers of a box are left, top, right, bottom in pixels."""
    labels = _label_map(config, reading, findings)
    phrases: dict[str, int] = {}
    try:
        lines = Path(config.path).read_bytes().splitlines()
    except OSError as error:
        findings.add(
            "error",
            reading.set,
            "a file that cannot be read",
            "mend its path, or the file",
            [f"{config.path}: {error}"],
        )
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            row = json.loads(line)
            kind = next(key for key in ("detection", "grounding") if isinstance(row.get(key), Mapping))
            things = row[kind]["instances" if kind == "detection" else "regions"]
            reading.pictures.append(Picture(where, str(row["filename"]), size_of(row)))
            things = list(things)
        except (AttributeError, ValueError, KeyError, TypeError, StopIteration):
            what = "lines that are no ODVG"
            mend = "a line is an object with filename, and detection with instances or grounding with regions"
            findings.add("error", reading.set, what, mend, [f"{where}: {line[:80].decode(errors='replace')}"])
            continue
        for place, thing in enumerate(things):
            here = f"{where}, {'instance' if kind == 'detection' else 'region'} {place}"
            if not isinstance(thing, Mapping):
                wheres = [f"{here}: {str(thing)[:80]}"]
                findings.add("error", reading.set, "instances or regions that are no objects", REMOVE, wheres)
                continue
            if kind == "detection":
                label = _label(thing, labels, reading, findings, here)
            else:
                phrase = _phrase(thing, row[kind].get("caption"))
                label = None if phrase is None else phrases.setdefault(phrase.casefold(), len(reading.names))
                if phrase is None:
                    mend = "give each a phrase, or tokens_positive in the caption"
                    wheres = [f"{here}: {str(thing)[:80]}"]
                    findings.add("error", reading.set, "regions without words", mend, wheres)
                elif label == len(reading.names):
                    reading.names.append(phrase)
            value = thing.get("bbox")
            for each in value if isinstance(value, list) and value and isinstance(value[0], list) else [value]:
                numbers = four_numbers(each)
                if numbers is None:
                    wheres = [f"{here}: bbox {str(each)[:80]}"]
                    findings.add("error", reading.set, "boxes that are not four numbers", REMOVE, wheres)
                elif label is not None:
                    reading.boxes.append(Box(len(reading.pictures) - 1, here, numbers, label))


def _label_map(config: OdvgConfig, reading: Reading, findings: Findings) -> dict[object, int]:
    """Label of a line -> its class; fills the names of the reading."""
    if config.label_map is None:
        return {}
    try:
        names = {int(label): str(name) for label, name in json.loads(Path(config.label_map).read_bytes()).items()}
    except (OSError, ValueError, AttributeError) as error:
        mend = 'it is a json file such as {"0": "person", "1": "bicycle"}'
        wheres = [f"{config.label_map}: {error}"]
        findings.add("error", reading.set, "a label map that cannot be read", mend, wheres)
        return {}
    if sorted(names) != list(range(len(names))):
        mend = "vg takes them as they are; other programs want labels that count from 0 without gaps"
        wheres = [f"{config.label_map}: {len(names)} labels from {min(names)} to {max(names)}"]
        findings.add("warning", reading.set, "labels do not count from 0 without gaps", mend, wheres)
    reading.names += [names[label] for label in sorted(names)]
    reading.num_classes = len(names)
    return {label: number for number, label in enumerate(sorted(names))}


def _label(
    thing: Mapping[str, Any], labels: Mapping[object, int], reading: Reading, findings: Findings, where: str
) -> int | None:
    label, category = thing.get("label"), thing.get("category")
    number = labels.get(label) if isinstance(label, int) else None
    if number is None:
        what = "labels that the label map lacks" if labels else "numbered classes without a label map"
        mend = "labels count from 0, ids of COCO from 1; take the label_map that belongs to the file"
        findings.add("error", reading.set, what, mend, [f"{where}: label {label!r}, category {category!r}"])
    elif category and str(category).casefold().replace("_", " ") != reading.names[number].casefold().replace("_", " "):
        wheres = [f"{where}: label {label} is {category!r} here, {reading.names[number]!r} in the label map"]
        mend = "take the label_map that belongs to the file (labels count from 0, ids of COCO from 1)"
        findings.add("error", reading.set, "labels that mean another class in the label map", mend, wheres)
    return number


def _phrase(region: Mapping[str, Any], caption: object) -> str | None:
    phrase = region.get("phrase")
    if phrase is None and isinstance(caption, str):
        try:
            phrase = " ".join(caption[begin:end].strip() for begin, end in region["tokens_positive"])
        except (KeyError, TypeError, ValueError):
            return None
    return " ".join(phrase.split()) or None if isinstance(phrase, str) else None
