"""The original RefCOCO release: `refs(unc).p`, a Python 2 pickle, joined with `instances.json` beside it."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any, NoReturn

from vg.data.source import DataError


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
    return {file.name[len("refs(") : -len(").p")]: file for file in sorted(folder.glob("refs(*).p"))}


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

    Boxes come from instances.json by `ann_id`. So do image files, by `image_id`: the `file_name` of a ref is none, it
    has the number of the annotation in it. What instances.json lacks is None in the row, an error of that sample only.

    Raises:
        DataError: one of the two files is missing, damaged or not what its name says.
    """
    instances_file = file.with_name("instances.json")
    refs = load_plain_pickle(file)
    try:
        instances = json.loads(instances_file.read_bytes())
        boxes = {annotation["id"]: annotation["bbox"] for annotation in instances["annotations"]}
        images = {image["id"]: image["file_name"] for image in instances["images"]}
    except FileNotFoundError as error:
        raise DataError(f"{instances_file} is missing: the boxes are in it; place it beside {file.name}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{instances_file} is no COCO annotation file ({error!r}); fetch it again") from error
    try:
        return [
            {
                "file_name": images.get(ref["image_id"]),
                "image_id": ref["image_id"],
                "ann_id": ref["ann_id"],
                "ref_id": ref["ref_id"],
                "split": ref["split"],
                "bbox": boxes.get(ref["ann_id"]),
                "sent": sentence["sent"],
            }
            for ref in refs
            for sentence in ref["sentences"] or [{"sent": None}]  # a ref without words is an error, not a gap
        ]
    except (KeyError, TypeError) as error:
        raise DataError(f"{file} is no list of refs ({error!r}); fetch the file of the original release") from error
