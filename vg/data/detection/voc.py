"""Pascal VOC folders: one xml file per picture in Annotations, the pictures in JPEGImages, the splits in ImageSets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import numpy as np

from vg.data.detection.source import Detection, DetectionTable
from vg.data.detection.vocabulary import Vocabulary, VocabularyConfig
from vg.data.images import list_images
from vg.data.source import Provenance
from vg.data.synthetic.shapes import write_scenes
from vg.errors import DataError
from vg.settings import Settings

SIDES = ("xmin", "ymin", "xmax", "ymax")


@dataclass
class VocConfig(Settings):
    """Which folder, and which pictures of it."""

    name: Literal["voc"] = "voc"
    path: str = field(
        kw_only=True
    )  # folder with Annotations and JPEGImages, or with xml files and pictures side by side
    split: str | None = None  # name of a file in ImageSets/Main; null takes all pictures that have an annotation
    classes: list[str] | None = None  # by default those found in all annotations, in alphabetical order
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)

    @classmethod
    def miniature(cls, folder: Path) -> VocConfig:
        """Write a tiny dataset and return its settings, for tests."""
        objects = dict.fromkeys(range(4), "")
        for image, name, (x1, y1, x2, y2) in write_scenes(folder, "detection"):
            sides = "".join(f"<{k}>{v:g}</{k}>" for k, v in zip(SIDES, (x1 + 1, y1 + 1, x2, y2), strict=True))
            objects[image] += f"<object><name>{name}</name><bndbox>{sides}</bndbox></object>"
        for image, text in objects.items():
            (folder / f"{image}.xml").write_text(f"<annotation>{text}</annotation>")
        return cls(path=str(folder))

    def build(self) -> Detection:
        """Read all annotations.

        Pascal counts pixels from 1, so left and top are one less here. Objects marked `difficult` are treated as crowd
        regions: not trained on and not judged.

        Raises:
            DataError: a folder or file is missing or malformed; the message names it.
        """
        folder = Path(self.path)
        notes = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
        pictures = folder / "JPEGImages" if (folder / "JPEGImages").is_dir() else folder
        everything = {file.stem: _read(file) for file in sorted(notes.glob("*.xml"))}
        if not everything:
            raise DataError(f"{notes} holds no xml file; path is the folder with Annotations and JPEGImages in it")
        names = self.classes or sorted({thing.name for note in everything.values() for thing in note.things})
        ids = list(everything) if self.split is None else split_names(folder, self.split)
        if missing := [id for id in ids if id not in everything]:
            raise DataError(f"{notes}: {missing[0]}.xml is missing, and {len(missing)} in all that ImageSets lists")
        files = {Path(file).stem: file for file in list_images(pictures)}
        notes_of = [everything[id] for id in ids]
        labels = {name: label for label, name in enumerate(names)}
        things = [(owner, thing) for owner, note in enumerate(notes_of) for thing in note.things]
        for owner, thing in things:
            if thing.name not in labels:
                raise DataError(f"{ids[owner]}.xml: class {thing.name!r} is not in classes: {', '.join(names)}")
        table = DetectionTable.of(
            ids=ids,
            files=[files.get(id, note.file) for id, note in zip(ids, notes_of, strict=True)],
            sizes=np.array([note.size for note in notes_of]),
            owners=np.array([owner for owner, _ in things], np.int64),
            boxes=np.array([thing.box for _, thing in things], np.float64),
            labels=np.array([labels[thing.name] for _, thing in things], np.int64),
            crowd=np.array([thing.difficult for _, thing in things], bool),
        )
        vocabulary = Vocabulary(names, self.vocabulary, str(folder))
        provenance = Provenance(folder.resolve().name, self.split or "all", "detection")
        return Detection(table, vocabulary, range(len(names)), pictures, provenance)


@dataclass(frozen=True)
class _Thing:
    name: str
    box: tuple[float, ...]  # xyxy in pixels
    difficult: bool


@dataclass(frozen=True)
class _Note:
    """What one xml file says."""

    file: str  # of the picture; often wrong, so that a picture with the name of the xml file goes first
    size: tuple[int, int]  # (height, width) in pixels, 0 where it does not say
    things: list[_Thing]


def _read(file: Path) -> _Note:
    try:
        root = ElementTree.parse(file).getroot()
        size = int(float(root.findtext("size/height") or 0)), int(float(root.findtext("size/width") or 0))
        things = []
        for number, thing in enumerate(root.iter("object"), start=1):
            name = (thing.findtext("name") or "").strip()
            sides = [thing.findtext(f"bndbox/{side}") for side in SIDES]
            if not name or None in sides:
                raise DataError(f"{file}: object {number} lacks a name or one of {', '.join(SIDES)}; add it")
            left, top, right, bottom = (float(side or "") for side in sides)
            things.append(_Thing(name, (left - 1, top - 1, right, bottom), thing.findtext("difficult") == "1"))
    except ElementTree.ParseError as error:
        raise DataError(f"{file}: not valid xml ({error}); mend or remove it") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: a size or a side of a box is no number ({error}); correct it") from error
    return _Note(root.findtext("filename") or f"{file.stem}.jpg", size, things)


def split_names(folder: Path, split: str) -> list[str]:
    """The names in a list, which has a second column if it is about one class."""
    file = folder / "ImageSets" / "Main" / f"{split}.txt"
    try:
        return [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.txt"))) or "none"
        raise DataError(f"{file} cannot be read; splits there are: {known}; split: null takes all pictures") from error
