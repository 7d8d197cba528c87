"""Detects the dataset format at a path: COCO json, ODVG jsonl, Pascal VOC, YOLO, expressions, or shards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vg.data.check.files import (
    SPLITS,
    SUFFIXES,
    TITLES,
    Splits,
    annotation_files,
    file_format,
    files_of_split_folders,
    has_annotations,
    splits_of_file,
    splits_of_files,
    with_same_classes,
)
from vg.data.detection.line_files import SETTINGS
from vg.data.detection.voc import xml_folder
from vg.data.detection.yolo import read_document
from vg.data.shards.index import SAMPLES
from vg.data.shards.storage import UNFINISHED
from vg.errors import DataError
from vg.files import read_json, read_text


def detect_format(path: Path) -> Splits:
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
    elif path.suffix.lower() in SUFFIXES:
        found = splits_of_file(path)
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


class _Format(NamedTuple):
    """A format whose files are in a folder.

    Attributes:
        title: for messages.
        splits: reads the settings of its splits.
        certain: False if the files may have nothing to do with the data, so that any other annotations are preferred.
    """

    title: str
    splits: Callable[[], Splits]
    certain: bool = True


def _detect_folder(folder: Path) -> Splits:
    if written := _written_by_vg(folder):
        return written
    found, advice = [*_yolo(folder), *_voc(folder)], _yolo_advice(folder)
    certain = [candidate for candidate in found if candidate.certain]
    files = annotation_files(folder, folder / "annotations")
    if annotated := [file for file in files if has_annotations(file)]:
        found = [*certain, *_formats_of_files(folder, annotated)]
    elif files_of_splits := files_of_split_folders(folder):
        found = [*certain, *_formats_of_files(folder, files_of_splits)]
    elif not found and not advice:  # beside other annotations, a json file may contain anything
        found = _formats_of_files(folder, files)
    if len(found) > 1:
        titles = " and ".join(candidate.title for candidate in found)
        raise DataError(
            f"{folder} has annotations in several formats, {titles}: name the file to use, or move the others to "
            "another folder"
        )
    if not found:
        raise DataError(
            f"{folder} has neither data.yaml (YOLO) nor Annotations (Pascal VOC), and no .json, .jsonl or .csv file "
            "either" + advice
        )
    return found[0].splits()


def _formats_of_files(folder: Path, files: Sequence[Path]) -> list[_Format]:
    return [
        _Format(f"{file.relative_to(folder)} ({TITLES[name]})", partial(splits_of_files, folder, files))
        for name, file in {file_format(file): file for file in files}.items()
    ]


def _written_by_vg(folder: Path) -> Splits:
    """Return the settings of shards, or of a folder that vg label has written, with the images that it has labeled."""
    if (folder / SAMPLES).is_file() or (folder / UNFINISHED).is_file():
        return {"train": {"name": "shards", "path": str(folder)}}
    if not (folder / SETTINGS).is_file() or not next(folder.glob("*.jsonl"), None):
        return {}
    data = str(read_json(folder / SETTINGS, dict).get("data", ""))
    if (Path(data) / SAMPLES).is_file() or "://" in data:
        return {"train": {"name": "shards", "path": data, "labels": str(folder)}}
    root = {"image_root": data} if Path(data).is_dir() else {}
    return {"train": {"name": "odvg", "path": str(folder)} | root}


def _yolo(folder: Path) -> Iterator[_Format]:
    """Find data.yaml, or else the only YAML file that describes a YOLO dataset."""
    named = [folder / name for name in ("data.yaml", "data.yml") if (folder / name).is_file()]
    similar = [file for pattern in ("*.yaml", "*.yml") for file in folder.glob(pattern) if _yolo_splits(file)]
    for file in named[:1] or (similar if len(similar) == 1 else []):
        yield _Format(f"{file.name} (YOLO)", partial(_data_yaml_splits, file), certain=bool(named))


def _data_yaml_splits(file: Path) -> Splits:
    # The reader of the dataset reports what is missing in a data.yaml.
    return _yolo_splits(file) or {"train": {"name": "yolo", "path": str(file)}}


def _yolo_splits(file: Path) -> Splits:
    """Return the settings of all splits of a YOLO data.yaml; an empty dict for any other file."""
    try:
        document = read_document(file)
    except DataError:
        return {}  # reading it as a configuration raises the error
    if "names" not in document or "data" in document:
        return {}
    splits = [split for split in SPLITS if document.get(split)] or ["train"]
    return {split: {"name": "yolo", "path": str(file), "split": split} for split in splits}


def _yolo_advice(folder: Path) -> str:
    """Return the data.yaml that YOLO labels without one need, as a message; "" if there are none."""
    classes = next((folder / name for name in ("classes.txt", "obj.names") if (folder / name).is_file()), None)
    if not (classes or next((folder / "labels").rglob("*.txt"), None)):
        return ""
    names = read_text(classes).split("\n") if classes else ["first class", "second class"]
    listed = json.dumps([name.strip() for name in names if name.strip()], ensure_ascii=False)
    images = "images" if (folder / "images").is_dir() else "."
    folders = [(split, name) for split in SPLITS for name in (f"{images}/{split}", f"obj_{split}_data")]  # of CVAT
    lines = [f"{split}: {name}" for split, name in folders if (folder / name).is_dir()] or [f"train: {images}"]
    return f"; for its YOLO labels, write {folder / 'data.yaml'} with the lines\n" + "\n".join(
        [*lines, f"names: {listed}"]
    )


def _voc(folder: Path) -> Iterator[_Format]:
    """Find the xml files of the folder, and those of its folders train, val, ..., which may be something else."""
    if _has_xml(folder):
        xmls = xml_folder(folder)
        certain = xmls in (folder, folder / "Annotations")
        if len(splits := [split for split in SPLITS if xmls != folder and (xmls / split).is_dir()]) > 1:
            raise DataError(
                f"{xmls} has the folders {' and '.join(splits)}: move the xml files and images of each to a folder of "
                f"its own ({folder / splits[0]})"
            )
        yield _Format("xml files (Pascal VOC)", partial(_voc_splits, folder), certain)
    split_folders = {split: folder / split for split in SPLITS if _has_xml(folder / split)}
    if split_folders:
        settings: Splits = {split: {"name": "voc", "path": str(path)} for split, path in split_folders.items()}
        title = f"xml files in {', '.join(split_folders)} (Pascal VOC)"
        yield _Format(title, partial(with_same_classes, settings), certain=False)


def _has_xml(folder: Path) -> bool:
    return xml_folder(folder) != folder or next(folder.glob("*.xml"), None) is not None


def _voc_splits(folder: Path) -> Splits:
    """Return the settings for the lists in ImageSets/Main; without lists, all images are for training."""
    lists = {file.stem for file in (folder / "ImageSets" / "Main").glob("*.txt")}
    settings: dict[str, Any] = {"name": "voc", "path": str(folder)}
    splits = {split: settings | {"split": split} for split in SPLITS if split in lists}
    if "trainval" in lists and "train" not in lists:
        splits = {"train": settings | {"split": "trainval"}} | splits
    return splits or {"train": settings}
