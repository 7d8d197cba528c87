"""`vg predict` with several phrases for a detection model and one expression for an expression model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import HEAD, TINY
from tests.models.grounding_dino.tiny import tiny_model
from vg.checkpoint import write_model
from vg.cli import main
from vg.config import ModelOnlyConfig, RunConfig
from vg.errors import ConfigError
from vg.inference.draw import COLORS, fit
from vg.inference.grounder import Grounder
from vg.inference.result import READABLE_SIDE

LINE = r"(.+): left (.+), top (.+), right (.+), bottom (.+), score (.+)"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    model = tiny_model()
    folder = tmp_path / "detector"
    folder.mkdir()
    write_model(folder, model, ModelOnlyConfig(model.config))
    return folder


@pytest.fixture
def expression_model(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> Path:
    config = tiny_config()
    folder = tmp_path / "rec"
    folder.mkdir()
    write_model(folder, config.model.build(), config)
    return folder


def predict(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[list[tuple[str, ...]], str]:
    """Run `vg predict` and return the printed boxes and the complete output."""
    main(["predict", *map(str, arguments), "--device", "cpu"])
    text = capsys.readouterr().out
    return [found.groups() for found in re.finditer(LINE, text)], text


def test_all_boxes_of_several_phrases_are_printed_and_drawn(
    detector: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = tmp_path / "drawn.png"
    everything, _ = predict(capsys, detector, image, "dog", "red cup", "--threshold", 0, "--output", drawn)
    assert len(everything) == 40, "20 queries for each of two phrases"
    assert {name for name, *_ in everything} == {"dog", "red cup"}
    scores = [float(row[-1]) for row in everything]
    assert scores == sorted(scores, reverse=True)
    limit = sorted(set(scores))[-2] - 0.005
    some, _ = predict(capsys, detector, image, "dog", "red cup", "--threshold", limit, "--output", drawn)
    assert 0 < len(some) < 40
    assert all(float(row[-1]) >= limit - 0.005 for row in some)
    pixels = np.asarray(Image.open(drawn))
    colors = {COLORS[("dog", "red cup").index(name)] for name, *_ in some}
    for color in colors:
        rgb = [int(color[start : start + 2], 16) for start in (1, 3, 5)]
        assert (pixels == rgb).all(axis=-1).any(), "every phrase has its own color"


def test_no_box_above_the_threshold_is_not_an_error(
    detector: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = image.with_name("drawn.png")
    boxes, text = predict(capsys, detector, image, "dog", "--threshold", 1, "--output", output)
    assert not boxes
    assert re.search(r"no box scores >= 1.0 \(best: 0\.\d+\); lower --threshold", text)
    enlarged, _ = fit(Image.open(image).convert("RGB"), (READABLE_SIDE, READABLE_SIDE))
    np.testing.assert_array_equal(np.asarray(Image.open(output)), np.asarray(enlarged))


def test_a_model_of_any_number_of_objects_says_that_nothing_is_there(
    tiny_config: Callable[..., RunConfig], image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(model=TINY | {"head": HEAD | {"objects": "any"}})
    model = config.model.build()
    torch.nn.init.constant_(model.head.score.bias, -6)
    folder = tmp_path / "any"
    folder.mkdir()
    write_model(folder, model, config)
    phrases = ("the red star", "both dogs")
    boxes, text = predict(capsys, folder, image, *phrases, "--output", tmp_path / "drawn.png")
    assert boxes == []
    for phrase in phrases:
        assert re.search(rf"{phrase}: nothing here, no box scores >= 0\.5 \(best: 0\.\d+\)", text)
    assert "lower --threshold" not in text, "it is an answer"
    boxes, text = predict(capsys, folder, image, *phrases, "--threshold", 0, "--output", tmp_path / "drawn.png")
    assert {name for name, *_ in boxes} == set(phrases)
    assert len(boxes) > 2, "several of a phrase"
    assert "nothing" not in text
    grounder = Grounder(folder, "cpu")
    assert len(grounder(image, phrases)) == 0
    assert len(grounder(image, phrases, threshold=0.0)) == len(boxes)
    with pytest.raises(ConfigError, match="tile: the model answers one expression of an image"):
        grounder(image, phrases, tile=64)


def test_a_refused_command_does_not_touch_the_results(expression_model: Path, image: Path, tmp_path: Path) -> None:
    command = ["predict", str(expression_model), str(image), "-p", "dog", "--device", "cpu", "--output"]
    new, old = tmp_path / "new", tmp_path / "old"
    with pytest.raises(SystemExit, match="tile: the model answers one expression"):
        main([*command, str(new), "--tile", "800"])
    assert not new.exists()
    main([*command, str(old), "--crops"])
    files = {file: file.read_bytes() for file in old.rglob("*.*")}
    assert len(files) == 4, "settings, results, a drawing and a crop"
    for wrong, message in ((["--tile", "800"], "tile: the model"), (["--mask-model", "nowhere"], "nowhere")):
        with pytest.raises(SystemExit, match=message):
            main([*command, str(old), "--overwrite", *wrong])
        assert {file: file.read_bytes() for file in old.rglob("*.*")} == files
    main([*command, str(old), "--crops"])


def test_every_0th_frame_is_refused(expression_model: Path, tmp_path: Path) -> None:
    clip = str(tmp_path / "clip.avi")
    video = cv2.VideoWriter(clip, cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    video.write(np.zeros((48, 64, 3), np.uint8))
    video.release()
    command = ["predict", str(expression_model), clip, "dog", "--every", "0", "--device", "cpu"]
    for option in (["--json"], ["--output", str(tmp_path / "out")]):
        with pytest.raises(SystemExit, match="every 0: expected at least 1"):
            main([*command, *option])


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        *(("--threshold", value, "a score or IoU from 0 to 1") for value in ("30", "-0.1", "nan")),
        ("--nms", "1.5", "a score or IoU from 0 to 1"),
        ("--batch-size", "0", "at least 1"),
    ],
)
def test_values_out_of_range_are_refused_before_the_model_is_loaded(
    option: str, value: str, expected: str, image: Path
) -> None:
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit, match=rf"{option} {value}: expected {expected}"):
            main(["predict", "nowhere", str(image), "dog", option, value, *more])


def test_an_image_file_is_not_a_phrase(image: Path) -> None:
    other = image.with_name("other.JPG")
    other.write_bytes(image.read_bytes())
    with pytest.raises(SystemExit, match=r"other\.JPG is an image file, not a phrase: without -p, .* one image "):
        main(["predict", "nowhere", str(image), str(other), "raccoon"])
    with pytest.raises(SystemExit, match=r"https://a\.b/c\.png is an image"):
        main(["predict", "nowhere", str(image), "https://a.b/c.png", "raccoon"])
    with pytest.raises(SystemExit, match="nowhere does not exist"):
        main(["predict", "nowhere", str(image), "a file called absent.png", "https in words"])


def test_an_output_that_is_not_an_image_file_is_refused(image: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    for name, message in (("folder.png", "is a folder"), ("drawn.txt", "has no suffix of an image format")):
        with pytest.raises(SystemExit, match=f"--output {tmp_path / name}.*{message}"):
            main(["predict", "nowhere", str(image), "dog", "--output", str(tmp_path / name)])
    with pytest.raises(SystemExit, match="nowhere does not exist"):
        main(["predict", "nowhere", str(image), "dog", "--output", str(tmp_path / "preds_0.3")])
    for options in ([str(image)], ["--json"]):
        with pytest.raises(SystemExit, match=r"--output some\.png: several images, --json, .* need a folder, such as"):
            main(["predict", "nowhere", str(image), *options, "-p", "dog", "--output", "some.png"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests machines without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu"])
def test_a_device_that_is_not_there_is_refused(device: str, image: Path) -> None:
    with pytest.raises(SystemExit, match=rf"device {device}: .*; use cpu") as stopped:
        main(["predict", "nowhere", str(image), "dog", "--device", device])
    assert "\n" not in str(stopped.value)
    with pytest.raises(ConfigError, match=f"device {device}"):
        Grounder(tiny_model(), device=device)


def test_one_expression_has_one_box(
    expression_model: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "drawn.png"
    boxes, _ = predict(capsys, expression_model, image, "red circle", "--output", output)
    assert [name for name, *_ in boxes] == ["red circle"]
    boxes, _ = predict(capsys, expression_model, image, "red circle", "blue star", "--output", output)
    assert [name for name, *_ in boxes] == ["red circle", "blue star"]
