"""Reads Pascal VOC and YOLO folders without giving up; every other data set is asked for its samples one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from tqdm import tqdm

from vg.data.check.findings import Box, Findings, Picture, Reading
from vg.data.check.reading import REMOVE, four_numbers, size_of
from vg.data.detection.voc import SIDES, VocConfig, split_names
from vg.data.detection.yolo import YoloConfig, class_names, label_file, read_document, split_pictures
from vg.data.images import list_images
from vg.data.source import HasImageKeys, Source, checked
from vg.errors import BadSampleError


def read_voc(config: VocConfig, reading: Reading, findings: Findings) -> None:
    """The numbers of a box are xmin, ymin, xmax, ymax in pixels, counted from 1."""
    folder = Path(config.path)
    notes = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    files = {Path(file).stem: file for file in list_images(reading.root)}
    stems = [file.stem for file in sorted(notes.glob("*.xml"))]
    if config.split is None:
        mend = "annotate them, or write an xml file without objects if nothing is on them"
        alone = [files[stem] for stem in sorted(files.keys() - set(stems))]
        findings.add("note", reading.set, "pictures without an xml file, which are not used", mend, alone)
    asked = stems if config.split is None else split_names(folder, config.split)
    lost = [f"{config.split}.txt: {stem}" for stem in asked if stem not in set(stems)]
    findings.add("error", reading.set, "listed names without an xml file", "add it, or remove the name", lost)
    labels = {name: number for number, name in enumerate(config.classes or [])}
    for stem in asked:
        file = notes / f"{stem}.xml"
        if not file.is_file():
            continue
        try:
            root = ElementTree.parse(file).getroot()
        except (ElementTree.ParseError, OSError) as error:
            findings.add("error", reading.set, "xml files that cannot be read", REMOVE, [f"{file}: {error}"])
            continue
        size = size_of({side: _number(root.findtext(f"size/{side}")) for side in ("height", "width")})
        number = len(reading.pictures)
        name = files.get(stem, root.findtext("filename") or f"{stem}.jpg")
        reading.pictures.append(Picture(file.name, name, size))
        for place, thing in enumerate(root.iter("object"), start=1):
            where, name = f"{file.name}, object {place}", (thing.findtext("name") or "").strip()
            values = four_numbers([_number(thing.findtext(f"bndbox/{side}")) for side in SIDES])
            if values is None or not name:
                what = f"objects without a name or a number for each of {', '.join(SIDES)}"
                findings.add("error", reading.set, what, REMOVE, [f"{where}: {name!r}"], [number])
            elif config.classes is not None and name not in labels:
                mend = f"add it to classes ({', '.join(config.classes[:10])}), or mend its spelling"
                findings.add("error", reading.set, "objects of an unknown class", mend, [f"{where}: {name}"], [number])
            else:
                label = labels.setdefault(name, len(labels))
                reading.boxes.append(Box(number, where, values, label, thing.findtext("difficult") == "1"))
    reading.names = list(labels)
    reading.num_classes = len(labels)


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def read_yolo(config: YoloConfig, reading: Reading, findings: Findings) -> None:
    """The numbers of a box are x and y of its centre, width and height in 0..1 of the picture."""
    file = Path(config.path)
    file = file / "data.yaml" if file.is_dir() else file
    document = read_document(file)
    reading.names = class_names(document, file)
    reading.num_classes = len(reading.names)
    root = (file.resolve().parent / str(document.get("path") or ".")).resolve()
    reading.root = root if root.is_dir() else file.resolve().parent
    alone = []
    for number, picture in enumerate(split_pictures(document, config.split, reading.root, file)):
        label = label_file(picture)
        name = picture.relative_to(reading.root) if picture.is_relative_to(reading.root) else picture
        reading.pictures.append(Picture(label.name, str(name), (0, 0)))
        if not label.is_file():
            alone.append(f"{name}: there is no {label}")
            continue
        for place, line in enumerate(label.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if line.strip():
                _yolo_line(line, number, f"{label.name}, line {place}", reading, findings)
    mend = "nothing, if there is nothing on them; else put the labels where the message looks"
    findings.add("note", reading.set, "pictures without a label file", mend, alone)


def _yolo_line(line: str, picture: int, where: str, reading: Reading, findings: Findings) -> None:
    example = [f"{where}: {line[:80]}"]
    values = [_number(word) for word in line.split()]
    numbers = [value for value in values[1:] if value is not None]
    label = -1 if not values or values[0] is None or values[0] != values[0] // 1 else int(values[0])
    if len(numbers) < 4 or len(numbers) % 2 or len(numbers) < len(values) - 1:
        mend = "a line is: class x y width height, or: class and x y of each corner"
        findings.add("error", reading.set, "label lines that cannot be read", mend, example, [picture])
    elif not 0 <= label < reading.num_classes:
        mend = f"classes count from 0 to {reading.num_classes - 1} as in names of data.yaml; correct one of them"
        findings.add("error", reading.set, "classes that data.yaml does not name", mend, example, [picture])
    elif max(map(abs, numbers)) > 1.01:
        mend = "divide x and width by the width of the picture in pixels, y and height by its height"
        findings.add("error", reading.set, "coordinates beyond 0..1", mend, example, [picture])
    else:
        if len(numbers) > 4:  # a polygon
            low, high = (np.array((f(numbers[::2]), f(numbers[1::2]))) for f in (min, max))
            numbers = [*((low + high) / 2).tolist(), *(high - low).tolist()]
        reading.boxes.append(Box(picture, where, (numbers[0], numbers[1], numbers[2], numbers[3]), label))


def read_samples(source: Source, reading: Reading, findings: Findings, quick: int | None) -> None:
    """Load the samples as training does, or `quick` of them; the numbers of a box are left, top, right, bottom."""
    phrases: dict[str, int] = {}
    indices: list[int] = []
    keys = source.image_keys() if isinstance(source, HasImageKeys) else None
    reading.keys = None if keys is None else []
    chosen = spread(len(source), quick)
    for index in tqdm(chosen, desc=f"{reading.set}: samples", unit=" samples", mininterval=1):
        try:
            sample = checked(source.load(index, 0))
        except BadSampleError as error:
            mend = "see each message; data.bad_samples=skip goes on without them"
            findings.add("error", reading.set, "samples that cannot be used", mend, [str(error)])
            continue
        number = len(reading.pictures)
        indices.append(index)
        reading.pictures.append(Picture(f"sample {sample.id}", sample.id, sample.image.shape[:2]))
        if keys is not None and reading.keys is not None:
            reading.keys.append(keys[index])
        labels = [phrases.setdefault(phrase.casefold(), len(phrases)) for phrase in sample.phrases]
        for box, phrase in zip(sample.boxes.tolist(), sample.phrase_ids.tolist(), strict=True):
            reading.boxes.append(Box(number, f"sample {sample.id}", tuple(box), labels[phrase]))
    reading.names = list(phrases)
    reading.load = lambda number: source.load(indices[number], 0).image


def spread(length: int, number: int | None) -> Sequence[int]:
    """All places of a list, or so many, evenly spaced."""
    if number is None or number >= length:
        return range(length)
    return np.linspace(0, length - 1, number).round().astype(int).tolist()
