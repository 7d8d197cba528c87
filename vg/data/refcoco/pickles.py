"""The original releases: `refs(unc).p`, a Python 2 pickle, or gRefCOCO's `grefs(unc).json`, with `instances.json`."""

from __future__ import annotations

import io
import json
import pickle
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from vg.errors import DataError


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, text and numbers; the release has nothing else, and anything else could run code."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it wants to import {module}.{name}, and only plain values are read")


def load_plain_pickle(file: Path) -> Any:
    """The lists, dicts, text and numbers in a pickle; DataError, and nothing executed, if it holds anything else."""
    try:
        # latin1 maps every byte of Python 2's str to a character; RefCOCO's sentences are ASCII.
        return _PlainUnpickler(io.BytesIO(file.read_bytes()), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises whatever its opcodes run into
        raise DataError(f"{file} cannot be read ({error}); fetch the file of the original release again") from error


def refs_files(folder: Path) -> dict[str, Path]:
    """The refs files of a folder by partition: {"unc": .../refs(unc).p, "google": .../refs(google).p}."""
    return {partition_of(file): file for file in sorted([*folder.glob("refs(*).p"), *folder.glob("grefs(*).json")])}


def partition_of(file: Path) -> str:
    """.../refs(unc).p -> "unc"."""
    return file.stem.partition("(")[2].removesuffix(")")


def is_refs_file(file: Path) -> bool:
    return file.suffix == ".p" or is_generalized(file)


def is_generalized(file: Path) -> bool:
    """Whether this is a refs file of gRefCOCO, whose expressions name any number of things, also none."""
    return file.name.startswith("grefs(") and file.suffix == ".json"


def choose_refs_file(folder: Path, partition: str | None) -> tuple[str, Path]:
    """(partition, file); DataError, listing the choices, unless `partition` is one of them or there is only one."""
    files = refs_files(folder)
    if partition is None and len(files) == 1:
        return next(iter(files.items()))
    if partition not in files:
        raise DataError(f"{folder} holds the partitions {', '.join(files)}; set partition to one of them")
    return partition, files[partition]


def read_refs(file: Path) -> list[dict[str, Any]]:
    """One row per expression, all splits: the columns of our json lines (`sent`, `bbox` xywh, ...) and `split`.

    Boxes come from instances.json by `ann_id`, in gRefCOCO a list of any length. So do image files, by `image_id`: the
    `file_name` of a ref is none, it has the number of the annotation in it. What instances.json lacks is None in the
    row, an error of that sample only. `others` counts the things of the same class in the picture. The splits of one
    file share what this reads.

    Raises:
        DataError: one of the two files is missing, damaged or not what its name says.
    """
    instances_file = file.with_name("instances.json")
    states = [each.stat() for each in (file, instances_file) if each.is_file()]
    return _read_refs(file, instances_file, tuple((state.st_mtime_ns, state.st_size) for state in states))


@lru_cache(maxsize=1)
def _read_refs(file: Path, instances_file: Path, states: tuple[tuple[int, int], ...]) -> list[dict[str, Any]]:
    """As above; `states` makes a file that has changed another one."""
    refs = _load_json(file) if is_generalized(file) else load_plain_pickle(file)
    try:
        instances = json.loads(instances_file.read_bytes())
        boxes = {annotation["id"]: annotation["bbox"] for annotation in instances["annotations"]}
        images = {image["id"]: image["file_name"] for image in instances["images"]}
        things = Counter((each.get("image_id"), each.get("category_id")) for each in instances["annotations"])
    except FileNotFoundError as error:
        raise DataError(f"{instances_file} is missing: the boxes are in it; place it beside {file.name}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{instances_file} is no COCO annotation file ({error!r}); fetch it again") from error
    try:
        return [
            (_named_things(ref, boxes) if is_generalized(file) else _named_thing(ref, boxes, things))
            | {"file_name": images.get(ref["image_id"]), "split": ref["split"], "sent": sentence["sent"]}
            for ref in refs
            for sentence in ref["sentences"] or [{"sent": None}]  # a ref without words is an error, not a gap
        ]
    except (KeyError, TypeError) as error:
        raise DataError(f"{file} is no list of refs ({error!r}); fetch the file of the original release") from error


def _named_thing(ref: dict[str, Any], boxes: dict[int, list[float]], things: Counter[Any]) -> dict[str, Any]:
    category = ref.get("category_id")
    others = things[ref["image_id"], category] - 1 if category is not None else None
    return {"ann_id": ref["ann_id"], "bbox": boxes.get(ref["ann_id"]), "category_id": category, "others": others}


def _named_things(ref: dict[str, Any], boxes: dict[int, list[float]]) -> dict[str, Any]:
    """The number of none, in gRefCOCO, is -1."""
    ids = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
    return {"ann_id": ref["ref_id"], "boxes": [] if ids == [-1] else [boxes.get(each) for each in ids]}


def _load_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file} cannot be read ({error}); fetch the file of the original release again") from error
