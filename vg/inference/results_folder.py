"""The folder of the results of `vg predict`, which a repeated command completes.

predictions/
    settings.json    the checkpoint, its weights, the phrases and the thresholds: a folder has results of one command
    predict.lock     while a command writes
    results.jsonl    a record per image, written as soon as it is done, see `Result.to_dict`
    drawn/           the images with boxes, small ones enlarged for readable labels
    crops/           an image per box
    results.csv, results.coco.json, ...   other formats, written last
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vg.errors import ConfigError
from vg.files import locked, read_json, remove, write_json
from vg.inference.formats import SUFFIXES, Format, read_records, write_results
from vg.inference.result import READABLE_SIDE, Result

SETTINGS, LOCK = "settings.json", "predict.lock"


@contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Create a folder, and refuse other commands in it within the context; one that stays empty is removed again.

    Raises:
        ConfigError: another command writes to the folder.
    """
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        with locked(path / LOCK) as is_free:
            if not is_free:
                raise ConfigError(f"another vg predict writes to {path}; wait for its end, or use another --output")
            yield
    finally:
        with suppress(OSError):  # not empty
            for folder in new:
                folder.rmdir()


class ResultsFolder:
    """Appends results, and knows which images have one; used within `in_use`.

    Nothing is written or removed before the first result, because a command can be refused until then.

    Args:
        settings: JSON values that determine the results.
        overwrite: remove earlier results.

    Raises:
        ConfigError: the folder has results with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], overwrite: bool = False):
        self.path = path
        self._results = self._file("jsonl")
        self._settings = settings
        self._overwrite = overwrite
        self._started = False
        self.done: set[str] = set()  # keys of the images that have a result, see `_key`
        self._folders: dict[str, str] = {}  # of images, as given -> resolved
        self._given: set[str] = set()  # keys that `lacks` has seen
        self._stems: set[str] = set()  # of the files of images, in the order of the records: equal in every command
        for name in () if overwrite else self._completed():
            self.done.add(self._key(name))
            self._new_stem(name)
        file, advice = path / SETTINGS, "use another --output, or --overwrite"
        if self.done and not file.exists():
            raise ConfigError(f"{path} has results but no {SETTINGS}: {advice}")
        found = read_json(file, dict) if self.done else settings
        if changed := [key for key in settings if key not in found or found[key] != settings[key]]:
            raise ConfigError(f"{path} has results with other settings ({', '.join(changed)}): {advice}")

    def _completed(self) -> list[str]:
        """Return the names of the images that have a record; the last line may be torn by a crash, and is removed."""
        if not self._results.exists():
            return []
        content = self._results.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with self._results.open("r+b") as file:
                file.truncate(end)
        return [str(record["image"]) for record in read_records(self._results)]

    def lacks(self, name: str) -> bool:
        """Whether an image has no result yet; False if asked again."""
        if (key := self._key(name)) in self._given:  # given twice; its result may not be there yet
            return False
        self._given.add(key)
        return key not in self.done

    def add(self, result: Result, draw: bool, crops: bool) -> None:
        """Write the images of a result, then its record."""
        self._start()
        stem = self._new_stem(result.name)
        if draw:
            self._save("drawn", stem, result.draw(max(READABLE_SIDE, *result.size)))
        for number, pixels in enumerate(result.crop() if crops else ()):
            self._save("crops", f"{stem}_{number}", pixels)
        with _naming(self._results), self._results.open("a", encoding="utf-8") as file:
            file.write(result.to_json() + "\n")
        self.done.add(self._key(result.name))

    def finish(self, formats: Sequence[Format]) -> list[Path]:
        """Write the other formats, and again those of earlier commands; return all files and folders."""
        self._start()
        self._results.touch()
        for format in SUFFIXES:
            path = self._file(format)
            if format != "jsonl" and (format in formats or path.exists()):
                write_results(read_records(self._results), path, format)
        return sorted(path for path in self.path.iterdir() if path.name not in (SETTINGS, LOCK))

    def _start(self) -> None:
        """Remove earlier results and write the settings, once."""
        if self._started:
            return
        self._started = True
        if self._overwrite:
            earlier = [self.path / name for name in (SETTINGS, "drawn", "crops")]
            for path in [*earlier, *map(self._file, SUFFIXES)]:
                remove(path)
        write_json(self.path / SETTINGS, self._settings)

    def _file(self, format: Format) -> Path:
        return self.path / f"results{SUFFIXES[format]}"

    def _key(self, name: str) -> str:
        """Return what all paths of a file, or of a frame of a video, have in common; a URL as it is."""
        if "://" in name:
            return name
        folder, file = os.path.split(name)
        if folder not in self._folders:
            with suppress(ValueError):  # a name that no file can have
                self._folders[folder] = os.path.realpath(folder)
        return os.path.join(self._folders.get(folder, folder), file)

    def _new_stem(self, name: str) -> str:
        """Return a name for the files of an image that no other image has."""
        stem = re.sub(r"[^\w.#-]+", "_", re.sub(r"\.\w{3,4}$", "", name)).strip("_.")[-150:] or "image"
        new = next(x for x in chain([stem], (f"{stem}_{n}" for n in count(2))) if x not in self._stems)
        self._stems.add(new)
        return new

    def _save(self, folder: str, stem: str, pixels: np.ndarray) -> None:
        path = self.path / folder / f"{stem}.png"
        path.parent.mkdir(exist_ok=True)
        with _naming(path):
            Image.fromarray(pixels).save(path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add a path to errors of the system that have none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
