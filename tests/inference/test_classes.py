"""A model that was trained on classes finds them by default, wherever it is used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vg
from tests.models.grounding_dino.tiny import tiny_model
from vg.checkpoint import write_model
from vg.cli import main
from vg.config import ModelOnlyConfig
from vg.errors import CheckpointError, DataError

CLASSES = ("hot dog", "dog")
IMAGE = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return saved(tmp_path / "trained", CLASSES)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "ab":
        Image.fromarray(IMAGE).save(folder / f"{name}.png")
    return folder


def saved(folder: Path, classes: tuple[str, ...]) -> Path:
    model = tiny_model(points=4)  # so that all formats can store it
    model.classes = classes
    folder.mkdir()
    write_model(folder, model, ModelOnlyConfig(model.config))
    return folder


def test_they_are_the_default_phrases(trained: Path) -> None:
    grounder = vg.Grounder(trained, "cpu")
    assert grounder.classes == CLASSES
    expected = grounder.predict(IMAGE, CLASSES)
    assert len(expected)
    for result in (grounder.predict(IMAGE), grounder(IMAGE, threshold=0), grounder([IMAGE], None, 0)[0]):
        assert result.phrases == CLASSES
        np.testing.assert_array_equal(result.boxes, expected.boxes)
    assert grounder(IMAGE, "cat").phrases == ("cat",)
    with pytest.raises(DataError, match="an empty phrase"):
        grounder(IMAGE, [])
    with pytest.raises(DataError, match="no phrase"):
        vg.predict_and_crop(IMAGE, None, grounder)  # type: ignore[call-overload]


def test_without_them_phrases_are_needed(tmp_path: Path, photos: Path) -> None:
    folder = saved(tmp_path / "expressions", ())
    assert not (folder / "classes.json").exists()
    grounder = vg.Grounder(folder, "cpu")
    assert grounder.classes == ()
    with pytest.raises(DataError, match="not trained on classes; give phrases to find"):
        grounder(IMAGE)
    for images in ([photos / "a.png"], [photos], photos.iterdir()):
        with pytest.raises(SystemExit, match="expressions was not trained on classes; give phrases to find, after -p"):
            main(["predict", str(folder), *map(str, images), "--device", "cpu"])
    with pytest.raises(SystemExit, match="no phrases; give them with -p, --phrases-file or --captions"):
        main(["label", str(folder), str(photos), str(tmp_path / "labels"), "--device", "cpu"])


@pytest.mark.parametrize("inputs", [["photos"], ["photos/a.png", "photos/b.png"]])
def test_prediction_of_several_images(
    inputs: list[str], trained: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["predict", "trained", *inputs, "--threshold", "0", "--device", "cpu"])
    rows = [json.loads(line) for line in Path("predictions/results.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(row["phrases"] == list(CLASSES) and row["boxes"] for row in rows)
    settings = json.loads(Path("predictions/settings.json").read_text())
    assert settings["phrases"] == list(CLASSES)


def test_prediction_of_one_image(
    trained: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["predict", "trained", "photos/a.png", "--threshold", "0", "--device", "cpu"])
    printed = capsys.readouterr().out
    main(["predict", "trained", "photos/a.png", *CLASSES, "--threshold", "0", "--device", "cpu"])
    assert capsys.readouterr().out == printed
    assert "hot dog: left" in printed


def test_labels(trained: Path, photos: Path, tmp_path: Path) -> None:
    command = ["label", str(trained), str(photos), str(tmp_path / "labels"), "--threshold", "0", "--device", "cpu"]
    main(command)
    main([*command, "-p", *CLASSES])  # in the same folder: the same labels
    assert list(json.loads((tmp_path / "labels" / "label_map.json").read_text()).values()) == list(CLASSES)


def test_they_are_saved_again(trained: Path, tmp_path: Path) -> None:
    grounder = vg.Grounder(trained, "cpu")
    for _ in range(2):
        grounder.save_pretrained(tmp_path / "again")
    assert vg.Grounder(tmp_path / "again", "cpu").classes == CLASSES
    card = (tmp_path / "again" / "README.md").read_text()
    assert "Classes, which are the default phrases: hot dog, dog." in card
    assert 'grounder("image.jpg", ["hot dog", "dog"])' in card
    assert "image.jpg -p 'hot dog' dog" in card


def test_interpolated_models_have_them(trained: Path, tmp_path: Path) -> None:
    data = "{name: shapes, image_size: 64, size: 3, view: detection}"
    command = ["interpolate", str(trained), str(trained), "--output", str(tmp_path / "mix"), "--weights", "0.5"]
    main([*command, f"data.train={data}", f"data.eval={data}"])
    assert vg.Grounder(tmp_path / "mix", "cpu").classes == CLASSES


def test_conversion_keeps_or_names_them(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["convert", str(trained), str(tmp_path / "copy"), "--to", "vg"])
    assert vg.Grounder(tmp_path / "copy", "cpu").classes == CLASSES
    assert "classes" not in capsys.readouterr().out
    main(["convert", str(trained), str(tmp_path / "model.pth"), "--to", "mmdet"])
    assert "not in the mmdet format: the classes, hot dog, dog" in capsys.readouterr().out


@pytest.mark.parametrize("content", ['{"dog": 1}', '["dog", 3]', '["dog", " "]', "["])
def test_a_damaged_file_is_named(content: str, trained: Path) -> None:
    (trained / "classes.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"classes\.json is damaged"):
        vg.Grounder(trained, "cpu")
