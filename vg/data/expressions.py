"""Tables, CSV or JSON lines: a row has an image, a referring expression or a class, and the box of it."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from vg.data.detection.annotations import (
    XYWH,
    XYXY,
    AnnotatedBox,
    AnnotatedImage,
    Annotations,
    BoxFormat,
    to_box,
    without_gc,
)
from vg.data.detection.issues import Issues
from vg.data.detection.source import DetectionSource, check_image_root, read_annotated_image, read_strictly
from vg.data.detection.vocabulary import VocabularyConfig
from vg.data.image_files import image_files, image_key, image_root
from vg.data.images import find_size
from vg.data.source import Provenance, Source, Task
from vg.data.synthetic.shapes import write_scenes
from vg.errors import BadSampleError, DataError, NoSuchSplitError
from vg.files import located, read_lines
from vg.settings import Settings
from vg.types import Sample

_PATH = ("image_path", "image_name")  # where there is no other column of the image
IMAGE = ("image", "file_name", "filename", *_PATH)
PHRASE = ("phrase", "expression", "caption", "text")
CLASS = ("class", "label", "name")  # where there is no phrase; a class has any number of boxes in an image
_XYWH = ("x", "y", "w", "h")
BOX: dict[tuple[str, ...], BoxFormat] = {
    ("left", "top", "right", "bottom"): XYXY,
    ("x1", "y1", "x2", "y2"): XYXY,
    ("xmin", "ymin", "xmax", "ymax"): XYXY,
    _XYWH: XYWH,
    ("x", "y", "width", "height"): XYWH,
    ("box_xyxy",): XYXY,
    ("bbox_xyxy",): XYXY,
    ("box_xywh",): XYWH,
    ("bbox_xywh",): XYWH,
}
SPLIT = "split"
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}


class Columns(NamedTuple):
    """The names of the columns that are used."""

    image: str
    phrase: str
    box: tuple[str, ...]  # four numbers, or one list of them

    @classmethod
    def of(cls, names: Sequence[str], where: object) -> Columns:
        """Select the columns of a table by their names; raises DataError if that is not possible without a guess."""
        images = [x for x in IMAGE if x in names and x not in _PATH] or [x for x in _PATH if x in names][:1]
        image = _only(images, "image file", " or ".join(IMAGE), names, where)
        phrases = [name for name in PHRASE if name in names] or [name for name in CLASS if name in names]
        phrase = _only(phrases, "phrase", f"{' or '.join(PHRASE)} (a class: {' or '.join(CLASS)})", names, where)
        unclear = [name for name in ("box", "bbox") if name in names]
        known = ", or ".join(", ".join(group) for group in BOX)
        boxes = [group for group in BOX if set(group) <= set(names)]
        if _XYWH in boxes:  # width and height are those of the image; x and y may also be in columns of their own
            boxes = [group for group in boxes if group != _XYWH and "width" not in group] or [_XYWH]
        if unclear and not boxes:
            raise DataError(
                f"{where}: the column {unclear[0]!r} does not say what its four numbers are; rename it to "
                f"{unclear[0]}_xyxy (left, top, right, bottom) or {unclear[0]}_xywh (left, top, width, height)"
            )
        return cls(image, phrase, _only(boxes, "box (in pixels)", known, names, where))


@dataclass
class CsvConfig(Settings):
    """Which table to read, and where its images are.

    The first line of a .csv file names the columns, in upper or lower case; a line of a .jsonl file is an object with
    these keys:

    - `image`, `file_name` or `filename`, or else `image_path` or `image_name`: the file below `image_root`;
    - `phrase`, `expression`, `caption` or `text`; without these, `class`, `label` or `name` make it a detection
      dataset: a sample is an image with the boxes of all classes;
    - the box in pixels: `left, top, right, bottom`, or `x1, y1, x2, y2`, or `xmin, ymin, xmax, ymax`, or
      `x, y, w, h`, or else `x, y, width, height`, or one list of four numbers in `box_xyxy` or `box_xywh`; of the
      image as viewers show it, with its EXIF orientation applied;
    - optionally `split`.

    Columns are separated by commas, semicolons or tabs.

    Other columns are ignored. This includes what `vg predict --format csv` writes.
    """

    name: Literal["csv"] = "csv"
    path: str = field(kw_only=True)
    """The .csv or .jsonl file."""
    image_root: str | None = None
    """Folder of the images; by default as for coco."""
    split: str | None = None
    """Use the rows with this value in the column `split`; null uses all rows."""
    classes: list[str] | None = None
    """For a column of classes; by default those of all rows, in the order of their first rows."""
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    """For a column of classes."""

    task: ClassVar[Task] = "expressions"

    @classmethod
    def miniature(cls, folder: Path) -> CsvConfig:
        """Write a tiny dataset and return its settings, for tests."""
        with (folder / "mini.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "phrase", "left", "top", "right", "bottom"])
            writer.writerows([f"{i}.png", phrase, *box] for i, phrase, box in write_scenes(folder, "expression"))
        return cls(path=str(folder / "mini.csv"))

    def build(self) -> CsvExpressions | DetectionSource:
        """Read all rows.

        Raises:
            DataError: the file cannot be read, or a row or the names of the columns cannot be used.
        """
        annotations = read_strictly(self)
        if not annotations.num_classes:
            return CsvExpressions(self, annotations)
        return DetectionSource(self, annotations, Path(self.path).name, self.split or "all")

    @without_gc()
    def read(self, issues: Issues) -> Annotations:
        """Parse all rows; images are in the order of their first row.

        Raises:
            DataError: the file cannot be read, has no such split, or the names of its columns cannot be used.
        """
        names: dict[str, int] = {}
        images: dict[str, AnnotatedImage] = {}
        columns, fixed, splits = None, False, set()
        for location, row in read_rows(Path(self.path)):
            if columns is None:
                columns = Columns.of(list(row), self.path)
                fixed = bool(self.classes) and columns.phrase in CLASS
                names = {name: label for label, name in enumerate(dict.fromkeys(self.classes or []))} if fixed else {}
            named = (row.get(name) for name in (columns.image, columns.phrase))
            file, phrase = ("" if cell is None else str(cell).strip() for cell in named)  # a class may be 0
            if columns.phrase in CLASS and phrase and not fixed:
                names.setdefault(phrase, len(names))  # the splits share their classes
            splits.add(split := split_of(row))
            if self.split is not None and split != self.split:
                continue
            cells = [row.get(name) for name in columns.box]
            shown = f"{location}: {str(dict(row))[:120]}"
            if not file:
                issues.add("error", "rows without an image", f"fill in the column {columns.image}", [shown])
                continue
            image = images.setdefault(file, AnnotatedImage(file, file, location, (0, 0), []))
            if not phrase and not any(cells):
                what, fix = "rows with an image only", "nothing: vg predict writes them where it finds no box"
                issues.add("note", what, fix, [shown])
            elif not phrase:
                issues.add("error", "rows without a phrase", f"fill in the column {columns.phrase}", [shown])
            elif (box := _to_box(cells)) is None:
                fix = f"write four numbers in pixels: {BOX[columns.box].description}"
                issues.add("error", "boxes that are not four finite numbers", fix, [shown])
            elif fixed and phrase not in names:
                fix = f"add it to classes ({', '.join([*names][:10])}), or correct the name"
                issues.add("error", "rows of an unknown class", fix, [shown])
            else:
                image.boxes.append(AnnotatedBox(names.setdefault(phrase, len(names)), box, location))
        if self.split is not None and self.split not in splits:
            known = ", ".join(sorted(filter(None, splits))) or "none"
            raise NoSuchSplitError(f"{self.path} has no split {self.split!r}; its column {SPLIT!r} has {known}")
        root = Path(self.image_root) if self.image_root is not None else image_root(Path(self.path), list(images))
        box_format = BOX[columns.box] if columns else XYXY
        num_classes = len(names) if columns and columns.phrase in CLASS else 0
        return Annotations.of(
            list(images.values()), list(names), num_classes, image_root=root, box_format=box_format, upright=True
        )


class CsvExpressions(Source[Sample]):
    """The rows of a table, sorted by image: one expression and one box per sample.

    Raises:
        DataError: the image root is not a folder.
    """

    def __init__(self, config: CsvConfig, annotations: Annotations):
        check_image_root(annotations.image_root)
        self.provenance = Provenance(Path(config.path).name, config.split or "all", config.task)
        self._path, self._root = config.path, annotations.image_root
        self._files, self._phrases = annotations.files, annotations.names
        self._locations = [annotations.locate(index) for index in range(len(annotations.boxes))]  # A
        self._images, self._labels = annotations.image_indices, annotations.labels  # [A] both
        self._boxes = annotations.xyxy.astype(np.float32)  # [A, 4] pixels

    def __len__(self) -> int:
        return len(self._boxes)

    def load(self, index: int, epoch: int) -> Sample:
        """Return the sample of one row; raises BadSampleError that names it if its image cannot be read."""
        try:
            image = read_annotated_image(self._files[self._images[index]], self._root, (0, 0), upright=True)
        except BadSampleError as error:
            raise BadSampleError(f"{self._path}, {self._locations[index]}: {error}") from error
        return Sample(self._id(index), image, self._phrase(index), self._boxes[[index]], np.zeros(1, np.int64))

    def image_keys(self) -> list[str]:
        keys = [image_key(file, self._root) for file in self._files]
        return [keys[image] for image in self._images.tolist()]

    def image_files(self) -> list[Path | None]:
        files = image_files(self._files, self._root)
        return [files[image] for image in self._images.tolist()]

    def image_groups(self, epoch: int) -> np.ndarray:
        return self._images

    def image_sizes(self, epoch: int) -> np.ndarray:
        """Return [A, 2] (height, width); the first call reads the header of every image."""
        return self._sizes[self._images]

    def sample_phrases(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(self._id(index), self._phrase(index)) for index in range(len(self))]

    def fingerprint(self) -> str:
        rows = [self._files, self._phrases, self._images.tolist(), self._labels.tolist(), self._boxes.tolist()]
        return hashlib.sha256(json.dumps([list(column) for column in rows]).encode()).hexdigest()

    def _id(self, index: int) -> str:
        return f"{self._files[self._images[index]]}, {self._locations[index]}"

    def _phrase(self, index: int) -> tuple[str]:
        return (self._phrases[self._labels[index]],)

    @cached_property
    def _sizes(self) -> np.ndarray:  # [I, 2] (height, width)
        sizes = [find_size(file, self._root, upright=True) for file in self._files]
        return np.array(sizes, np.int64).reshape(-1, 2)


def read_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the location ("line 3") and the cells by name of every row; known names of a .csv file are in lower case.

    Raises:
        DataError: the file cannot be read, or has a line that is not a row.
    """
    try:
        if file.suffix.lower() == ".jsonl":
            for number, _, text in read_lines(file):
                try:
                    row = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{file}, line {number}: not JSON ({error}); correct or remove it") from error
                if not isinstance(row, dict):
                    raise DataError(f"{file}, line {number}: not an object with keys such as image: {str(row)[:80]}")
                yield f"line {number}", row
            return
        with file.open(newline="", encoding="utf-8-sig") as opened:
            first = opened.readline()
            opened.seek(0)
            separator = max(_SEPARATORS, key=first.count)
            reader = csv.DictReader(opened, delimiter=separator)
            columns = reader.fieldnames or ()
            if len(set(columns)) < len(columns):
                raise DataError(f"{file}: two columns have the same name; rename one of {columns}")
            lower = [name.lower() for name in columns]
            once = {name for name in {SPLIT, *IMAGE, *PHRASE, *CLASS, *chain(*BOX)} if lower.count(name) == 1}
            reader.fieldnames = [low if low in once else name for name, low in zip(columns, lower, strict=True)]
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{file}, line {reader.line_num}: not as many cells as columns in the first line, "
                        f"{len(columns)}; separate them with {_SEPARATORS[separator]}, and quote phrases with one"
                    )
                yield f"line {reader.line_num}", row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {located(file)}: {error}; path is a .csv or .jsonl file in UTF-8") from error


def split_of(row: Mapping[str, Any]) -> str:
    """Return the cell of the column `split`, "" if it is empty or missing."""
    cell = row.get(SPLIT)
    return "" if cell is None else str(cell).strip()


def _only(found: list[Any], what: str, known: str, names: Sequence[str], where: object) -> Any:
    """Return the only candidate for a column."""
    if len(found) == 1:
        return found[0]
    if found:
        columns = " and ".join(name if isinstance(name, str) else ", ".join(name) for name in found)
        raise DataError(f"{where}: {columns} could each be the {what}; rename those that are not")
    raise DataError(f"{where}: no column for the {what}; name it {known}. The columns are {', '.join(names)}")


def _to_box(cells: list[Any]) -> list[float] | None:
    """Return four floats; None if the cells are not four numbers, or a list of them (in CSV as JSON)."""
    if len(cells) == 4:
        return to_box(cells)
    try:
        return to_box(json.loads(cells[0]) if isinstance(cells[0], str) else cells[0])
    except (ValueError, RecursionError):
        return None
