"""The folder of results: what earlier commands finished stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vg.errors import ConfigError
from vg.inference.formats import Format
from vg.inference.result import Result
from vg.inference.results_folder import ResultsFolder

SETTINGS = {"checkpoint": "model", "phrases": ["dog"], "tile": None}


def result(name: str, gray: int) -> Result:
    """One box on an image of one color."""
    box, one = np.array([[4, 4, 20, 20]], np.float32), np.ones(1, np.float32)
    return Result(name, np.full((40, 60, 3), gray, np.uint8), ("dog",), box, one, np.zeros(1, np.int64))


def fill(
    path: Path,
    images: dict[str, int],
    unusable: tuple[str, ...] = (),
    formats: tuple[Format, ...] = (),
    **options: bool,
) -> None:
    """Add the results of images (name -> gray) that have none, as a command does."""
    folder = ResultsFolder(path, SETTINGS, **options)
    for name in [name for name in images if folder.lacks(name) and name not in unusable]:
        folder.add(result(name, images[name]), draw=True, crops=True)
    folder.finish(formats)


def crops(path: Path) -> dict[str, int]:
    return {file.name: int(np.asarray(Image.open(file))[0, 0, 0]) for file in (path / "crops").iterdir()}


def test_settings_of_a_folder_without_results_do_not_matter(tmp_path: Path) -> None:
    ResultsFolder(tmp_path, {**SETTINGS, "tile": 800}).finish([])
    fill(tmp_path, {"cat.png": 50})
    with pytest.raises(ConfigError, match=r"has results with other settings \(tile\)"):
        ResultsFolder(tmp_path, {**SETTINGS, "tile": 800})


def test_results_of_unknown_settings_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, {"cat.png": 50})
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ConfigError, match=r"has results but no settings\.json: use another --output"):
        ResultsFolder(tmp_path, SETTINGS)


def test_images_that_are_added_later_do_not_replace_files(tmp_path: Path) -> None:
    fill(tmp_path, {"photos/cat.png": 50})
    drawn = (tmp_path / "drawn/photos_cat.png").read_bytes()
    fill(tmp_path, {"photos/cat.jpg": 200, "photos/cat.png": 50})
    assert crops(tmp_path) == {"photos_cat_0.png": 50, "photos_cat_2_0.png": 200}
    assert (tmp_path / "drawn/photos_cat.png").read_bytes() == drawn


def test_images_that_were_unusable_do_not_replace_files(tmp_path: Path) -> None:
    images = {"photos/cat.jpg": 200, "photos/cat.png": 50}
    fill(tmp_path, images, unusable=("photos/cat.jpg",))
    fill(tmp_path, images)
    assert crops(tmp_path) == {"photos_cat_0.png": 50, "photos_cat_2_0.png": 200}


def test_other_formats_have_the_same_results(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": 50}, formats=("csv",))
    fill(tmp_path, {"a.png": 50, "b.png": 50})
    assert [row.split(",")[0] for row in (tmp_path / "results.csv").read_text().splitlines()[1:]] == ["a.png", "b.png"]
    fill(tmp_path, {"c.png": 50}, overwrite=True)
    assert not (tmp_path / "results.csv").exists()


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the file."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    folder = ResultsFolder(tmp_path, SETTINGS)
    for owner, method, name in ((Image.Image, "save", "drawn/a.png"), (Result, "to_json", "results.jsonl")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, method, full)
            with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/{name}'"):
                folder.add(result("a.png", 50), draw=method == "save", crops=False)
