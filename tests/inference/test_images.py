"""Arguments that are not images."""

from __future__ import annotations

import json
import warnings
from io import BytesIO, StringIO
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vg
from tests.inference.bright import Bright
from vg.errors import BadSampleError, CheckpointError, ConfigError, DataError
from vg.inference.images import is_single, named_images

TENSOR = torch.zeros(3, 8, 8)


@pytest.mark.parametrize(
    ("images", "number", "name"),
    [
        ([np.zeros((8, 8, 3), np.uint8), TENSOR], 1, "Tensor"),
        (iter([np.zeros((8, 8, 3), np.uint8), TENSOR]), 1, "Tensor"),
        ([None], 0, "NoneType"),
    ],
    ids=["list", "stream", "none"],
)
def test_other_types_are_refused(images: Any, number: int, name: str) -> None:
    message = rf"image {number} is of type {name}; expected a path, a URL, a PIL image, .* NumPy array \[H, W, 3\]"
    with pytest.raises(DataError, match=message):
        list(vg.Grounder(Bright(), device="cpu")(images, "square"))


@pytest.fixture(scope="module")
def grounder() -> vg.Grounder:
    return vg.Grounder(Bright(), device="cpu")


def test_open_files_and_buffers(grounder: vg.Grounder, tmp_path: Path) -> None:
    Image.new("RGB", (20, 10), "white").save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    buffer = BytesIO(content)
    with (tmp_path / "a.png").open("rb") as file:
        for image in (content, bytearray(content), memoryview(content), buffer, buffer, file):
            assert is_single(image)
            assert grounder(image, "square").size == (10, 20)
            assert [result.size for result in grounder([image, image], "square")] == [(10, 20)] * 2
    with (tmp_path / "a.png").open() as file, NamedTemporaryFile("w+") as wrapped:
        for text in (StringIO("x"), file, wrapped):
            with pytest.raises(DataError, match="image 0 is a file opened as text; open it with mode 'rb'"):
                grounder(text, "square")


def test_one_image_is_not_a_folder(grounder: vg.Grounder, tmp_path: Path) -> None:
    Image.new("RGB", (20, 10), "white").save(tmp_path / "a.png")
    for several in (tmp_path, f"{tmp_path}/*.png", "clip.mp4", "instances.json"):
        with pytest.raises(DataError, match="stands for several images, or does not exist, where one is expected"):
            grounder.predict(several, "square")
        with pytest.raises(DataError, match="stands for several images, or does not exist, where one is expected"):
            grounder.predict_batch([several], ["square"])


def test_paths_in_a_table(grounder: vg.Grounder, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    Image.new("RGB", (20, 10), "white").save(tmp_path / "a.png")
    paths = pandas.DataFrame({"path": [str(tmp_path / "a.png")] * 2})["path"]
    assert [result.size for result in grounder(paths, "square")] == [(10, 20)] * 2


def test_a_coco_file_that_is_a_link(grounder: vg.Grounder, tmp_path: Path) -> None:
    """As in the folders of the Hub; its images are beside the link."""
    (tmp_path / "files").mkdir()
    (tmp_path / "data").mkdir()
    Image.new("RGB", (20, 10), "white").save(tmp_path / "data" / "a.png")
    (tmp_path / "files" / "0123").write_text('{"images": [{"file_name": "a.png", "height": 10, "width": 20}]}')
    (tmp_path / "data" / "a.json").symlink_to(tmp_path / "files" / "0123")
    (result,) = grounder(str(tmp_path / "data" / "a.json"), "square")
    assert result.name == str(tmp_path / "data" / "a.png")


def test_a_coco_file_has_its_images_where_training_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("annotations", "train2017", "val2017"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "train2017" / "1.png")
    Image.new("RGB", (20, 10), "white").save(tmp_path / "val2017" / "1.png")
    file = Path("annotations", "instances_val2017.json")
    (tmp_path / file).write_text(json.dumps({"images": [{"file_name": "1.png"}, {"file_name": "2.png"}]}))
    monkeypatch.chdir(tmp_path)
    for path, root in ((file, Path()), (tmp_path / file, tmp_path)):
        found, missing = named_images(str(path))[0]
        assert found.name == str(root / "val2017" / "1.png")
        assert found.read().min() == 255
        with pytest.raises(
            BadSampleError, match=r"2\.png not found .*, or give the folder of the images in place of the"
        ):
            missing.read()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"x", "^image 0 cannot be read"),
        (np.zeros((4, 4, 3), np.float32), "^image 0 as an array has float32"),
        (None, "^images is of type NoneType; expected a path"),
        (3, "^images is of type int; expected a path"),
        (TENSOR, "^images is of type Tensor; expected a path"),
        ({"a.png": 1}, "^images is of type dict; expected a path"),
        ("", "^the path of an image is empty"),
        ([""], "^the path of an image is empty"),
    ],
)
def test_unusable_images(image: Any, message: str, grounder: vg.Grounder) -> None:
    with pytest.raises(DataError, match=message):
        grounder(image, "square")


