"""Detects the dataset format at a path: COCO json, ODVG jsonl, a Pascal VOC folder or a YOLO folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vg.data.detection.yolo import read_document
from vg.errors import DataError

_SPLITS = ("train", "val", "valid", "test")  # the first existing one is for training, the others for evaluation


def detect_format(path: Path) -> dict[str, dict[str, Any]]:
    """Return the settings of the datasets at a path, by split: one for a file, all its splits for a folder.

    Returns:
        An empty dict if the path is the configuration of a run.

    Raises:
        DataError: the path is not a dataset, or ambiguous; the message lists the candidates.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; give the path of a configuration or a dataset")
    if path.is_dir():
        return _detect_folder(path)
    if path.suffix in (".yaml", ".yml"):
        return _yolo_splits(path)
    if path.suffix == ".jsonl":
        return {"train": {"name": "odvg", "path": str(path), **_label_map(path)}}
    if path.suffix == ".json":
        return {"train": {"name": "coco", "path": str(path)}}
    raise DataError(
        f"{path} is not a dataset: expected a .json (COCO), a .jsonl (ODVG), a folder with Annotations and JPEGImages "
        "(Pascal VOC), or a folder with data.yaml (YOLO)"
    )


def _detect_folder(folder: Path) -> dict[str, dict[str, Any]]:
    for file in (folder / "data.yaml", folder / "data.yml"):
        if file.is_file():
            return _yolo_splits(file) or {"train": {"name": "yolo", "path": str(file)}}
    if (folder / "Annotations").is_dir() or next(folder.glob("*.xml"), None):
        splits = [split for split in _SPLITS if (folder / "ImageSets" / "Main" / f"{split}.txt").is_file()]
        voc = {"name": "voc", "path": str(folder)}
        return {split: voc | {"split": split} for split in splits} if splits else {"train": voc}
    roboflow = list(folder.glob("*/_annotations.coco.json"))
    files = sorted([*folder.glob("*.json"), *folder.glob("annotations/*.json"), *roboflow])
    if len(files) == 1:
        return {"train": {"name": "coco", "path": str(files[0])}}
    by_split = {split: [file for file in files if split in _words(file, folder)] for split in _SPLITS}
    if any(by_split.values()) and all(len(named) <= 1 for named in by_split.values()):
        root = {} if roboflow else {"image_root": str(folder)}
        return {split: {"name": "coco", "path": str(named[0]), **root} for split, named in by_split.items() if named}
    known = ", ".join(str(file.relative_to(folder)) for file in files[:10]) or "no json file either"
    raise DataError(
        f"{folder} has neither data.yaml (YOLO) nor Annotations (Pascal VOC); it has {known}: name the file to check"
    )


def _words(file: Path, folder: Path) -> set[str]:
    """Words that may name the split in annotations/instances_val2017.json or valid/_annotations.coco.json."""
    name = str(file.relative_to(folder).with_suffix("")).lower()
    return {word.rstrip("0123456789") for word in re.split(r"[/\-._]", name)}


def _yolo_splits(file: Path) -> dict[str, dict[str, Any]]:
    """Return the settings of all splits of a YOLO data.yaml; an empty dict for any other file."""
    try:
        document = read_document(file)
    except DataError:
        return {}  # reading it as a configuration raises the error
    if "names" not in document or "data" in document:
        return {}
    splits = [split for split in _SPLITS if document.get(split)] or ["train"]
    return {split: {"name": "yolo", "path": str(file), "split": split} for split in splits}


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
