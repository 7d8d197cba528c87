"""YOLO folders: a data.yaml with class names and splits, pictures in images/ and a text file for each in labels/."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from vg.data.detection.source import Detection, DetectionTable
from vg.data.detection.vocabulary import Vocabulary, VocabularyConfig
from vg.data.images import list_images
from vg.data.source import Provenance
from vg.data.synthetic.shapes import write_scenes
from vg.errors import DataError
from vg.settings import Settings

_TOLERANCE = 0.01  # how far beyond 0..1 a coordinate may be


@dataclass
class YoloConfig(Settings):
    """Which data.yaml, and which split of it."""

    name: Literal["yolo"] = "yolo"
    path: str = field(kw_only=True)  # data.yaml, or the folder it is in
    split: str = "train"
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)

    @classmethod
    def miniature(cls, folder: Path) -> YoloConfig:
        """Write a tiny dataset and return its settings, for tests."""
        rows = write_scenes(folder / "images", "detection")
        names = sorted({name for _, name, _ in rows})
        (folder / "labels").mkdir()
        for image, name, (x1, y1, x2, y2) in rows:
            values = names.index(name), *(v / 128 for v in (x1 + x2, y1 + y2, 2 * (x2 - x1), 2 * (y2 - y1)))
            with (folder / "labels" / f"{image}.txt").open("a") as file:
                print(*values, file=file)
        (folder / "data.yaml").write_text(yaml.safe_dump({"names": names, "train": "images"}))
        return cls(path=str(folder))

    def build(self) -> Detection:
        """Read all labels of the split; a picture without a label file has no boxes.

        Raises:
            DataError: a file or key is missing or malformed; the message names file and line.
        """
        file = Path(self.path)
        file = file / "data.yaml" if file.is_dir() else file
        document = read_document(file)
        names = class_names(document, file)
        root = (file.resolve().parent / str(document.get("path") or ".")).resolve()
        root = root if root.is_dir() else file.resolve().parent
        pictures = split_pictures(document, self.split, root, file)
        labels = [label_file(picture) for picture in pictures]
        if pictures and not any(label.is_file() for label in labels):
            raise DataError(f"no picture of {self.split} has labels; the first would be {labels[0]} for {pictures[0]}")
        rows = [
            (owner, *row)
            for owner, label in enumerate(labels)
            if label.is_file()
            for row in _read_labels(label, len(names))
        ]
        table = np.array(rows, np.float64).reshape(-1, 6)  # picture, class, xyxy
        return Detection(
            DetectionTable.of(
                ids=[_id(picture, root) for picture in pictures],
                files=list(map(str, pictures)),
                sizes=np.zeros((len(pictures), 2)),
                owners=table[:, 0].astype(np.int64),
                boxes=table[:, 2:],
                labels=table[:, 1],
                crowd=np.zeros(len(table), bool),
                relative=True,
            ),
            Vocabulary(names, self.vocabulary, str(file)),
            range(len(names)),
            root,
            Provenance(root.name, self.split, "detection"),
        )


def read_document(file: Path) -> Mapping[str, Any]:
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}; path is the data.yaml of a YOLO data set") from error
    except yaml.YAMLError as error:
        raise DataError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(document, Mapping):
        raise DataError(f"{file} must have the keys names, train and val")
    return document


def class_names(document: Mapping[str, Any], file: Path) -> list[str]:
    """In the order of their numbers; a mapping number -> name must have every number from 0 on."""
    names = document.get("names")
    if isinstance(names, Mapping) and sorted(names) == list(range(len(names))):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(
            f"{file}: names is {names!r}, expected a list of class names or a mapping 0: name, 1: name, ..."
        )
    if document.get("nc", len(names)) != len(names):
        raise DataError(f"{file}: nc is {document['nc']} but there are {len(names)} names; correct one of them")
    return list(map(str, names))


def split_pictures(document: Mapping[str, Any], split: str, root: Path, file: Path) -> list[Path]:
    """The pictures of a split, which is a folder, a text file that lists them, or a list of these."""
    entry = document.get(split)
    if not entry:
        known = ", ".join(key for key in ("train", "val", "test") if document.get(key)) or "none"
        raise DataError(f"{file} has no split {split!r}; it has {known}")
    pictures: list[Path] = []
    for name in entry if isinstance(entry, list) else [entry]:
        # Exports of Roboflow write ../train/images and mean train/images.
        place = next((p for p in (root / name, root / str(name).removeprefix("../")) if p.exists()), None)
        if place is None:
            raise DataError(f"{file}: {split} is {name}, and there is no {root / name}; correct it or the key path")
        if place.is_dir():
            pictures += [place / each for each in list_images(place)]
        else:
            lines = place.read_text(encoding="utf-8").split("\n")
            pictures += [root / line.strip() for line in lines if line.strip()]
    return pictures


def label_file(picture: Path) -> Path:
    """labels/ in place of the last images/ in its path; else beside the picture."""
    parts = list(picture.parts)
    if "images" in parts[:-1]:
        place = len(parts) - 2 - parts[-2::-1].index("images")
        parts[place] = "labels"
    return Path(*parts).with_suffix(".txt")


def _read_labels(file: Path, num_classes: int) -> list[tuple[float, float, float, float, float]]:
    """(class, left, top, right, bottom) of each line; a line with more than four coordinates is a polygon."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            label, *numbers = map(float, line.split())
        except ValueError as error:
            raise DataError(f"{where}: {line[:80]!r} is not a class and numbers; mend or remove it") from error
        if not 0 <= label < num_classes or label != int(label):
            raise DataError(f"{where}: class {label:g} is none of the {num_classes} in names (they count from 0)")
        if len(numbers) < 4 or len(numbers) % 2:
            raise DataError(f"{where}: {len(numbers)} coordinates; expected x y width height, or x y of each corner")
        if not all(-_TOLERANCE <= value <= 1 + _TOLERANCE for value in numbers):
            raise DataError(f"{where}: coordinates beyond 0..1; divide x and width by the image's width, and so on")
        if len(numbers) == 4:
            x, y, width, height = numbers
            rows.append((label, x - width / 2, y - height / 2, x + width / 2, y + height / 2))
        else:
            rows.append((label, min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])))
    return rows


def _id(picture: Path, root: Path) -> str:
    return str(picture.relative_to(root).with_suffix("") if picture.is_relative_to(root) else picture)
