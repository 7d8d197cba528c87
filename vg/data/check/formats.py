"""Detects the dataset format at a path: COCO json, ODVG jsonl, Pascal VOC, YOLO, expressions, or shards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias

from vg.data.detection.issues import Issues
from vg.data.detection.line_files import SETTINGS, LineFiles
from vg.data.detection.odvg import OdvgConfig
from vg.data.detection.voc import VocConfig
from vg.data.detection.yolo import read_document
from vg.data.expressions import CLASS, IMAGE, PHRASE, SPLIT, CsvConfig, read_rows
from vg.data.shards.index import SAMPLES
from vg.data.shards.storage import UNFINISHED
from vg.errors import DataError
from vg.files import read_json, read_text

Kind: TypeAlias = Literal["coco", "odvg", "csv"]
_TITLES: dict[Kind, str] = {"coco": "COCO", "odvg": "ODVG", "csv": "expressions"}
_SUFFIXES = (".json", ".jsonl", ".csv")
# The first one is for training; of the others, the first existing one is for evaluation.
_SPLITS = ("train", "val", "valid", "validation", "dev", "test")


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
        found = _detect_folder(path)
    elif path.suffix in (".yaml", ".yml"):
        found = _yolo_splits(path)
    elif path.suffix.lower() in _SUFFIXES:
        found = _file_splits(path)
    else:
        raise DataError(
            f"{path} is not a dataset: expected a .json (COCO), a .jsonl (ODVG, or expressions), a .csv (expressions), "
            "a folder with Annotations and JPEGImages (Pascal VOC), or a folder with data.yaml (YOLO)"
        )
    if found and "train" not in found:
        raise DataError(
            f"{path} has {' and '.join(found)}, but no train: name the part to train on train (the file, the list in "
            "ImageSets/Main, the key in data.yaml, or the cells of the column split)"
        )
    return found


def _detect_folder(folder: Path) -> dict[str, dict[str, Any]]:
    if (folder / SAMPLES).is_file() or (folder / UNFINISHED).is_file():
        return {"train": {"name": "shards", "path": str(folder)}}
    if (folder / SETTINGS).is_file() and next(folder.glob("*.jsonl"), None):
        return {"train": _of_labels(folder)}
    yolo = next((folder / name for name in ("data.yaml", "data.yml") if (folder / name).is_file()), None)
    voc = _is_voc(folder)
    yolo_guess = None if yolo else _other_yaml(folder)
    voc_splits = {split: folder / split for split in _SPLITS if _is_voc(folder / split)}
    roboflow = list(folder.glob("*/_annotations.coco.json"))
    nearby = [*folder.glob("*"), *folder.glob("annotations/*")]
    files = sorted({*roboflow, *(file for file in nearby if file.suffix.lower() in _SUFFIXES)})
    files = [file for file in files if not _is_label_map(file)]
    if yolo or voc or yolo_guess or voc_splits:
        annotated = [file for file in files if file.suffix.lower() != ".json" or b'"annotations"' in file.read_bytes()]
        if annotated:  # other YAML files, and xml files in folders, may have nothing to do with the data
            yolo_guess, voc_splits = None, {}
        yolo = yolo or yolo_guess
        files = annotated if yolo or voc or voc_splits else files
    file_of = {_kind(file): file for file in files}
    found = [f"{yolo.name} (YOLO)"] if yolo else []
    found += ["xml files (Pascal VOC)"] * voc
    found += [f"xml files in {', '.join(voc_splits)} (Pascal VOC)"] * bool(voc_splits)
    found += [f"{file.relative_to(folder)} ({_TITLES[kind]})" for kind, file in file_of.items()]
    if len(found) > 1:
        raise DataError(
            f"{folder} has annotations in several formats, {' and '.join(found)}: name the file to use, or move the "
            "others to another folder"
        )
    if yolo:
        return _yolo_splits(yolo) or {"train": {"name": "yolo", "path": str(yolo)}}
    if voc:
        lists = {file.stem for file in (folder / "ImageSets" / "Main").glob("*.txt")}
        settings = {"name": "voc", "path": str(folder)}
        splits = {split: settings | {"split": split} for split in _SPLITS if split in lists}
        if "trainval" in lists and "train" not in lists:
            splits = {"train": settings | {"split": "trainval"}} | splits
        return splits or {"train": settings}
    if voc_splits:
        return _with_same_classes({split: {"name": "voc", "path": str(path)} for split, path in voc_splits.items()})
    root = {} if roboflow else {"image_root": str(folder)}
    if len(files) == 1:
        settings = root if file_of.keys() != {"coco"} and files[0].parent != folder else {}
        return {split: values | settings for split, values in _file_splits(files[0]).items()}
    split_of = {file: next((split for split in _SPLITS if split in _words(file, folder)), None) for file in files}
    by_split = {split: [file for file in files if split_of[file] == split] for split in _SPLITS}
    names = [str(file.relative_to(folder)) for file in files]
    if any(by_split.values()) and all(len(named) <= 1 for named in by_split.values()):
        # Other json files, such as a list of classes, are no annotations.
        unclear = [
            name
            for name, file in zip(names, files, strict=True)
            if split_of[file] is None and (_kind(file) != "coco" or b'"annotations"' in file.read_bytes())
        ]
        if unclear:
            raise DataError(
                f"{folder}: not clear which split {', '.join(unclear[:10])} belongs to; merge it with the file of a "
                "split, or move it to another folder"
            )
        return _with_same_classes({split: _settings(named[0]) | root for split, named in by_split.items() if named})
    if files:
        raise DataError(
            f"{folder} has {', '.join(names[:10])}: name the file to use, or one for each split (train.json, val.json)"
        )
    raise DataError(
        f"{folder} has neither data.yaml (YOLO) nor Annotations (Pascal VOC), and no .json, .jsonl or .csv file either"
        + _yolo_advice(folder)
    )


def _with_same_classes(splits: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
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


def _is_voc(folder: Path) -> bool:
    return (folder / "Annotations").is_dir() or next(folder.glob("*.xml"), None) is not None


def _other_yaml(folder: Path) -> Path | None:
    """Return the only YAML file that describes a YOLO dataset."""
    found = [file for pattern in ("*.yaml", "*.yml") for file in folder.glob(pattern) if _yolo_splits(file)]
    return found[0] if len(found) == 1 else None


def _yolo_advice(folder: Path) -> str:
    """Return the data.yaml that YOLO labels without one need, as a message; "" if there are none."""
    classes = folder / "classes.txt"
    if not (classes.is_file() or next((folder / "labels").rglob("*.txt"), None)):
        return ""
    names = read_text(classes).split("\n") if classes.is_file() else ["first class", "second class"]
    listed = json.dumps([name.strip() for name in names if name.strip()], ensure_ascii=False)
    images = "images" if (folder / "images").is_dir() else "."
    splits = [split for split in _SPLITS if (folder / images / split).is_dir()]
    lines = [f"{split}: {images}/{split}" for split in splits] or [f"train: {images}"]
    return f"; for its YOLO labels, write {folder / 'data.yaml'} with the lines\n" + "\n".join(
        [*lines, f"names: {listed}"]
    )


def _of_labels(folder: Path) -> dict[str, str]:
    """Return the settings for a folder that vg label has written, with the images that it has labeled."""
    data = str(read_json(folder / SETTINGS, dict).get("data", ""))
    if (Path(data) / SAMPLES).is_file() or "://" in data:
        return {"name": "shards", "path": data, "labels": str(folder)}
    return {"name": "odvg", "path": str(folder)} | ({"image_root": data} if Path(data).is_dir() else {})


def _kind(file: Path) -> Kind:
    """Return the name of the dataset that reads a file; raises DataError for JSON lines that none reads."""
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


def _settings(file: Path) -> dict[str, Any]:
    kind = _kind(file)
    return {"name": kind, "path": str(file), **(_label_map(file) if kind == "odvg" else {})}


def _file_splits(file: Path) -> dict[str, dict[str, Any]]:
    """Return the settings for one file, or for each split that its column `split` names.

    Raises:
        DataError: the column is empty in some rows.
    """
    settings = _settings(file)
    rows = [row for _, row in read_rows(file)] if settings["name"] == "csv" else []
    if not any(SPLIT in row for row in rows):
        return {"train": settings}
    cells = {str(row.get(SPLIT) or "").strip() for row in rows}
    if "" in cells:
        raise DataError(f"{file}: the column {SPLIT!r} is empty in some rows; fill it in, or rename it to use all rows")
    names = [split for split in _SPLITS if split in cells] + sorted(cells - set(_SPLITS))
    return {split: settings | {"split": split} for split in names}


def _is_label_map(file: Path) -> bool:
    return bool(re.fullmatch(r".*label.*map.*\.json", file.name)) and str(file) == _label_map(file).get("label_map")


def _words(file: Path, folder: Path) -> set[str]:
    """Words that may name the split in annotations/instances_val2017.json or valid/_annotations.coco.json."""
    name = str(file.relative_to(folder).with_suffix("")).lower().replace("trainval", "train")
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
