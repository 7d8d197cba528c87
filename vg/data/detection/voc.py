"""Pascal VOC folders: one xml file per image in Annotations, the images in JPEGImages, the splits in ImageSets."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from vg.data.detection.annotations import VOC, AnnotatedBox, AnnotatedImage, Annotations, to_box, to_size, without_gc
from vg.data.detection.issues import Issues
from vg.data.detection.source import DetectionSource, read_strictly
from vg.data.detection.vocabulary import VocabularyConfig
from vg.data.image_files import list_images
from vg.data.synthetic.shapes import write_scenes
from vg.errors import DataError
from vg.files import located, read_text, refuse_special
from vg.settings import Settings

_SIDES = ("xmin", "ymin", "xmax", "ymax")


@dataclass
class VocConfig(Settings):
    """Which folder to read, and which of its images."""

    name: Literal["voc"] = "voc"
    path: str = field(kw_only=True)
    """Folder with Annotations and JPEGImages, which may have equal subfolders, or with xml files beside images. Without
    Annotations, xml files may be in annotations or xmls; without JPEGImages, images anywhere in the folder."""
    split: str | None = None
    """Name of a file in ImageSets/Main; null selects all images that have an annotation."""
    classes: list[str] | None = None
    """By default the names found in all annotations, in alphabetical order."""
    upright: bool | None = None
    """See the setting of coco."""
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
            DataError: a folder or file is missing or malformed, or a box cannot be used; the message names it.
        """
        return DetectionSource(self, read_strictly(self), Path(self.path).resolve().name, self.split or "all")

    @without_gc()
    def read(self, issues: Issues) -> Annotations:
        """Parse the annotations of all splits, because they share their classes, and return those of the split.

        Pascal counts pixels from 1, so left and top become one less. Objects marked `difficult` are treated as crowd
        regions: neither trained on nor evaluated.

        Raises:
            DataError: there is no xml file, or no such split.
        """
        folder = Path(self.path)
        xmls = xml_folder(folder)
        image_root = folder / "JPEGImages" if (folder / "JPEGImages").is_dir() else folder
        pattern = "*.xml" if xmls == folder else "**/*.xml"  # folders beside images may be other datasets
        files = sorted(file.relative_to(xmls) for file in xmls.glob(pattern))
        visible = [file for file in files if not any(part.startswith(".") for part in file.parts[:-1])]
        stems = dict.fromkeys(file.with_suffix("").as_posix() for file in visible)  # "a", "camera_1/a"
        if not stems:
            raise DataError(f"{located(xmls)} contains no xml file; path is the folder with Annotations and JPEGImages")
        image_files: dict[str, list[str]] = {}  # by "a" and "camera_1/a"
        for image_file in (all_images := list_images(image_root)):
            for stem in _path_ends(image_file):
                image_files.setdefault(stem, []).append(image_file)
        if self.split is None:
            selected = list(stems)
            fix = "annotate them, or write an xml file without objects for images without any"
            unused = [image_file for image_file in all_images if stems.keys().isdisjoint(_path_ends(image_file))]
            issues.add("note", "images without an xml file, which are not used", fix, unused)
        else:
            listed = _split_stems(folder, self.split, stems)
            selected = [stem for stem in listed if stem in stems]
            missing = [f"{stem}.xml, listed in {self.split}.txt" for stem in listed if stem not in stems]
            issues.add("error", "missing xml files", "add the file, or remove the name from the list", missing)

        images: list[AnnotatedImage] = []
        objects: list[tuple[int, str, list[float], str, bool]] = []  # image index (-1 in other splits), class, box
        for position, stem in enumerate([*selected, *sorted(stems.keys() - set(selected))]):
            file, index = f"{stem}.xml", len(images) if position < len(selected) else -1
            try:
                root = ElementTree.parse(refuse_special(xmls / file)).getroot()
            except (ElementTree.ParseError, OSError) as error:
                issues.add("error", "invalid xml files", "fix or remove them", [f"{file}: {error}"])
                continue
            objects += _read_objects(root, file, index, issues)
            if index >= 0:
                # <filename> is often wrong, so an image with the name of the xml file takes precedence.
                found = image_files.get(stem) or [root.findtext("filename") or f"{stem}.jpg"]
                if len(found := _named_images(root, found)) > 1:
                    fix = "write the path of the right one as <filename>, or move the others out of the folder"
                    example = f"several images for {file}: {', '.join(found[:5])}"
                    issues.add("error", "xml files with several images", fix, [example], [index])
                size = to_size(root.findtext("size/height"), root.findtext("size/width"))
                if -1 in size:
                    issues.add("error", "sizes that are not numbers of pixels", "correct them", [file])
                images.append(AnnotatedImage(stem, found[0], file, size, []))
        files_of: dict[str, list[str]] = {}  # of each image
        for image in images:
            files_of.setdefault(image.file, []).append(image.location)
        several = [f"{', '.join(own)} annotate {image_file}" for image_file, own in files_of.items() if len(own) > 1]
        issues.add("error", "images with several xml files", "keep one, or correct <filename>", several)
        names = self.classes or sorted({name for _, name, *_ in objects})
        labels = {name: label for label, name in enumerate(names)}
        unknown = [item for item in objects if item[0] >= 0 and item[1] not in labels]
        examples = [f"{location}: {name!r}" for _, name, _, location, _ in unknown]
        fix = f"add it to classes ({', '.join(names[:10])}), or correct the name"
        issues.add("error", "objects of an unknown class", fix, examples, [index for index, *_ in unknown])
        for index, name, box, location, is_difficult in objects:
            if index >= 0 and name in labels:
                images[index].boxes.append(AnnotatedBox(labels[name], box, location, is_difficult))
        return Annotations.of(images, names, len(names), image_root=image_root, box_format=VOC, upright=self.upright)


