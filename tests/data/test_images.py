"""Image files: one way to read them for training, `vg check` and prediction, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.check.cases import check, found, valid_coco, write
from vg.data import images
from vg.data.image_files import image_files, image_key
from vg.data.images import find_image, image_size, orientation, read_image
from vg.errors import BadSampleError, ConfigError
from vg.inference.images import to_array

RAMP = np.linspace(0, 65535, 40 * 60).astype(np.uint16).reshape(40, 60)


def test_16_bit_images_are_read_alike_for_training_and_prediction(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "0.png")
    pixels = read_image(tmp_path / "0.png", "0.png")
    assert len(np.unique(pixels)) == 256, "neither black nor white"
    np.testing.assert_array_equal(to_array(tmp_path / "0.png"), pixels)
    np.testing.assert_array_equal(to_array(RAMP), pixels)


def test_floating_point_images_are_an_issue_of_check(tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "0.tif")
    document = valid_coco()
    document["images"][0]["file_name"] = "0.tif"
    issue = found(check(write(tmp_path, document)), "images that cannot be read")
    assert "float32 values" in issue.examples[0]


def test_files_outside_the_image_root_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "images"
    root.mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    for name in ("../secret.png", "a/../../secret.png", str(tmp_path / "secret.png")):
        with pytest.raises(BadSampleError, match=r"outside .*; set image_root to a folder that contains all images"):
            find_image(name, root)
    with pytest.raises(BadSampleError, match=r"outside .*; there is no such file; make the paths .* relative"):
        find_image("/content/data/images/a.png", root)
    Image.new("RGB", (2, 2)).save(root / "a.png")
    assert find_image("b/../a.png", root) == root / "a.png"
    assert find_image(str(root / "a.png"), root) == root / "a.png"
    monkeypatch.chdir(root)  # a relative root
    with pytest.raises(BadSampleError, match="outside"):
        find_image("../secret.png", Path())
    assert find_image("a.png", Path()) == Path("a.png")
    assert find_image(str(root / "a.png"), Path()) == root / "a.png"


def test_an_image_of_another_folder_is_not_used(tmp_path: Path) -> None:
    """Only the folders of COCO may differ from the annotated ones."""
    (tmp_path / "images").mkdir()
    for name in ("000.jpg", "images/000.jpg", "COCO_val2014_000000000716.jpg", "202401311230.jpg"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    names = "camera_a/000.jpg", "camera_a/images/000.jpg", "b/val2017/000.jpg", "b/000000000716.jpg"
    for name in (*names, "202401311230_39.jpg"):
        with pytest.raises(BadSampleError, match="not found below"):
            find_image(name, tmp_path)
        assert image_files([name], tmp_path) == [tmp_path / name]
    for name in ("train2017/000.jpg", "images/train2017/000.jpg", str(tmp_path / "val2014" / "000.jpg")):
        assert find_image(name, tmp_path) == tmp_path / "000.jpg"
    for name in ("train2017/000000000716.jpg", "000000000716.jpg", "coco/COCO_train2014_000000000716_3.jpg"):
        assert find_image(name, tmp_path).name == "COCO_val2014_000000000716.jpg"


def test_times_are_not_ids_of_coco() -> None:
    names = ("202401311230_00.jpg", "202401311230_39.jpg", "202401311230.jpg", "000000000716_1.jpg", "000001000000.jpg")
    assert [image_key(name) for name in names] == list(names)
    coco = ("000000000716.jpg", "train2014/COCO_train2014_000000000716_8.jpg", "COCO_val2014_000000000716.jpg")
    assert {image_key(name) for name in coco} == {"coco/716"}


def test_numbers_are_ids_in_folders_of_coco_only(tmp_path: Path) -> None:
    for camera in ("cam1", "cam2"):
        (tmp_path / camera).mkdir()
        Image.new("RGB", (2, 2)).save(tmp_path / camera / "000000000009.jpg")
    names = ("cam1/000000000009.jpg", "cam2/000000000009.jpg", "cam1/train2017/000000000009.jpg")
    assert [image_key(name) for name in names] == list(names)
    paths = [str(tmp_path / name) for name in names[:2]]
    assert [image_key(name, tmp_path) for name in (*names[:2], *paths)] == [*paths, *paths]
    folders = (
        "",
        "images/",
        "val2017/",
        "images/train2017/",
        "coco/images/test2017/",
        "../data/coco2017/",
        "../train2017/",
    )
    absolute = str(tmp_path / "train2017" / "000000000009.jpg")
    assert {image_key(f"{folder}000000000009.jpg") for folder in folders} == {"coco/9"}
    assert image_key(absolute, tmp_path) == image_key("cam1/COCO_val2014_000000000009.jpg", tmp_path) == "coco/9"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes need POSIX")
def test_a_named_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(BadSampleError, match=r"a\.png does not exist, or is not a file"):
        to_array(tmp_path / "a.png")
    with pytest.raises(BadSampleError, match="not found"):
        find_image("a.png", tmp_path)


def test_large_images_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    message = "has 10 x 10 pixels, more than 99; resize it, or set the environment variable VG_MAX_PIXELS"
    with pytest.raises(BadSampleError, match=message):
        read_image(tmp_path / "a.png", "a.png")
    with pytest.raises(BadSampleError, match=message):
        to_array(tmp_path / "a.png")


def test_a_limit_above_that_of_pil(tmp_path: Path) -> None:
    Image.new("1", (15_000, 15_000)).save(tmp_path / "a.png")
    with pytest.raises(BadSampleError, match=r"more than 100,000,000.*VG_MAX_PIXELS"):
        read_image(tmp_path / "a.png", "a.png")
    script = (
        "from pathlib import Path; from vg.data.images import image_size; print(image_size(Path('a.png'), 'a.png'))"
    )
    environment = os.environ | {"VG_MAX_PIXELS": "300000000", "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert (result.stdout, result.stderr) == ("(15000, 15000)\n", "")


def test_the_limit_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, limit in (("25e6", 25_000_000), ("300000000", 300_000_000), ("", 7)):
        monkeypatch.setenv("VG_MAX_PIXELS", text)
        assert images.max_pixels(7) == limit
    for text in ("25M", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("VG_MAX_PIXELS", text)
        with pytest.raises(ConfigError, match=f"VG_MAX_PIXELS={text}: expected a number of pixels, such as 25e6"):
            images.max_pixels(7)
    command = subprocess.run([sys.executable, "-m", "vg", "check", "x"], capture_output=True, text=True)
    assert command.stderr == "error: VG_MAX_PIXELS=inf: expected a number of pixels, such as 25e6\n"


def test_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    file = tmp_path / "a.png"
    Image.new("RGB", (8, 4)).save(file, exif=exif)
    assert orientation(file, "a") == 6
    assert image_size(file, "a") == read_image(file, "a").shape[:2] == (4, 8)
    assert image_size(file, "a", upright=True) == read_image(file, "a", upright=True).shape[:2] == (8, 4)
