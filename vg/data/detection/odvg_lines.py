"""Parser of ODVG json lines, which are described in vg.data.detection.odvg, and of label maps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from vg.data.detection.annotations import AnnotatedBox, AnnotatedImage, to_box, to_size
from vg.data.detection.issues import Issues
from vg.files import read_json
from vg.types import Caption

Spans = tuple[tuple[int, int], ...]
# Label in a line, or name of a class that no line has -> index and name of the class, in the order of the indices.
LabelMap = Mapping[int | str, tuple[int, str]]

_ITEMS = {"detection": "instances", "grounding": "regions"}
_LABEL_MAP_FIX = "use the label_map that belongs to the file (labels count from 0, ids of COCO from 1)"


def read_label_map(path: str | None, issues: Issues) -> LabelMap | None:
    if path is None:
        return None
    try:
        names = {int(label): str(name) for label, name in read_json(Path(path), dict).items()}
    except (OSError, ValueError) as error:
        fix = 'expected a json file such as {"0": "person", "1": "bicycle"}'
        issues.add("error", "label_map cannot be read", fix, [f"{path}: {getattr(error, 'strerror', error)}"])
        return None
    labels = sorted(names)
    if labels != list(range(len(labels))):
        fix = "none needed by vg; other programs expect labels that count from 0 without gaps"
        example = f"{path}: {len(labels)} labels from {labels[0]} to {labels[-1]}"
        issues.add("warning", "labels that do not count from 0 without gaps", fix, [example])
    return {label: (index, names[label]) for index, label in enumerate(labels)}


def read_categories(
    lines: Iterable[tuple[bytes, str]], issues: Issues, classes: Sequence[str] | None = None
) -> LabelMap | None:
    """Return the label map that the instances of (content, location) contain; None if there is no class.

    Args:
        classes: the categories to expect, in the order of the classes.
    """
    names: dict[int, str] = {}
    known = dict.fromkeys(classes or [])
    for text, location in lines:
        if b'"category"' not in text:
            continue
        try:
            instances = json.loads(text)["detection"]["instances"]
            pairs = [(item.get("label"), item.get("category")) for item in instances]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue  # reported where the line is parsed
        for label, category in pairs:
            if type(label) is not int or not category or not isinstance(category, str):
                continue
            if names.setdefault(label, category) != category:
                fix = 'give each class one label, or set label_map to a json file such as {"0": "person"}'
                example = f"{location}: label {label} is {category!r} here, {names[label]!r} before"
                issues.add("error", "labels with several categories", fix, [example])
            if known and category not in known:
                fix = f"add it to classes ({', '.join([*known][:10])}), or correct the name"
                issues.add("error", "instances of an unknown class", fix, [f"{location}: {category!r}"])
    if known:
        label_of = {name: label for label, name in names.items()}
        return {label_of.get(name, name): (index, name) for index, name in enumerate(known)}
    return {label: (index, names[label]) for index, label in enumerate(sorted(names))} or None


class LineParser:
    """Parses lines of one file; items that cannot be used are reported and left out.

    Args:
        whole: captions are prompts: equal spans are one phrase, named by their words. Otherwise equal phrases are one.
        exact: without a caption, phrases that differ in case or white space only are different phrases.
    """

    def __init__(self, label_map: LabelMap | None, issues: Issues, whole: bool = False, exact: bool = False) -> None:
        self.names = [name for _, name in (label_map or {}).values()]  # then the phrases, as first written
        self.num_classes = len(self.names)
        self._label_map = label_map
        self._label_of_phrase: dict[str, int] = {}  # case-folded unless exact
        self._issues = issues
        self._whole = whole
        self._exact = exact

    def parse(self, text: bytes, location: str) -> AnnotatedImage | None:
        """Parse one line, xyxy boxes; None if it cannot be used."""
        row = self.row(text, location)
        return None if row is None else self.parse_row(row, location)

    def parse_row(self, row: Mapping[str, Any], location: str) -> AnnotatedImage | None:
        """Parse one decoded line, see `parse`."""
        if (found := self.items(row, location)) is None:
            return None
        key, items = found
        file = str(row["filename"])
        image = AnnotatedImage(file, file, location, to_size(row.get("height"), row.get("width")), [])
        caption = str(row[key].get("caption") or "")
        known: dict[Spans, int] = {}
        for where, item in items.items():
            label = self._label(item, where) if key == "detection" else self._phrase(item, caption, known, where)
            boxes = self._boxes(item, key, where)
            if label is not None:
                image.boxes.extend(AnnotatedBox(label, box, where) for box in boxes)
        return image._replace(caption=Caption(caption, tuple(known))) if known else image

    def row(self, text: bytes, location: str) -> dict[str, Any] | None:
        """Decode one line; None if it is not a JSON object."""
        try:
            row = json.loads(text)
            if isinstance(row, dict):
                return row
            reason = "not an object"
        except (ValueError, RecursionError) as error:
            reason = f"not JSON ({error})"
        self._invalid_line(f"{location}: {text[:80].decode(errors='replace').strip()}: {reason}")
        return None

    def items(self, row: Mapping[str, Any], location: str) -> tuple[str, dict[str, dict[str, Any]]] | None:
        """Return "detection" or "grounding", and instances or regions by location; None if the row is invalid."""
        key = next((key for key in _ITEMS if key in row), "")
        if "filename" not in row or not key:
            missing = "`detection` or `grounding`" if "filename" in row else "`filename`"
            self._invalid_line(f"{location}: the keys are {sorted(row)}; {missing} is missing")
            return None
        items = row[key].get(_ITEMS[key]) if isinstance(row[key], dict) else None
        if not isinstance(items, list):
            self._invalid_line(f"{location}: {key} is {str(row[key])[:80]}; it needs a list of {_ITEMS[key]}")
            return None
        if key == "detection" and self._label_map is None:
            fix = 'set label_map to a json file such as {"0": "person"}, or give every instance a category'
            self._issues.add("error", "numbered classes without a label map", fix, [location])
        if key == "grounding" and not items:
            fix = "remove these lines: they have no phrase"
            self._issues.add("error", "captions without regions", fix, [location])
        located = {f"{location}, {_ITEMS[key][:-1]} {index}": item for index, item in enumerate(items)}
        invalid = [f"{where}: {str(item)[:80]}" for where, item in located.items() if not isinstance(item, dict)]
        self._issues.add("error", "instances or regions that are not objects", "correct or remove them", invalid)
        return key, {where: item for where, item in located.items() if isinstance(item, dict)}

    def _invalid_line(self, example: str) -> None:
        fix = "fix or remove them; a line has a filename, and detection with instances or grounding with regions"
        self._issues.add("error", "lines that are not valid ODVG", fix, [example])

    def _label(self, item: Mapping[str, Any], location: str) -> int | None:
        """Return the class of an instance; its category, if it has one, must be the name in the label map."""
        if self._label_map is None:
            return None
        label, category = item.get("label"), str(item.get("category") or "")
        try:
            index, name = self._label_map[label]  # type: ignore[index]
        except (KeyError, TypeError):  # TypeError: a list cannot be hashed
            labels = [label for label in self._label_map if isinstance(label, int)]
            known = f"{min(labels, default=0)} to {max(labels, default=0)}"
            example = f"{location}: label {label!r}, category {category!r}; label_map has {known}"
            self._issues.add("error", "labels that are not in the label map", _LABEL_MAP_FIX, [example])
            return None
        if category and category.casefold().replace("_", " ") != name.casefold().replace("_", " "):
            example = f"{location}: label {label} is {category!r} here, {name!r} in the label map"
            self._issues.add("error", "labels that mean another class in the label map", _LABEL_MAP_FIX, [example])
        return index

    def _phrase(self, item: Mapping[str, Any], caption: str, known: dict[Spans, int], location: str) -> int | None:
        """Return the label of the phrase of a region.

        Args:
            known: the labels of the former regions by their spans, to which this one is added if captions are whole.
        """
        phrase = item.get("phrase")
        if (spans := self._spans(item, caption, location)) is None:
            return None
        words = " ".join(caption[begin:end].strip() for begin, end in spans)
        if self._whole:
            return self._label_of_spans(spans, words, known, f"{location}: phrase {phrase!r}, {caption[:80]!r}")
        if phrase is None and spans:
            phrase = words
        elif isinstance(phrase, str) and spans and _letters(phrase) != _letters(words):
            fix = "correct one of them; the phrase is used, and tokens_positive only where there is none"
            example = f"{location}: phrase {phrase[:80]!r}, tokens_positive {words[:80]!r}"
            self._issues.add("warning", "phrases that differ from the text at their tokens_positive", fix, [example])
        exact = self._exact and not caption
        if not isinstance(phrase, str) or not (words := " ".join(phrase.split())):
            fix = "add it, or tokens_positive [[begin, end], ...]"
            example = f"{location}: phrase {item.get('phrase')!r} and no tokens_positive in the caption"
            self._issues.add("error", "regions without a phrase", fix, [example])
            return None
        return self._label_of_name(phrase if exact else words, exact)

    def _label_of_spans(self, spans: Spans, words: str, known: dict[Spans, int], example: str) -> int | None:
        """Return the label of spans of a whole caption; the second phrase "a man" of a caption is named "a man (2)"."""
        if not spans:
            fix = "add tokens_positive [[begin, end], ...] in characters of the caption, or set captions: phrases"
            self._issues.add("error", "regions without tokens_positive", fix, [example])
            return None
        if not any(map(str.isalnum, words)):
            fix = "correct or remove them: tokens_positive is [[begin, end], ...] of words of the caption"
            self._issues.add("error", "spans without a letter or digit", fix, [f"{example}: {words!r}"])
            return None
        key = tuple(sorted(set(spans)))
        if key not in known:
            words = " ".join(words.split())
            names = chain([words], (f"{words} ({number})" for number in count(2)))
            known[key] = next(label for label in map(self._label_of_name, names) if label not in known.values())
        return known[key]

    def _label_of_name(self, name: str, exact: bool = False) -> int:
        label = self._label_of_phrase.setdefault(name if exact else name.casefold(), len(self.names))
        if label == len(self.names):
            self.names.append(name)
        return label

    def _spans(self, item: Mapping[str, Any], caption: str, location: str) -> Spans | None:
        """Return the (begin, end) characters of the caption that name a region; None if any is not in the caption."""
        spans = item.get("tokens_positive") or []
        for span in spans if isinstance(spans, list) else [spans]:
            ends = span if isinstance(span, list) and [*map(type, span)] == [int, int] else (0, 0)
            if not 0 <= ends[0] < ends[1] <= len(caption):
                fix = "correct or remove them: tokens_positive is [[begin, end], ...] in characters of the caption"
                example = f"{location}: tokens_positive {str(spans)[:80]}, the caption has {len(caption)} characters"
                self._issues.add("error", "spans that are not in the caption", fix, [example])
                return None
        return tuple((begin, end) for begin, end in spans)

    def _boxes(self, item: Mapping[str, Any], key: str, location: str) -> list[list[float]]:
        """Return the box of an instance, or the boxes of a region, which has one or a list of any length."""
        value = item.get("bbox")
        if value == [] and key == "grounding":
            return []
        values = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
        boxes = [to_box(value) for value in values]
        if None in boxes:
            fix = "write left, top, right, bottom in pixels, or remove the box"
            example = f"{location}: bbox {repr(value)[:80]}"
            self._issues.add("error", "boxes that are not four finite numbers", fix, [example])
        if key == "detection" and len(boxes) > 1:
            fix = "write an instance for each box"
            what = "instances with several boxes, of which only the first is used"
            self._issues.add("warning", what, fix, [location])
            boxes = boxes[:1]
        return [box for box in boxes if box is not None]


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.casefold()))