def xml_folder(folder: Path) -> Path:
    """Return the folder of the xml files: `Annotations`, or else one of other exports, or that of the images."""
    if (folder / "Annotations").is_dir():
        return folder / "Annotations"
    known = (folder / name for name in ("annotations/xmls", "annotations", "xmls"))
    return next((xmls for xmls in known if next(xmls.rglob("*.xml"), None)), folder)


def _read_objects(
    root: ElementTree.Element, file: str, image_index: int, issues: Issues
) -> Iterator[tuple[int, str, list[float], str, bool]]:
    """Yield image index, class, box, location and difficulty of every valid object."""
    for number, element in enumerate(root.iter("object"), start=1):
        name = (element.findtext("name") or "").strip()
        sides = [element.findtext(f"bndbox/{side}") for side in _SIDES]
        location = f"{file}, object {number}"
        if name and (box := to_box(sides)) is not None:
            yield image_index, name, box, location, element.findtext("difficult") == "1"
        else:
            what = f"objects without a name or a number for each of {', '.join(_SIDES)}"
            images = [] if image_index < 0 else [image_index]
            issues.add("error", what, "correct or remove them", [f"{location}: name {name!r}, box {sides}"], images)


def _path_ends(image_file: str) -> list[str]:
    """Return the names that an xml file of an image may have: "a" and "camera_1/a" for camera_1/a.jpg."""
    *folders, name = Path(image_file).with_suffix("").parts
    return ["/".join([*folders[start:], name]) for start in range(len(folders) + 1)]


def _named_images(root: ElementTree.Element, files: list[str]) -> list[str]:
    """Return those of several images with the stem of an xml file that its <filename> and <folder> select."""
    name = (root.findtext("filename") or "").replace("\\", "/").strip()
    folder = Path((root.findtext("folder") or "").replace("\\", "/").strip()).name
    for selects in (
        lambda file: file.as_posix() == name,
        lambda file: f"/{file.as_posix()}".endswith(f"/{name}"),
        lambda file: file.name == Path(name).name,
        lambda file: file.parent.name == folder,
    ):
        if len(files) > 1:
            files = [file for file in files if selects(Path(file))] or files
    return files


def _split_stems(folder: Path, split: str, known: Collection[str]) -> list[str]:
    """Return the names in a list of ImageSets, without the second column of a list that is about one class.

    Args:
        known: names of xml files; they may contain spaces.
    """
    file = folder / "ImageSets" / "Main" / f"{split}.txt"
    try:
        lines = [line for text in read_text(file).splitlines() if (line := text.strip())]
    except OSError as error:
        existing = ", ".join(sorted(path.stem for path in file.parent.glob("*.txt"))) or "none"
        raise DataError(
            f"{file} cannot be read ({error.strerror}); existing splits: {existing}; split: null selects all images"
        ) from error
    names = [(line, re.sub(r"\s+(-1|0|1)$", "", line), line.split()[0]) for line in lines]
    return [next((name for name in candidates if name in known), candidates[1]) for candidates in names]
