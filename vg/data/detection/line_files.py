"""Lines of a .jsonl file, or of a folder of them such as `vg label` writes, read by their position."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vg.errors import DataError
from vg.files import located, read_json, read_lines

logger = logging.getLogger(__name__)

SETTINGS, LABEL_MAP = "labels.json", "label_map.json"  # beside the files of vg label
_NOTHING = b'"regions": []'  # as vg label writes a caption without boxes; quotes in a caption are escaped


class LineFiles:
    """The lines of a file that are not blank, or those of all .jsonl files of a folder in the order of their names.

    Captions in which vg label found nothing are left out: they have no phrase to train on.

    Raises:
        DataError: a file cannot be read, the folder has none, or vg label has not completed it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = [path]
        if path.is_dir():
            self._files = sorted(path.glob("*.jsonl"))
            if not self._files:
                raise DataError(f"{path} has no .jsonl file; path is a file in ODVG format, or a folder of vg label")
        is_labels = path.is_dir() and _check_complete(path, len(self._files))
        blocks, num_empty = [], 0
        for number, file in enumerate(self._files):
            lines = []
            try:
                for line, start, text in read_lines(file):
                    if is_labels and _NOTHING in text:
                        num_empty += 1
                    else:
                        lines.append((line, start))
            except OSError as error:
                known = "path is a .jsonl file in ODVG format"
                raise DataError(f"cannot read {located(file)}: {error.strerror}; {known}") from error
            blocks.append(np.insert(np.array(lines, np.int64).reshape(-1, 2), 0, number, axis=1))
        self._rows = np.concatenate(blocks)  # [lines, 3] file, number of the line from 1 on, and first byte
        if num_empty:
            logger.info("%s: %d captions without a box are left out, %d are used", path, num_empty, len(self))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[bytes, str]:
        """Content and location of a line."""
        number, line, start = self._rows[index].tolist()
        with self._files[number].open("rb") as file:
            file.seek(start)
            return file.readline(), self._location(number, line)

    def __iter__(self) -> Iterator[tuple[bytes, str]]:
        ends = np.searchsorted(self._rows[:, 0], np.arange(len(self._files)), side="right")  # rows are in file order
        for number, path in enumerate(self._files):
            with path.open("rb") as file:
                for _, line, start in self._rows[ends[number - 1] if number else 0 : ends[number]].tolist():
                    file.seek(start)
                    yield file.readline(), self._location(number, line)

    def _location(self, number: int, line: int) -> str:
        return f"line {line}" if self._files[number] == self.path else f"{self._files[number].name}, line {line}"


def label_map_of(folder: Path) -> str | None:
    """Return the label map that vg label has written to a folder; None if there is none."""
    return str(folder / LABEL_MAP) if (folder / LABEL_MAP).is_file() else None


def _check_complete(folder: Path, num_files: int) -> bool:
    """Return whether vg label has written a folder; raises DataError if files of it are missing."""
    if not (folder / SETTINGS).is_file():
        return False
    try:
        settings = read_json(folder / SETTINGS, dict)
        num_shards = int(settings["shards"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / SETTINGS} is not one of vg label ({error!r}); label the images again") from error
    if num_files != num_shards:
        raise DataError(f"{folder} has {num_files} of {num_shards} shards of labels; repeat the vg label command")
    return True
