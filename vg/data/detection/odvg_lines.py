"""Parser of ODVG json lines, which are described in vg.data.detection.odvg, and of label maps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vg.data.detection.annotations import to_boxes, to_size
from vg.data.detection.issues import Issues
from vg.errors import DataError

_LABEL_MAP_FIX = "use the label_map that belongs to the file (labels count from 0, ids of COCO from 1)"


class LabelMap(NamedTuple):
    names: list[str]  # of the classes
    index_of_label: dict[int, int]  # label in a line -> index of the class


class Line(NamedTuple):
    """One line; `labels` are indices into `phrases`, or of classes if there are none."""

    location: str  # "line 3"
    file: str
    size: tuple[int, int]  # (height, width) in pixels as in Annotations
    phrases: tuple[str, ...]
    boxes: list[list[float]]  # [N, 4] xyxy
    labels: list[int]  # N
    box_locations: list[str]  # N, "line 3, region 1"


def read_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield line number (from 1), first byte and content of each line that is not blank."""
    start = 0
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield number, start, text
                start += len(text)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; path is a .jsonl file in ODVG format") from error


def read_label_map(path: str | None, issues: Issues) -> LabelMap | None:
    if path is None:
        return None
    try:
        names = {int(label): str(name) for label, name in json.loads(Path(path).read_bytes()).items()}
    except (OSError, ValueError, AttributeError) as error:
        fix = 'expected a json file such as {"0": "person", "1": "bicycle"}'
        issues.add("error", "label_map cannot be read", fix, [f"{path}: {error}"])
        return None
    labels = sorted(names)
    if labels != list(range(len(labels))):
        fix = "none needed by vg; other programs expect labels that count from 0 without gaps"
        example = f"{path}: {len(labels)} labels from {labels[0]} to {labels[-1]}"
        issues.add("warning", "labels that do not count from 0 without gaps", fix, [example])
    return LabelMap([names[label] for label in labels], {label: index for index, label in enumerate(labels)})


def parse_line(text: bytes, location: str, label_map: LabelMap | None, issues: Issues) -> Line | None:
    """Parse one line; items that cannot be used are reported and left out, None if that is the whole line."""
    row = parse_json(text, location, issues)
    parsed = None if row is None else parse_items(row, location, label_map, issues)
    if row is None or parsed is None:
        return None
    key, items = parsed
    size = to_size(row.get("height"), row.get("width"))
    line = Line(location, str(row["filename"]), size, (), [], [], [])
    phrases: dict[str, tuple[int, str]] = {}  # in lower case -> index and phrase as written first
    for location, item in items.items():
        label: int | None = None
        if key == "grounding":
            if (phrase := _parse_phrase(item, row[key].get("caption"), location, issues)) is not None:
                label, _ = phrases.setdefault(phrase.casefold(), (len(phrases), phrase))
        elif label_map is not None:
            label = _parse_label(item, location, label_map, issues)
        for box in _parse_boxes(item, key, location, issues):
            if label is not None:
                line.boxes.append(box)
                line.labels.append(label)
                line.box_locations.append(location)
    return line._replace(phrases=tuple(phrase for _, phrase in phrases.values()))


def parse_json(text: bytes, location: str, issues: Issues) -> Mapping[str, Any] | None:
    try:
        row = json.loads(text)
        if isinstance(row, Mapping):
            return row
        reason = "not an object"
    except ValueError as error:
        reason = f"not JSON ({error})"
    _report_line(f"{location}: {text[:80].decode(errors='replace').strip()}: {reason}", issues)
    return None


def _report_line(example: str, issues: Issues) -> None:
    fix = "fix or remove them; a line has a filename, and detection with instances or grounding with regions"
    issues.add("error", "lines that are not valid ODVG", fix, [example])


