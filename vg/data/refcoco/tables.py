"""Opens the rows of one split of a RefCOCO dataset: from the Hub, a local folder or a file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from vg.data.image_files import COCO_KEY, image_key
from vg.data.refcoco.formats import NESTED, flat_rows, reviewed_rows
from vg.data.refcoco.pickles import partition_of, read_refs, refs_files
from vg.errors import DataError, NoSuchSplitError
from vg.files import read_text
from vg.hub import loading

if TYPE_CHECKING:
    from datasets import Dataset

    Rows: TypeAlias = list[dict[str, Any]] | Dataset

_SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test", "testa": "testA", "testb": "testB"}
_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json")
_ACCEPTED = "a Hub id (jxu124/refcoco), a local folder or a file (.jsonl, .json, .parquet, .arrow, .p)"


@dataclass(frozen=True)
class Table:
    """The rows of one split; rows[i] is a dict, its image still encoded."""

    rows: Rows
    columns: frozenset[str]
    dataset: str  # "jxu124/refcoco", "refcoco-unc", or "refs (refcoco_unc)": one of several at a path
    split: str  # our name: train, val, testA, testB, test
    folder: Path | None  # of a local dataset; None for the Hub
    images: Dataset | None = None  # with a column `image`, indexed by the column `image_row` of `rows`

    def row(self, index: int) -> dict[str, Any]:
        """Return one row, with its image if the table has pixels."""
        row: dict[str, Any] = self.rows[index]
        if self.images is None:
            return row
        return row | {"image": self.images[row["image_row"]]["image"]}

    @property
    def has_pixels(self) -> bool:
        """Whether images are in the rows, not in files that they name."""
        if self.images is not None or isinstance(self.rows, list):
            return self.images is not None
        return "image" in self.columns and not _is_text(self.rows, "image")

    def image_names(self) -> list[Any]:
        """Return the cells of the column `image` without pixels: names, None where there is none.

        The name inside an image with pixels counts if it is of COCO; other names, such as 0.jpg, may not be unique.
        """
        if isinstance(self.rows, list) or _is_text(self.rows, "image"):
            return self.column("image")
        flat = self.rows.flatten()  # has image.bytes and image.path
        paths = replace(self, rows=flat).column("image.path") if _is_text(flat, "image.path") else [None] * len(flat)
        return [path if path and image_key(path).startswith(COCO_KEY) else None for path in paths]

    def column(self, name: str) -> list[Any]:
        """Read all values of one column, and no other column."""
        if isinstance(self.rows, list):
            return [row.get(name) for row in self.rows]
        return self.rows.select_columns([name])[:][name]

    def where(self, column: str, accepts: Callable[[Any], bool]) -> Table:
        """Keep the rows with an accepted value in a column."""
        rows, kept = self.rows, [index for index, value in enumerate(self.column(column)) if accepts(value)]
        return replace(self, rows=[rows[index] for index in kept] if isinstance(rows, list) else rows.select(kept))

    def select(self, columns: Iterable[str]) -> Table:
        """Keep only these columns, because unused ones would be parsed with every row."""
        if isinstance(self.rows, list):
            return self
        kept = [name for name in columns if name in self.columns]
        return replace(self, rows=self.rows.select_columns(kept), columns=frozenset(kept))


def open_table(
    path: str, split: str, partition: str | None = None, revision: str | None = None, dataset: str | None = None
) -> Table:
    """Find the rows of a split.

    Args:
        dataset: one of several datasets at the path, by the prefix of its files or splits ("refcoco_unc") or by the
            value of the column `dataset`.

    Raises:
        DataError: nothing readable at `path`, an empty split, or no such split (the message lists the existing ones).
    """
    local = Path(path)
    if revision is not None and local.exists():
        raise DataError(f"revision {revision!r} applies to Hub datasets, but {path} is local; remove revision")
    if partition is not None and not refs_files(local):
        raise DataError(f"partition {partition!r} needs refs(*).p files, but {path} has none; remove partition")
    if local.is_dir():
        table = _open_folder(local, split, partition, dataset)
    elif local.is_file():
        table = _open_file(local, split, dataset)
    elif local.suffix in (*_SUFFIXES, ".p") or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        raise DataError(f"{path} does not exist; path is {_ACCEPTED}")
    else:
        name = path if revision is None else f"{path}@{revision}"
        table = _pick(_load_hub(path, revision), split, name, None, dataset)
    nested = [column for column in NESTED if column in table.columns]
    if not nested or isinstance(table.rows, list):
        return table
    annotations = [*nested, *(name for name in ("file_name", "image_info") if name in table.columns)]
    rows = flat_rows(table.rows.select_columns(annotations), f"{table.dataset} ({table.split})")
    return replace(table, rows=rows, columns=frozenset().union(*rows), images=table.rows.select_columns(["image"]))


def _open_folder(folder: Path, split: str, partition: str | None, dataset: str | None) -> Table:
    name = folder.resolve().name
    if refs := refs_files(folder):
        partition = next(iter(refs)) if partition is None and len(refs) == 1 else partition
        if partition not in refs:
            raise DataError(f"{folder} has the partitions {', '.join(refs)}; set partition to one of them")
        return _pick({"": read_refs(refs[partition])}, split, f"{name}-{partition}", folder)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        import datasets

        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.Dataset):  # which may record the split that it was loaded from
            is_split = "split" not in saved.column_names and saved.split in _SPLITS
            saved = {str(saved.split) if is_split else "": saved}
        return _pick(saved, split, name, folder, dataset)
    found = [sorted(folder.rglob(f"*{suffix}")) for suffix in _SUFFIXES]
    named = [[file for file in files if dataset and file.name.startswith(f"{dataset}_")] for files in found]
    for files in filter(None, named):
        return _open_files(files, folder, split, f"{name} ({dataset})", folder)
    for files in filter(None, found):
        return _open_files(files, folder, split, name, folder, dataset)
    raise DataError(
        f"{folder} contains no RefCOCO data; expected the output of datasets' save_to_disk, refs(*).p with "
        f"instances.json, or files that end in {', '.join(_SUFFIXES)}"
    )


def _open_file(file: Path, split: str, dataset: str | None) -> Table:
    folder = file.resolve().parent
    if file.suffix == ".p" or file in refs_files(file.parent).values():
        return _pick({"": read_refs(file)}, split, f"{folder.name}-{partition_of(file)}", folder)
    if file.suffix not in _SUFFIXES:
        raise DataError(f"{file}: unknown file type; path is {_ACCEPTED}")
    name = re.sub(rf"[-_.]({'|'.join(_SPLITS)})(?=$|_reviewed$)", "", file.stem, flags=re.IGNORECASE)
    return _open_files([file], file.parent, split, name, folder, dataset)


def _open_files(
    files: Sequence[Path], root: Path, split: str, name: str, folder: Path, dataset: str | None = None
) -> Table:
    """Open files of one type, whose paths below `root` may name a split ("data/testA-00000-of-00001.parquet")."""
    by_split: dict[str, list[Path]] = {}
    for file in files:
        named = [word for word in re.split(r"[^a-zA-Z]+", str(file.relative_to(root))) if word.lower() in _SPLITS]
        by_split.setdefault(named[-1] if named else "", []).append(file)
    if "" in by_split and len(by_split) > 1:
        raise DataError(f"{by_split[''][0]}: no split in its name, unlike other files in {folder}; rename or remove it")
    if "" in by_split:
        return _pick({"": _read_files(files, root)}, split, name, folder, dataset)
    published, ours = _choose_split(split, by_split, str(folder))
    return _pick({ours: _read_files(by_split[published], root)}, ours, name, folder, dataset)


def _read_files(files: Sequence[Path], root: Path) -> Rows:
    """Read all rows of a file or of its numbered shards."""
    if len({re.split(r"\d", str(file.relative_to(root)))[0] for file in files}) > 1:
        raise DataError(f"{files[0]} and {files[1]} are not numbered shards of one dataset; set path to one of them")
    suffix = files[0].suffix
    if suffix in (".jsonl", ".json"):
        return [row for file in files for row in _read_json(file)]
    import datasets

    try:
        return datasets.load_dataset(suffix[1:], data_files={"train": list(map(str, files))}, split="train")
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:  # ValueError: from pyarrow
        raise DataError(f"{files[0]} (one of {len(files)}) cannot be read: {error.__cause__ or error}") from error


def _read_json(file: Path) -> list[dict[str, Any]]:
    """Read the objects of a .json file (one list) or of a .jsonl file (one object per line)."""
    text = read_text(file)
    documents = [text] if file.suffix == ".json" else text.split("\n")
    rows: list[Any] = []
    for line, document in enumerate(documents, start=1):
        if not document.strip():
            continue
        try:
            value = json.loads(document)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {line}: not JSON ({error}); correct or remove it") from error
        if file.suffix == ".json" and isinstance(value, dict) and {"images", "annotations"} <= value.keys():
            value = reviewed_rows(value, str(file))
        rows += value if file.suffix == ".json" and isinstance(value, list) else [value]
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file}: expected objects, one per line in a .jsonl file or a list of them in a .json file")
    return rows


def _load_hub(path: str, revision: str | None) -> Mapping[str, Dataset]:
    import datasets

    with loading(path, "path", DataError, "dataset"):
        return datasets.load_dataset(path, revision=revision)


def _pick(tables: Mapping[str, Rows], split: str, name: str, folder: Path | None, dataset: str | None = None) -> Table:
    """Pick the rows of a split by the keys of `tables`, or by the columns `split` and `dataset`.

    Rows with the key "" and without a column `split` are the requested split.
    """
    if prefixed := [key for key in tables if dataset and key.startswith(f"{dataset}_")]:
        tables = {key.removeprefix(f"{dataset}_"): tables[key] for key in prefixed}
        name, dataset = f"{name} ({dataset})", None
    elif dataset is not None and not all("dataset" in _columns(rows) for rows in tables.values()):
        raise NoSuchSplitError(
            f"{name} has no dataset {dataset!r}; its splits are {', '.join(filter(None, tables)) or split}: no file or "
            "split has this prefix, and no column is `dataset`"
        )
    published, ours = ("", split) if "" in tables else _choose_split(split, tables, name)
    table = _table(tables[published], name, ours, folder)
    if dataset is not None:
        if dataset not in (names := dict.fromkeys(map(str, table.column("dataset")))):
            raise NoSuchSplitError(f"{name} has no dataset {dataset!r}; it has {', '.join(names)}")
        table = replace(table.where("dataset", lambda cell: cell == dataset), dataset=f"{name} ({dataset})")
    if published:
        return table
    if "split" not in table.columns:
        return replace(table, split=_choose_split(split, [split], name)[1])
    published, ours = _choose_split(split, dict.fromkeys(map(str, table.column("split"))), table.dataset)
    return replace(table.where("split", lambda cell: cell == published), split=ours)


def _is_text(rows: Dataset, column: str) -> bool:
    return column in rows.column_names and getattr(rows.features[column], "dtype", "") in ("string", "large_string")


def _columns(rows: Rows) -> frozenset[str]:
    return frozenset().union(*rows) if isinstance(rows, list) else frozenset(rows.column_names)


def _table(rows: Rows, name: str, split: str, folder: Path | None) -> Table:
    if len(rows) == 0:
        raise DataError(f"{name}: the split {split} is empty")
    if not isinstance(rows, list):
        import datasets

        for column, feature in rows.features.items():
            if isinstance(feature, datasets.Image):  # datasets decodes early and applies the EXIF orientation
                rows = rows.cast_column(column, datasets.Image(decode=False))
    return Table(rows, _columns(rows), name, split, folder)


def _choose_split(split: str, published: Collection[str], where: str) -> tuple[str, str]:
    """Return (published name, our name) of a split that is requested by either name.

    A `test` next to a `testB` is testA, as in jxu124/refcoco.
    """
    names = {name: _SPLITS.get(name.lower(), name) for name in published}
    if "testB" in names.values() and "testA" not in names.values():
        names = {name: "testA" if ours == "test" else ours for name, ours in names.items()}
    for name, ours in names.items():
        if split in (name, ours):
            return name, ours
    raise NoSuchSplitError(f"{where} has no split {split!r}; it has {', '.join(sorted(names.values()))}")
