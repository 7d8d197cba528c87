"""YOLO folders: a data.yaml with class names and splits, images in images/ and a text file for each in labels/."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from vg.data.detection.annotations import CXCYWH, AnnotatedBox, AnnotatedImage, Annotations, to_float, without_gc
from vg.data.detection.issues import Issues, Severity
from vg.data.detection.source import DetectionSource, read_strictly
from vg.data.detection.vocabulary import VocabularyConfig
from vg.data.image_files import list_images
from vg.data.images import slashed
from vg.data.synthetic.shapes import write_scenes
from vg.errors import DataError
from vg.files import located, read_text
from vg.settings import Settings, read_yaml

_TOLERANCE = 0.01  # how far beyond 0..1 a coordinate may be


@dataclass
class YoloConfig(Settings):
    """Which data.yaml to read, and which split of it."""

    name: Literal["yolo"] = "yolo"
    path: str = field(kw_only=True)
    """data.yaml, or the folder that contains it."""
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

    def build(self) -> DetectionSource:
        """Read all labels of the split.

        Raises:
            DataError: a file or key is missing or malformed; the message names file and line.
        """
        annotations = read_strictly(self)
        name = annotations.image_root.name or Path(self.path).resolve().parent.name
        return DetectionSource(self, annotations, name, self.split)

    @without_gc()
    def read(self, issues: Issues) -> Annotations:
        """Parse data.yaml and the label files of the split; an image without a label file has no boxes.

        Raises:
            DataError: data.yaml is malformed, or a path in it does not exist.
        """
        file = Path(self.path)
        file = file / "data.yaml" if file.is_dir() else file
        document = read_document(file)
        names = _class_names(document, file)
        root = (file.resolve().parent / str(document.get("path") or ".")).resolve()
        root = root if root.is_dir() else file.resolve().parent
        paths = _split_paths(document, self.split, root, file)
        counts = Counter(image for path in paths for image in _images(path, root))
        repeated = [str(image) for image, count in counts.items() if count > 1]
        fix = "they are used once; to use some more often, make a mixture with weights"
        issues.add("warning", f"images that {self.split} lists several times", fix, repeated)
        files = [*counts]
        root = Path(os.path.commonpath([root, *files]))  # images may be beside the folder of data.yaml
        num_keypoints = _num_keypoint_values(document, file)
        images, unlabeled = [], {}
        images_of: dict[Path, list[str]] = {}  # by label file
        for index, image in enumerate(files):
            label_file = _labels_of(image.as_posix()).with_suffix(".txt")
            name, label_name = _relative(image, root), _relative(label_file, root)
            images_of.setdefault(label_name, []).append(str(name))
            boxes = []
            if label_file.is_file():
                text = label_file.read_text(encoding="utf-8-sig", errors="replace")
                for number, line in enumerate(text.splitlines(), start=1):
                    if not line.strip():
                        continue
                    location = f"{label_name}, line {number}"
                    found = _read_line(line, len(names), num_keypoints, location, index, issues)
                    boxes += [] if found is None else [found]
            else:
                unlabeled[index] = f"{name}: {label_file} does not exist"
            images.append(AnnotatedImage(str(name.with_suffix("")), str(name), label_file.name, (0, 0), boxes))
        shared = [f"{label_file}: {', '.join(own)}" for label_file, own in images_of.items() if len(own) > 1]
        fix = "move all but one out of the split, or rename them and give them labels of their own"
        issues.add("error", "label files with several images", fix, shared)
        folders = [_labels_of(f"{path}/") for path in paths if path.is_dir()]
        texts = {_relative(text, root): text for folder in folders for text in sorted(folder.rglob("*.txt"))}
        unused = [str(name) for name, text in texts.items() if name not in images_of and _has_box(text)]
        fix = "add their images, as jpg or png files, or remove them"
        issues.add("warning", f"label files of {self.split} without an image", fix, unused)
        severity: Severity = "error" if unlabeled and len(unlabeled) == len(images) else "note"
        fix = "nothing if they contain no objects; otherwise move the labels to the path above"
        issues.add(severity, f"images of {self.split} without a label file", fix, unlabeled.values(), [*unlabeled])
        return Annotations.of(
            images, names, len(names), image_root=root, box_format=CXCYWH, relative=True, upright=True
        )


def read_document(file: Path) -> Mapping[str, Any]:
    """Read a data.yaml; raises DataError if it is not a YAML mapping."""
    try:
        document = read_yaml(file)
    except OSError as error:
        known = "path is the data.yaml of a YOLO dataset"
        raise DataError(f"cannot read {located(file)}: {error.strerror}; {known}") from error
    except yaml.YAMLError as error:
        raise DataError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(document, Mapping):
        raise DataError(f"{file} must have the keys names, train and val")
    return document


def _class_names(document: Mapping[str, Any], file: Path) -> list[str]:
    """Return the names by class index; a mapping index -> name must have every index from 0 on."""
    names = document.get("names")
    if isinstance(names, Mapping) and set(names) == set(range(len(names))):
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names or any(isinstance(name, (list, dict)) for name in names):
        raise DataError(
            f"{file}: names: expected a list of class names or a mapping 0: name, ..., got {str(names)[:80]}"
        )
    if document.get("nc", len(names)) != len(names):
        raise DataError(f"{file}: nc is {document['nc']} but there are {len(names)} names; correct one of them")
    for name in names:
        if not isinstance(name, (str, int, float)) or isinstance(name, bool):
            raise DataError(f"{file}: YAML reads one of the names as {name!r}; put it in quotes")
    return list(map(str, names))


def _num_keypoint_values(document: Mapping[str, Any], file: Path) -> int:
    """Return how many numbers follow the box in a line of a dataset for pose estimation; 0 for others."""
    shape = document.get("kpt_shape") or [0, 0]
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(value, int) for value in shape):
        raise DataError(f"{file}: kpt_shape is {shape}, expected [number of keypoints, 2 or 3]")
    return math.prod(shape)


def _split_paths(document: Mapping[str, Any], split: str, root: Path, file: Path) -> list[Path]:
    """Return the folders of a split, and the text files that list its images."""
    entry = document.get(split)
    if not entry:
        known = ", ".join(key for key in ("train", "val", "test") if document.get(key)) or "none"
        raise DataError(f"{file} has no split {split!r}; it has {known}")
    paths = []
    for name in (slashed(str(item), root) for item in (entry if isinstance(entry, list) else [entry])):
        # Exports of Roboflow contain ../train/images and mean train/images.
        path = next((p for p in (root / name, root / name.removeprefix("../")) if p.exists()), None)
        if path is None:
            raise DataError(f"{file}: {split} is {name}, but {root / name} does not exist; correct it or the key path")
        paths.append(Path(os.path.abspath(path)))
    return paths


def _images(path: Path, root: Path) -> list[Path]:
    """Return the images in a folder, or those that a text file lists."""
    if path.is_dir():
        return [path / image for image in list_images(path)]
    lines = read_text(path).split("\n")
    return [Path(os.path.abspath(root / slashed(line.strip(), root))) for line in lines if line.strip()]


def _labels_of(path: str) -> Path:
    """Return where the labels of an image, or of a folder that ends with a slash, are.

    The last images/ in the path becomes labels/; without one, the labels are beside the image.
    """
    return Path(re.sub("(.*/)images/", r"\1labels/", path))


def _relative(path: Path, root: Path) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else path


def _has_box(file: Path) -> bool:
    """Whether the first line of a text file is that of a box; others list classes or images."""
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        values = [*map(to_float, lines.readline().split())]
    return len(values) >= 5 and not any(map(math.isnan, values))


def _read_line(
    line: str, num_classes: int, num_keypoints: int, location: str, image_index: int, issues: Issues
) -> AnnotatedBox | None:
    """Parse a line: class, center x, center y, width, height.

    After them are `num_keypoints` numbers of keypoints. Without keypoints, more than four coordinates are a polygon.
    """
    label, *values = map(to_float, line.split())
    example = f"{location}: {line[:80]}"
    if num_keypoints and len(values) == 4 + num_keypoints:
        values = values[:4]
    is_polygon = len(values) > 4
    if len(values) < 4 or len(values) % 2 or (is_polygon and num_keypoints) or any(map(math.isnan, values)):
        what = "invalid label lines"
        fix = "expected: class x y width height, or: class and x y of each corner, all of them numbers"
        if num_keypoints:
            fix = f"expected: class x y width height, and {num_keypoints} numbers of keypoints (kpt_shape in data.yaml)"
        example += f" ({len(values)} coordinates)"
    elif not 0 <= label < num_classes or label != int(label):
        what = "classes that are not in data.yaml"
        fix = f"classes count from 0 to {num_classes - 1}, in the order of `names`; correct the line or `names`"
    elif not all(-_TOLERANCE <= value <= 1 + _TOLERANCE for value in values):
        what = "coordinates beyond 0..1"
        fix = "divide x and width by the width of the image in pixels, y and height by its height"
    else:
        if is_polygon:
            left, top, right, bottom = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
            values = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
        return AnnotatedBox(int(label), values, location)
    issues.add("error", what, fix, [example], [image_index])
    return None
