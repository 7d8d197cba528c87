"""Reads original releases: `refs(unc).p` (Python 2 pickle) or `grefs(unc).json` (gRefCOCO), and `instances.json`."""

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
    """Unpickles containers, strings and numbers only: the releases contain nothing else, and classes could run code."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it imports {module}.{name}, but only plain values are allowed")


def load_plain(file: Path) -> Any:
    """Load lists, dicts, strings and numbers from a pickle or JSON; raises DataError, without running code."""
    try:
        if file.suffix == ".json":
            return json.loads(file.read_bytes())
        # latin1 decodes every byte of a Python 2 str; the sentences of RefCOCO are ASCII.
        return _PlainUnpickler(io.BytesIO(file.read_bytes()), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises whatever its opcodes run into
        raise DataError(f"{file} cannot be read ({error}); download the original release again") from error


def refs_files(folder: Path) -> dict[str, Path]:
    """Find the refs files of a folder by partition: {"unc": .../refs(unc).p, "google": .../refs(google).p}."""
    return {partition_of(file): file for file in sorted([*folder.glob("refs(*).p"), *folder.glob("grefs(*).json")])}


def partition_of(file: Path) -> str:
    """.../refs(unc).p -> "unc"."""
    return file.stem.partition("(")[2].removesuffix(")")


def read_refs(file: Path) -> list[dict[str, Any]]:
    """Read all splits, one row per expression: the columns of our JSON lines (`sent`, `bbox` xywh, ...) and `split`.

    Boxes are looked up in instances.json by `ann_id`, in gRefCOCO a list of any length; image files by `image_id`,
    because the `file_name` of a ref contains the annotation id and does not exist. What instances.json lacks becomes
    None, an error of that sample only. `others` is the number of other objects of the same category in the image.
    The result is cached because all splits are in one file.

    Raises:
        DataError: one of the two files is missing, damaged or has another format.
    """
    instances_file = file.with_name("instances.json")
    stats = [path.stat() for path in (file, instances_file) if path.is_file()]
    return _read_refs(file, instances_file, tuple((stat.st_mtime_ns, stat.st_size) for stat in stats))


@lru_cache(maxsize=1)
def _read_refs(file: Path, instances_file: Path, stats: tuple[tuple[int, int], ...]) -> list[dict[str, Any]]:
    """Read the files; `stats` is part of the cache key, so modified files are read again."""
    refs = load_plain(file)
    annotation_of = _boxes if file.suffix == ".json" else _box
    try:
        instances = json.loads(instances_file.read_bytes())
        boxes = {ann["id"]: ann["bbox"] for ann in instances["annotations"]}
        images = {image["id"]: image["file_name"] for image in instances["images"]}
        counts = Counter((ann.get("image_id"), ann.get("category_id")) for ann in instances["annotations"])
    except FileNotFoundError as error:
        raise DataError(f"{instances_file} is missing; it contains the boxes, put it beside {file.name}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{instances_file} is not a COCO annotation file ({error!r}); download it again") from error
    try:
        return [
            annotation_of(ref, boxes, counts)
            | {"file_name": images.get(ref["image_id"]), "split": ref["split"], "sent": sentence["sent"]}
            for ref in refs
            for sentence in ref["sentences"] or [{"sent": None}]  # which is reported as a bad sample
        ]
    except (KeyError, TypeError) as error:
        raise DataError(f"{file} is not a list of refs ({error!r}); download the original release again") from error


def _box(ref: dict[str, Any], boxes: dict[int, list[float]], counts: Counter[Any]) -> dict[str, Any]:
    category = ref.get("category_id")
    num_others = counts[ref["image_id"], category] - 1 if category is not None else None
    return {"ann_id": ref["ann_id"], "bbox": boxes.get(ref["ann_id"]), "category_id": category, "others": num_others}


def _boxes(ref: dict[str, Any], boxes: dict[int, list[float]], counts: Counter[Any]) -> dict[str, Any]:
    """Return the columns of a ref of gRefCOCO, where `ann_id` -1 means that there is no object."""
    ids = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
    return {"ann_id": ref["ref_id"], "boxes": [] if ids == [-1] else [boxes.get(id) for id in ids]}
