"""Pascal VOC folders: one xml file per image in Annotations, the images in JPEGImages, the splits in ImageSets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple
from xml.etree import ElementTree

import numpy as np

from vg.data.detection.annotations import VOC, Annotations, to_float, to_size
from vg.data.detection.issues import Issues, RaiseFirstError
from vg.data.detection.source import DetectionSource
from vg.data.detection.vocabulary import Vocabulary, VocabularyConfig
from vg.data.images import list_images
from vg.data.source import Provenance
from vg.data.synthetic.shapes import write_scenes
from vg.errors import DataError
from vg.settings import Settings

_SIDES = ("xmin", "ymin", "xmax", "ymax")


class _Object(NamedTuple):
    image_index: int
    location: str  # "a.xml, object 2"
    name: str
    box: list[float]  # as written
    difficult: bool


@dataclass
class VocConfig(Settings):
    """Which folder to read, and which of its images."""

    name: Literal["voc"] = "voc"
    path: str = field(kw_only=True)
    """Folder with Annotations and JPEGImages, or with xml files and images side by side."""
    split: str | None = None
    """Name of a file in ImageSets/Main; null selects all images that have an annotation."""
    classes: list[str] | None = None
    """By default the names found in all annotations, in alphabetical order."""
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)

    @classmethod
    def miniature(cls, folder: Path) -> VocConfig:
        """Write a tiny dataset and return its settings, for tests."""
        objects = dict.fromkeys(range(4), "")
        for image, name, (x1, y1, x2, y2) in write_scenes(folder, "detection"):
            sides = "".join(f"<{k}>{v:g}</{k}>" for k, v in zip(_SIDES, (x1 + 1, y1 + 1, x2, y2), strict=True))
            objects[image] += f"<object><name>{name}</name><bndbox>{sides}</bndbox></object>"
        for image, text in objects.items():
            (folder / f"{image}.xml").write_text(f"<annotation>{text}</annotation>")
        return cls(path=str(folder))

    def build(self) -> DetectionSource:
        """Read all annotations.

        Raises:
            DataError: a folder or file is missing or malformed; the message names it.
        """
        annotations = self.read(RaiseFirstError(self.path))
        return DetectionSource(
            annotations,
            Vocabulary(annotations.names, self.vocabulary, self.path),
            Provenance(Path(self.path).resolve().name, self.split or "all", "detection"),
        )

    def read(self, issues: Issues) -> Annotations:
        """Parse the annotations of all splits, because they share their classes, and return those of the split.

        Pascal counts pixels from 1, so left and top become one less. Objects marked `difficult` are treated as crowd
        regions: neither trained on nor evaluated.

        Raises:
            DataError: there is no xml file, or no such split.
        """
        folder = Path(self.path)
        xml_folder = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
        image_root = folder / "JPEGImages" if (folder / "JPEGImages").is_dir() else folder
        stems = {file.stem: None for file in sorted(xml_folder.glob("*.xml"))}
        if not stems:
            raise DataError(f"{xml_folder} contains no xml file; path is the folder with Annotations and JPEGImages")
        image_files = {Path(file).stem: file for file in list_images(image_root)}
        if self.split is None:
            selected = list(stems)
            fix = "annotate them, or write an xml file without objects for images without any"
            unused = [image_files[stem] for stem in sorted(image_files.keys() - stems.keys())]
            issues.add("note", "images without an xml file, which are not used", fix, unused)
        else:
            listed = _split_stems(folder, self.split)
            selected = [stem for stem in listed if stem in stems]
            missing = [f"{stem}.xml, listed in {self.split}.txt" for stem in listed if stem not in stems]
            issues.add("error", "missing xml files", "add the file, or remove the name from the list", missing)

        ids: list[str] = []
        files: list[str] = []
        sizes: list[tuple[int, int]] = []
        objects: list[_Object] = []
        for stem in selected:
            if (root := _parse(xml_folder / f"{stem}.xml", issues)) is not None:
                objects += _read_objects(root, f"{stem}.xml", len(ids), issues)
                ids.append(stem)
                # <filename> is often wrong, so an image with the name of the xml file takes precedence.
                files.append(image_files.get(stem, root.findtext("filename") or f"{stem}.jpg"))
                sizes.append(to_size(root.findtext("size/height"), root.findtext("size/width")))
                if -1 in sizes[-1]:
                    issues.add("error", "sizes that are not numbers of pixels", "correct them", [f"{stem}.xml"])
        found = {item.name for item in objects}
        for stem in sorted(stems.keys() - set(selected)):
            if (root := _parse(xml_folder / f"{stem}.xml", issues)) is not None:
                found |= {item.name for item in _read_objects(root, f"{stem}.xml", None, issues)}
        names = self.classes or sorted(found)
        labels = {name: label for label, name in enumerate(names)}
        unknown = [item for item in objects if item.name not in labels]
        examples = [f"{item.location}: {item.name!r}" for item in unknown]
        fix = f"add it to classes ({', '.join(names[:10])}), or correct the name"
        issues.add("error", "objects of an unknown class", fix, examples, [item.image_index for item in unknown])
        objects = [item for item in objects if item.name in labels]
        return Annotations(
            image_root=image_root,
            names=names,
            num_classes=len(names),
            category_ids=range(len(names)),
            ids=ids,
            files=files,
            locations=[f"{stem}.xml" for stem in ids],
            sizes=np.array(sizes, np.int64).reshape(-1, 2),
            image_indices=np.array([item.image_index for item in objects], np.int64),
            boxes=np.array([item.box for item in objects], np.float64).reshape(-1, 4),
            labels=np.array([labels[item.name] for item in objects], np.int64),
            locate=lambda index: objects[index].location,
            crowd=np.array([item.difficult for item in objects], bool),
            box_format=VOC,
        )


def _parse(file: Path, issues: Issues) -> ElementTree.Element | None:
    try:
        return ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError) as error:
        issues.add("error", "invalid xml files", "fix or remove them", [f"{file.name}: {error}"])
        return None


def _read_objects(root: ElementTree.Element, file: str, image_index: int | None, issues: Issues) -> list[_Object]:
    objects = []
    for number, element in enumerate(root.iter("object"), start=1):
        name = (element.findtext("name") or "").strip()
        sides = [element.findtext(f"bndbox/{side}") for side in _SIDES]
        box = [to_float(side) for side in sides]
        location = f"{file}, object {number}"
        if not name or any(map(math.isnan, box)):
            what = f"objects without a name or a number for each of {', '.join(_SIDES)}"
            images = [] if image_index is None else [image_index]
            issues.add("error", what, "correct or remove them", [f"{location}: name {name!r}, box {sides}"], images)
        else:
            objects.append(_Object(image_index or 0, location, name, box, element.findtext("difficult") == "1"))
    return objects


def _split_stems(folder: Path, split: str) -> list[str]:
    """Return the names in a list of ImageSets, which has a second column if it is about one class."""
    file = folder / "ImageSets" / "Main" / f"{split}.txt"
    try:
        return [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.txt"))) or "none"
        raise DataError(f"{file} cannot be read; existing splits: {known}; split: null selects all images") from error
