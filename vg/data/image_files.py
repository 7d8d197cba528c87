"""The image files of a dataset: their folder, their paths, and keys that are equal for the same image."""

from __future__ import annotations

import filecmp
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from vg.data.images import FOLDERS, coco_id_of, find_image, is_outside, locate, slashed
from vg.errors import BadSampleError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_SPLIT = re.compile(r"(?:train|val|valid|validation|dev|test)(\d*)")  # a folder of images, and its year
_NUM_LOCATED, _NUM_COMPARED = 8, 20  # images that decide for all of a folder
COCO_KEY = "coco/"  # what the keys of COCO images begin with


def dataset_folder(file: Path) -> Path:
    """Return the folder of an annotation file, or its parent if that is `annotations`."""
    folder = Path(os.path.abspath(file)).parent  # a file that is a link is where the link is
    return folder.parent if folder.name == "annotations" else folder


def image_root(file: Path, names: Sequence[str]) -> Path:
    """Return the folder of the images of an annotation file: the one where most of them are found.

    That is the folder of the dataset, or `images`, or one of the split that the name of the file has: for
    instances_val2017.json `val2017`, `val`, `images/val2017` or `images/val`. Of several, it is the first in which most
    images are directly, not in folders that COCO has. If none has any, it is the folder of the file.

    Args:
        names: the images; only a few of them are looked for.
    """
    folder = dataset_folder(file)
    words = [word for word in re.split(r"[\W_]+", file.stem) if _SPLIT.fullmatch(word) or word == "default"]  # CVAT
    splits = [split for word in reversed(words) for split in (word, word.rstrip("0123456789"))]
    roots = [folder, *(folder / images / split for split in splits for images in ("", "images")), folder / "images"]
    some = names[:: len(names) // _NUM_LOCATED + 1]

    def found(root: Path) -> tuple[int, int]:
        files = [_image_file(slashed(name, root), root, FOLDERS) for name in some]
        existing = [(name, path) for name, path in zip(some, files, strict=True) if path and os.path.isfile(path)]
        return len(existing), sum(path == root / slashed(name, root) for name, path in existing)

    best, own = max(filter(Path.is_dir, roots), key=found), Path(os.path.abspath(file)).parent
    return best if any(found(best)) or not any(found(own)) else own


def image_files(names: Sequence[str], root: Path) -> list[Path | None]:
    """Return the files of many images; `root / name` where `find_image` finds none, None if that is outside `root`."""
    folders = [folder for folder in FOLDERS if (root / folder).is_dir()]
    files = {name: _image_file(slashed(name, root), root, folders) for name in dict.fromkeys(names)}
    return [files[name] for name in names]


def _image_file(name: str, root: Path, folders: Sequence[str]) -> Path | None:
    if is_outside(name, root):
        return None
    try:
        found = locate(name, root, folders)
    except OSError:
        found = []
    return found[0] if len(found) == 1 else root / name


def list_images(folder: Path) -> list[str]:
    """Return the images in a folder and its subfolders, relative to it, sorted."""
    files = (file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES)
    return sorted(str(file.relative_to(folder)) for file in files)


def image_key(name: str, root: Path | None = None) -> str:
    """Return a key that is equal for all names of an image: its COCO id, or else its path below `root`."""
    name = slashed(name, root) if root else name
    if (coco_id := coco_id_of(name, root)) and not (
        root and _has_own_numbers(os.path.dirname(os.path.abspath(root / name)))
    ):
        return f"{COCO_KEY}{int(coco_id)}"
    try:
        return str(find_image(name, root).resolve()) if root else name
    except BadSampleError:
        return name


@cache
def _has_own_numbers(path: str) -> bool:
    """Return whether numbers are not COCO ids, because a folder of another split has other images of the same names."""
    folder = Path(path)
    if not (split := _SPLIT.fullmatch(folder.name)) or not (names := _numbers_in(folder)):
        return False
    for other in folder.parent.iterdir():
        if other.name != folder.name and (found := _SPLIT.fullmatch(other.name)) and found[1] == split[1]:
            shared = sorted(names & _numbers_in(other))[:_NUM_COMPARED]
            if not all(filecmp.cmp(folder / name, other / name, shallow=False) for name in shared):
                return True
    return False


def _numbers_in(folder: Path) -> set[str]:
    """Return the files of a folder whose names are numbers as COCO has them; none if there is no such folder."""
    return {name for name in os.listdir(folder) if re.match(r"\d{12}\.", name)} if folder.is_dir() else set()
