"""ODVG json lines: one picture per line, with boxes of numbered classes or with a caption and boxes of its phrases."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vg.data.detection.source import check_size, detection_sample, usable
from vg.data.detection.vocabulary import Vocabulary, VocabularyConfig
from vg.data.images import find_image, image_key, image_size, read_image
from vg.data.source import Provenance
from vg.data.synthetic.shapes import write_scenes
from vg.errors import BadSampleError, DataError
from vg.settings import Settings
from vg.types import Sample


@dataclass
class OdvgConfig(Settings):
    """Which lines, and where their pictures are."""

    name: Literal["odvg"] = "odvg"
    path: str = field(kw_only=True)  # instances_train.jsonl
    label_map: str | None = None  # json file {"0": "person", ...}, for lines with numbered classes
    image_root: str | None = None  # folder of the pictures; by default that of the file
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)  # for lines with numbered classes

    @classmethod
    def miniature(cls, folder: Path) -> OdvgConfig:
        """Write a tiny dataset of captions with regions and return its settings, for tests."""
        rows = write_scenes(folder, "detection")
        regions = [[{"phrase": name, "bbox": box} for image, name, box in rows if image == i] for i in range(4)]
        lines = [
            {"filename": f"{i}.png", "height": 64, "width": 64, "grounding": {"caption": "shapes", "regions": boxes}}
            for i, boxes in enumerate(regions)
        ]
        (folder / "val.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return cls(path=str(folder / "val.jsonl"))

    def build(self) -> Odvg:
        return Odvg(self)


class Odvg:
    """The lines as a vg.data.source.Source; a line is parsed when its sample is loaded.

    A line has `filename`, `height`, `width` and one of

    - `detection`: {instances: [{bbox, label, category}]}, labels from 0 on;
    - `grounding`: {caption, regions: [{bbox, phrase, tokens_positive}]}: `bbox` is one box or a list of them, and
      `tokens_positive` [[begin, end], ...] are the characters of the caption that name them, used where `phrase` is
      missing. Equal phrases become one with all their boxes. The rest of the caption names no box and is not used.

    All boxes are left, top, right, bottom in pixels, and are clipped or left out as in vg.data.detection.source.

    Raises:
        DataError: a file is missing or empty, or its first line is no ODVG.
    """

    def __init__(self, config: OdvgConfig) -> None:
        self._path = Path(config.path)
        self._root = Path(config.image_root) if config.image_root is not None else self._path.resolve().parent
        if not self._root.is_dir():
            raise DataError(f"image_root {self._root} is not a folder; set it to the one that holds the pictures")
        self._labels: dict[int, int] = {}  # label of a line -> class of the vocabulary
        self.vocabulary: Vocabulary | None = None
        if config.label_map is not None:
            names = _read_label_map(Path(config.label_map))
            self._labels = {label: number for number, label in enumerate(sorted(names))}
            self.vocabulary = Vocabulary([names[label] for label in self._labels], config.vocabulary, config.label_map)
        self._starts = _line_starts(self._path)  # [lines] where each begins, in bytes
        self.provenance = Provenance(self._path.resolve().parent.name, self._path.stem, "detection")
        if len(self):
            with self._named(0):
                self._annotation(self._row(0))

    def __len__(self) -> int:
        return len(self._starts)

    def load(self, index: int, epoch: int) -> Sample:
        """The sample of one line; the epoch matters where the vocabulary samples phrases.

        Raises:
            BadSampleError: naming the file, the row and the key.
        """
        with self._named(index):
            row = self._row(index)
            kind, annotation = self._annotation(row)
            file = find_image(str(row["filename"]), self._root)
            image = read_image(file, str(file))
            check_size(image, (row.get("height") or 0, row.get("width") or 0), file)
            id = f"{index + 1}/{row['filename']}"
            if kind == "grounding":
                return self._grounding(id, image, annotation)
            return self._detection(id, image, annotation, (epoch, index))

    def image_sizes(self, epoch: int) -> np.ndarray:
        """[lines, 2] (height, width); parses every line at the first call."""
        return self._heads[1]

    def image_keys(self) -> list[str]:
        return [image_key(name, self._root) for name in self._heads[0]]

    @cached_property
    def _heads(self) -> tuple[list[str], np.ndarray]:
        """The picture of every line and [lines, 2] its height and width."""
        names, sizes = [], []
        for index in range(len(self)):
            with self._named(index):
                row = self._row(index)
                names.append(str(row.get("filename")))
                size = row.get("height"), row.get("width")
                sizes.append(size if all(size) else image_size(find_image(names[-1], self._root), names[-1]))
        return names, np.array(sizes, np.int64).reshape(-1, 2)

    @contextmanager
    def _named(self, index: int) -> Iterator[None]:
        """Errors inside say which row they are about."""
        try:
            yield
        except BadSampleError as error:
            raise BadSampleError(f"{self._path}, row {index + 1}: {error}") from error

    def _row(self, index: int) -> Mapping[str, Any]:
        with self._path.open("rb") as file:
            file.seek(int(self._starts[index]))
            line = file.readline()
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadSampleError(f"not JSON ({error}); mend or remove it") from error
        if not isinstance(row, Mapping):
            raise BadSampleError(f"not an object but {str(row)[:60]}; mend or remove it")
        return row

    def _annotation(self, row: Mapping[str, Any]) -> tuple[str, list[Mapping[str, Any]] | Mapping[str, Any]]:
        """Which kind of line it is, and its instances or its caption with regions."""
        if "filename" not in row:
            raise BadSampleError(f"the keys are {sorted(row)}; `filename` is missing")
        for kind, part in (("detection", "instances"), ("grounding", "regions")):
            if kind in row:
                if not isinstance(row[kind], Mapping) or not isinstance(row[kind].get(part), list):
                    raise BadSampleError(f"{kind} is {str(row[kind])[:100]}; it needs a list of {part}")
                for number, item in enumerate(row[kind][part]):
                    if not isinstance(item, Mapping):
                        raise BadSampleError(
                            f"{kind}.{part}: number {number} is {str(item)[:100]}; it must be an object with a bbox"
                        )
                if kind == "detection" and self.vocabulary is None:
                    raise BadSampleError("a line with numbered classes; set label_map to the json file that names them")
                return kind, row[kind]
        raise BadSampleError(f"the keys are {sorted(row)}; it needs `detection` or `grounding`")

    def _detection(self, id: str, image: np.ndarray, annotation: Any, turn: tuple[int, int]) -> Sample:
        assert self.vocabulary is not None  # _annotation has looked
        instances = annotation["instances"]
        labels = np.array([self._label(number, instance) for number, instance in enumerate(instances)], np.int64)
        boxes = [_boxes(instance, f"instance {number}")[0] for number, instance in enumerate(instances)]
        return detection_sample(
            id=id,
            image=image,
            boxes=np.array(boxes, np.float32).reshape(-1, 4),
            labels=labels,
            crowd=np.zeros(len(labels), bool),
            areas=None,
            vocabulary=self.vocabulary,
            turn=turn,
        )

    def _label(self, number: int, instance: Mapping[str, Any]) -> int:
        """The class of an instance; its name in the line, if it has one, must be the name in the label map."""
        assert self.vocabulary is not None
        label: Any = instance.get("label")
        try:
            place = self._labels[label]
        except (KeyError, TypeError) as error:  # a list is no key at all
            known = f"{min(self._labels)} to {max(self._labels)}"
            raise BadSampleError(
                f"instance {number} has label {label!r}; label_map has {known}, labels count from 0"
            ) from error
        name = self.vocabulary.names[place]
        category = str(instance.get("category") or name)
        if category.casefold().replace("_", " ") != name.casefold().replace("_", " "):
            raise BadSampleError(
                f"instance {number}, label {label}, is {category!r} here and {name!r} in label_map; take the label_map "
                "that belongs to the file (labels count from 0, ids of COCO from 1)"
            )
        return place

    @staticmethod
    def _grounding(id: str, image: np.ndarray, annotation: Any) -> Sample:
        phrases: dict[str, tuple[int, str]] = {}  # by how it reads in lower case: its number and its words
        boxes, phrase_ids = [], []
        for number, region in enumerate(annotation["regions"]):
            phrase = _phrase(region, annotation.get("caption"), f"region {number}")
            place, _ = phrases.setdefault(phrase.casefold(), (len(phrases), phrase))
            for box in _boxes(region, f"region {number}"):
                boxes.append(box)
                phrase_ids.append(place)
        if not phrases:
            raise BadSampleError("grounding has no regions, so nothing is asked; remove the line")
        inside, kept = usable(np.array(boxes, np.float32).reshape(-1, 4), image)
        return Sample(
            id=id,
            image=image,
            phrases=tuple(phrase for _, phrase in phrases.values()),
            boxes=inside[kept],
            phrase_ids=np.array(phrase_ids, np.int64)[kept],
        )


def _line_starts(path: Path) -> np.ndarray:
    starts, position = [], 0
    try:
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    starts.append(position)
                position += len(line)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; path is a .jsonl file in the format ODVG") from error
    return np.array(starts, np.int64)


def _read_label_map(path: Path) -> dict[int, str]:
    try:
        return {int(label): str(name) for label, name in json.loads(path.read_bytes()).items()}
    except OSError as error:
        raise DataError(f"cannot read label_map {path}: {error.strerror}") from error
    except (AttributeError, ValueError) as error:
        raise DataError(f'label_map {path}: expected {{"0": "person", "1": "bicycle", ...}} ({error})') from error


def _boxes(part: Mapping[str, Any], where: str) -> list[list[float]]:
    """The boxes of an instance or a region, which has one or a list of them."""
    value = part.get("bbox")
    try:
        boxes = np.array(value, np.float64).reshape(-1, 4)
        if np.isfinite(boxes).all() and isinstance(value, list) and len(boxes) == (len(value) if _nested(value) else 1):
            return boxes.tolist()
    except (TypeError, ValueError):
        pass
    raise BadSampleError(
        f"{where} has bbox {value!r}, expected left, top, right, bottom in pixels; correct or remove it"
    )


def _nested(value: list[Any]) -> bool:
    return bool(value) and isinstance(value[0], list)


def _phrase(region: Mapping[str, Any], caption: object, where: str) -> str:
    phrase = region.get("phrase")
    if phrase is None and region.get("tokens_positive") and isinstance(caption, str):
        try:
            phrase = " ".join(caption[begin:end].strip() for begin, end in region["tokens_positive"])
        except (TypeError, ValueError) as error:
            raise BadSampleError(
                f"{where} has tokens_positive {region['tokens_positive']!r}, expected [[begin, end], ...]; correct it"
            ) from error
    if not isinstance(phrase, str) or not phrase.strip():
        raise BadSampleError(f"{where} has phrase {phrase!r} and no tokens_positive in the caption; give it words")
    return " ".join(phrase.split())