def test_a_batch_is_a_list(grounder: vg.Grounder) -> None:
    for image in ("scene.png", Path("folder"), np.zeros((8, 8, 3), np.uint8), b"x", None, 3):
        with pytest.raises(ValueError, match="images needs a list of images"):
            grounder.predict_batch(image, ["square"])  # type: ignore[arg-type]
    for phrases in ("square", None, 3):
        with pytest.raises(ValueError, match="phrases needs one entry per image"):
            grounder.predict_batch([np.zeros((8, 8, 3), np.uint8)], phrases)  # type: ignore[arg-type]


@pytest.mark.parametrize("phrases", [[3], 3, [None], b"square", ["square", b"x"]])
def test_phrases_are_text(phrases: Any, grounder: vg.Grounder) -> None:
    with pytest.raises(DataError, match="a phrase must be text, got "):
        grounder(np.zeros((8, 8, 3), np.uint8), phrases)


def test_the_prompt_of_another_library_is_one_phrase_with_a_warning(grounder: vg.Grounder) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    for phrase in ("red box . blue box .", "Red box. blue box."):
        with pytest.warns(UserWarning, match=r"is one phrase; give several one by one: \"[Rr]ed box\" \"blue box\""):
            grounder(image, phrase)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grounder(image, ["red box.", "St. Bernard"])
    with pytest.raises(DataError, match="not a mapping"):
        grounder(image, {"a cat": "cat"})
    with pytest.raises(DataError, match="predict_batch takes the phrases of each image"):
        grounder([image, image], [["cat"], ["dog"]])


@pytest.mark.parametrize("threshold", ["0.3", [0.3], np.zeros(2)])
def test_thresholds_are_numbers(threshold: Any, grounder: vg.Grounder) -> None:
    with pytest.raises(ConfigError, match=r"threshold .*: expected a score or IoU from 0 to 1"):
        grounder(np.zeros((8, 8, 3), np.uint8), "square", threshold)


def test_a_threshold_is_not_a_tokenizer(grounder: vg.Grounder) -> None:
    with pytest.raises(TypeError, match=r"0\.5 is not a tokenizer; give device= and threshold= by name"):
        vg.predict_and_crop(np.zeros((8, 8, 3), np.uint8), "square", grounder, 0.5)


def test_models_of_other_types(grounder: vg.Grounder, tmp_path: Path) -> None:
    for model in (None, 3, grounder, torch.nn.Linear(1, 1)):
        with pytest.raises(ConfigError, match=f"a Grounder needs a model or its path, not a {type(model).__name__}"):
            vg.Grounder(model)  # type: ignore[arg-type]
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=f"model.safetensors has only the weights.*; give .* {tmp_path}"):
        vg.Grounder(tmp_path / "model.safetensors")