def parse_items(
    row: Mapping[str, Any], location: str, label_map: LabelMap | None, issues: Issues
) -> tuple[str, dict[str, Mapping[str, Any]]] | None:
    """Return "detection" or "grounding", and the instances or regions by location; None if the line is invalid."""
    key, name = next(
        (pair for pair in (("detection", "instance"), ("grounding", "region")) if pair[0] in row), ("", "")
    )
    if "filename" not in row or not key:
        missing = "`detection` or `grounding`" if "filename" in row else "`filename`"
        _report_line(f"{location}: the keys are {sorted(row)}; {missing} is missing", issues)
        return None
    items = row[key].get(f"{name}s") if isinstance(row[key], Mapping) else None
    if not isinstance(items, list):
        _report_line(f"{location}: {key} is {str(row[key])[:80]}; it needs a list of {name}s", issues)
        return None
    if key == "detection" and label_map is None:
        fix = "set label_map to the json file that names the classes"
        issues.add("error", "numbered classes without a label map", fix, [location])
    if key == "grounding" and not items:
        issues.add("error", "captions without regions", "remove these lines: they have no phrase", [location])
    located = {f"{location}, {name} {index}": item for index, item in enumerate(items)}
    invalid = [f"{where}: {str(item)[:80]}" for where, item in located.items() if not isinstance(item, Mapping)]
    issues.add("error", "instances or regions that are not objects", "correct or remove them", invalid)
    return key, {where: item for where, item in located.items() if isinstance(item, Mapping)}


def _parse_label(item: Mapping[str, Any], location: str, label_map: LabelMap, issues: Issues) -> int | None:
    """Return the class of an instance; its category, if it has one, must be the name in the label map."""
    label, category = item.get("label"), str(item.get("category") or "")
    try:
        index = label_map.index_of_label[label]  # type: ignore[index]
    except (KeyError, TypeError):  # TypeError: a list cannot be hashed
        known = f"{min(label_map.index_of_label, default=0)} to {max(label_map.index_of_label, default=0)}"
        example = f"{location}: label {label!r}, category {category!r}; label_map has {known}"
        issues.add("error", "labels that are not in the label map", _LABEL_MAP_FIX, [example])
        return None
    name = label_map.names[index]
    if category and category.casefold().replace("_", " ") != name.casefold().replace("_", " "):
        example = f"{location}: label {label} is {category!r} here, {name!r} in the label map"
        issues.add("error", "labels that mean another class in the label map", _LABEL_MAP_FIX, [example])
    return index


def _parse_phrase(item: Mapping[str, Any], caption: object, location: str, issues: Issues) -> str | None:
    phrase, ranges = item.get("phrase"), item.get("tokens_positive")
    example = f"{location}: phrase {phrase!r} and no tokens_positive in the caption"
    if phrase is None and ranges and isinstance(caption, str):
        try:
            phrase = " ".join(caption[begin:end].strip() for begin, end in ranges)
        except (TypeError, ValueError):
            example = f"{location}: tokens_positive {str(ranges)[:80]}"
    if isinstance(phrase, str) and phrase.strip():
        return " ".join(phrase.split())
    issues.add("error", "regions without a phrase", "add it, or tokens_positive [[begin, end], ...]", [example])
    return None


def _parse_boxes(item: Mapping[str, Any], key: str, location: str, issues: Issues) -> list[list[float]]:
    """Return the box of an instance, or the boxes of a region, which has one or a list of them."""
    value = item.get("bbox")
    boxes = to_boxes(value if isinstance(value, list) and value and isinstance(value[0], list) else [value])  # [N, 4]
    invalid = np.isnan(boxes[:, 0])
    if invalid.any():
        fix = "write left, top, right, bottom in pixels, or remove the box"
        issues.add("error", "boxes that are not four finite numbers", fix, [f"{location}: bbox {repr(value)[:80]}"])
    if key == "detection" and len(boxes) > 1:
        fix = "write an instance for each box"
        issues.add("warning", "instances with several boxes, of which only the first is used", fix, [location])
        return boxes[:1][~invalid[:1]].tolist()
    return boxes[~invalid].tolist()
