"""Annotation files of a folder: the format of each, and the splits that their names or columns `split` state."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias

from vg.data.detection.issues import Issues
from vg.data.detection.line_files import LineFiles
from vg.data.detection.odvg import OdvgConfig
from vg.data.detection.voc import VocConfig
from vg.data.expressions import CLASS, IMAGE, PHRASE, SPLIT, CsvConfig, read_rows, split_of
from vg.errors import DataError

Splits: TypeAlias = dict[str, dict[str, Any]]  # settings of datasets by split
FileFormat: TypeAlias = Literal["coco", "odvg", "csv"]
TITLES: dict[FileFormat, str] = {"coco": "COCO", "odvg": "ODVG", "csv": "expressions"}
SUFFIXES = (".json", ".jsonl", ".csv")
# The first one is for training; of the others, the first existing one is for evaluation.
SPLITS = ("train", "val", "valid", "validation", "dev", "test")


def annotation_files(*folders: Path) -> list[Path]:
    """Return the files of folders that may be annotations."""
    files = (file for folder in folders for file in folder.glob("*") if file.suffix.lower() in SUFFIXES)
    return sorted(file for file in files if not _is_label_map(file))


def files_of_split_folders(folder: Path) -> list[Path]:
    """Return the file of each folder `train`, `val`, ... that has only one with annotations, as Roboflow exports it."""
    files = ([*filter(has_annotations, annotation_files(folder / split))] for split in SPLITS)
    return [file for of_split in files if len(of_split) == 1 for file in of_split]


def file_format(file: Path) -> FileFormat:
    """Return the name of the dataset that reads a file."""
    if file.suffix.lower() == ".csv":
        return "csv"
    if file.suffix.lower() == ".json":
        return "coco"
    with file.open("rb") as lines:
        text = next((line for line in lines if line.strip()), b"")
    try:
        keys = set(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return "odvg"  # whose reader reports the line
    return "csv" if keys & {*PHRASE, *CLASS} and keys & {*IMAGE} else "odvg"


def has_annotations(file: Path) -> bool:
    """Whether a file contains annotations; a json file may contain anything, such as a list of classes."""
    return file.suffix.lower() != ".json" or b'"annotations"' in file.read_bytes()


def splits_of_files(folder: Path, files: Sequence[Path]) -> Splits:
    """Return the settings for the files of a folder, which have the same format.

    Raises:
        DataError: it is not clear which split a file belongs to.
    """
    if len(files) == 1:
        return splits_of_file(files[0])
    split_of = {file: next((split for split in SPLITS if split in _words(file, folder)), None) for file in files}
    by_split = {split: [file for file in files if split_of[file] == split] for split in SPLITS}
    if not any(by_split.values()) or any(len(named) > 1 for named in by_split.values()):
        raise DataError(
            f"{folder} has {_listed(files, folder)}: name the file to use, or one for each split (train.json, val.json)"
        )
    if unclear := [file for file in files if split_of[file] is None]:
        raise DataError(
            f"{folder}: not clear which split {_listed(unclear, folder)} belongs to; merge it with the file of a "
            "split, or move it to another folder"
        )
    return with_same_classes({split: _settings(named[0]) for split, named in by_split.items() if named})


def splits_of_file(file: Path) -> Splits:
    """Return the settings for one file, or for each split that its column `split` names.

    Raises:
        DataError: the column is empty in some rows.
    """
    settings = _settings(file)
    rows = [row for _, row in read_rows(file)] if settings["name"] == "csv" else []
    if not any(SPLIT in row for row in rows):
        return {"train": settings}
    cells = set(map(split_of, rows))
    if "" in cells:
        raise DataError(f"{file}: the column {SPLIT!r} is empty in some rows; fill it in, or rename it to use all rows")
    names = [split for split in SPLITS if split in cells] + sorted(cells - set(SPLITS))
    return {split: settings | {"split": split} for split in names}


def with_same_classes(splits: Splits) -> Splits:
    """Return the settings of the splits of a folder, whose prompts have the classes of all."""
    names = [_classes(settings) for settings in splits.values()]
    if all(own == names[0] for own in names):
        return splits
    classes = [*dict.fromkeys(chain(*names))]  # in the order of the training data
    return {
        split: settings | {"classes": sorted(classes) if settings["name"] == "voc" else classes}
        for split, settings in splits.items()
    }


def _classes(settings: Mapping[str, Any]) -> list[str]:
    """Return the classes that only the annotations name, not a table of them; none if they cannot be read."""
    path, issues = Path(settings["path"]), Issues()
    try:
        if settings["name"] == "voc":
            return VocConfig(path=str(path)).read(issues).names
        if settings["name"] == "csv" and not next(read_rows(path), ("", {}))[1].keys() & {*PHRASE}:
            return CsvConfig(path=str(path)).read(issues).names
        if settings["name"] == "odvg" and "label_map" not in settings:
            label_map = OdvgConfig(path=str(path)).read_labels(LineFiles(path), issues)
            return [name for _, name in (label_map or {}).values()]
    except DataError:  # reading the dataset raises it
        pass
    return []


def _settings(file: Path) -> dict[str, Any]:
    name = file_format(file)
    return {"name": name, "path": str(file), **(_label_map(file) if name == "odvg" else {})}


def _label_map(file: Path) -> dict[str, str]:
    """Find the only json file beside `file` that maps labels to names, as released datasets have it."""
    found = []
    for candidate in file.parent.glob("*label*map*.json"):
        try:
            names = json.loads(candidate.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(names, dict) and all(map(str.isdigit, names)):
            found.append(str(candidate))
    return {"label_map": found[0]} if len(found) == 1 else {}


def _is_label_map(file: Path) -> bool:
    return bool(re.fullmatch(r".*label.*map.*\.json", file.name)) and str(file) == _label_map(file).get("label_map")


def _words(file: Path, folder: Path) -> set[str]:
    """Words that may name the split in annotations/instances_val2017.json or valid/_annotations.coco.json."""
    name = file.relative_to(folder).with_suffix("").as_posix().lower().replace("trainval", "train")
    return {word.rstrip("0123456789") for word in re.split(r"[/\-._]", name)}


def _listed(files: Sequence[Path], folder: Path) -> str:
    return ", ".join(str(file.relative_to(folder)) for file in files[:10])
