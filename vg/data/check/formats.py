"""Which data set lies at a path: a COCO json, an ODVG jsonl, a Pascal VOC folder or a YOLO folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from vg.errors import DataError

_SPLITS = ("train", "val", "valid", "test")  # the first one there is trains, the others evaluate


def detect_format(path: Path) -> dict[str, dict[str, Any]]:
    """Settings of the data sets at a path, by split: one for a file, all its splits for a folder.

    Returns:
        Nothing where the path is the configuration of a run.

    Raises:
        DataError: nothing there is a data set, or there is more than one can tell apart; the message lists them.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; name a configuration or a data set")
    if path.is_dir():
        return _folder(path)
    if path.suffix in (".yaml", ".yml"):
        return _yolo(path) if _is_yolo(path) else {}
    if path.suffix == ".jsonl":
        return {"train": {"name": "odvg", "path": str(path), **_label_map(path)}}
    if path.suffix == ".json":
        return {"train": {"name": "coco", "path": str(path)}}
    raise DataError(
        f"{path} is no data set: that is a .json (COCO), a .jsonl (ODVG), a folder with Annotations and JPEGImages "
        "(Pascal VOC), or a folder with data.yaml (YOLO)"
    )


def _folder(folder: Path) -> dict[str, dict[str, Any]]:
    for name in ("data.yaml", "data.yml"):
        if (folder / name).is_file():
            return _yolo(folder / name)
    if (folder / "Annotations").is_dir() or next(folder.glob("*.xml"), None):
        lists = folder / "ImageSets" / "Main"
        splits = [split for split in _SPLITS if (lists / f"{split}.txt").is_file()]
        voc = {"name": "voc", "path": str(folder)}
        return {split: voc | {"split": split} for split in splits} if splits else {"train": voc}
    files = [*folder.glob("*.json"), *folder.glob("annotations/*.json"), *folder.glob("*/_annotations.coco.json")]
    sets = {split: [file for file in sorted(files) if split in _words(file, folder)] for split in _SPLITS}
    found = {split: named[0] for split, named in sets.items() if len(named) == 1}
    if len(files) == 1:
        return {"train": {"name": "coco", "path": str(files[0])}}
    if found and all(len(named) <= 1 for named in sets.values()):
        root = {} if next(folder.glob("*/_annotations.coco.json"), None) else {"image_root": str(folder)}
        return {split: {"name": "coco", "path": str(file), **root} for split, file in found.items()}
    known = ", ".join(str(file.relative_to(folder)) for file in sorted(files)[:10]) or "no json file either"
    raise DataError(
        f"{folder} has neither data.yaml (YOLO) nor Annotations (Pascal VOC); it has {known}: name the file to check"
    )


def _words(file: Path, folder: Path) -> set[str]:
    """What tells the split in annotations/instances_val2017.json or valid/_annotations.coco.json."""
    name = str(file.relative_to(folder).with_suffix("")).lower()
    return {word.rstrip("0123456789") for word in name.replace("/", "_").replace("-", "_").replace(".", "_").split("_")}


def _is_yolo(file: Path) -> bool:
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return False  # whoever reads it as a configuration says what is wrong
    return isinstance(document, dict) and "names" in document and "data" not in document


def _yolo(file: Path) -> dict[str, dict[str, Any]]:
    document = yaml.safe_load(file.read_text(encoding="utf-8")) if _is_yolo(file) else {}
    splits = [split for split in _SPLITS if document.get(split)] or ["train"]
    return {split: {"name": "yolo", "path": str(file), "split": split} for split in splits}


def _label_map(file: Path) -> dict[str, str]:
    """The only json file beside it that maps numbers to names, as published sets have it."""
    found = []
    for other in sorted(file.parent.glob("*label*map*.json")):
        try:
            names = json.loads(other.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(names, dict) and all(str(label).isdigit() for label in names):
            found.append(str(other))
    return {"label_map": found[0]} if len(found) == 1 else {}
