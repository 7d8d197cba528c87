"""The folder of the results of `vg predict`, which a repeated command completes.

predictions/
    settings.json    the checkpoint, its weights, the phrases and the thresholds: a folder has results of one command
    results.jsonl    a record per image, written as soon as it is done, see `Result.to_dict`
    drawn/           the images with boxes, small ones enlarged for readable labels
    crops/           an image per box
    results.csv, results.coco.json, ...   other formats, written last
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vg.errors import ConfigError
from vg.files import read_json, remove, write_json
from vg.inference.formats import SUFFIXES, Format, read_records, write_results
from vg.inference.result import READABLE_SIDE, Result


class ResultsFolder:
    """Appends results, and knows which images have one.

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
        self.names: set[str] = set()
        self._given: set[str] = set()  # names that `lacks` has seen
        self._stems: set[str] = set()  # of the files of images, in the order of the records: equal in every command
        for name in () if overwrite else self._completed():
            self.names.add(name)
            self._new_stem(name)
        file, advice = path / "settings.json", "use another --output, or --overwrite"
        if self.names and not file.exists():
            raise ConfigError(f"{path} has results but no settings.json: {advice}")
        found = read_json(file, dict) if self.names else settings
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
        if name in self._given:  # given twice; its result may not be there yet
            return False
        self._given.add(name)
        return name not in self.names

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
        self.names.add(result.name)

    def finish(self, formats: Sequence[Format]) -> list[Path]:
        """Write the other formats, and again those of earlier commands; return all files and folders."""
        self._start()
        self._results.touch()
        for format in SUFFIXES:
            path = self._file(format)
            if format != "jsonl" and (format in formats or path.exists()):
                write_results(read_records(self._results), path, format)
        return sorted(path for path in self.path.iterdir() if path.name != "settings.json")

    def _start(self) -> None:
        """Remove earlier results and write the settings, once."""
        if self._started:
            return
        self._started = True
        if self._overwrite:
            earlier = [self.path / name for name in ("settings.json", "drawn", "crops")]
            for path in [*earlier, *map(self._file, SUFFIXES)]:
                remove(path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "settings.json", self._settings)

    def _file(self, format: Format) -> Path:
        return self.path / f"results{SUFFIXES[format]}"

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
