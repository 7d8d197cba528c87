"""Photos of phones: stored as the sensor was held, shown upright by annotation tools, whose boxes are used as drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.data.detection.detection_files import coco_document, write_coco, write_image
from vg.data.detection.coco import CocoConfig
from vg.data.detection.odvg import OdvgConfig
from vg.data.detection.voc import VocConfig
from vg.errors import BadSampleError
from vg.inference.images import named_images


def write_photo(file: Path, orientation: int) -> tuple[np.ndarray, np.ndarray]:
    """Write a stored image of 40 x 60 pixels; return its pixels as stored, and as viewers show them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    write_image(file, 40, 60, exif=exif)
    with Image.open(file) as image:
        return np.asarray(image), np.asarray(ImageOps.exif_transpose(image))


def coco(folder: Path, height: int, width: int, upright: bool | None) -> CocoConfig:
    document = coco_document()
    document["images"][0] |= {"height": height, "width": width}
    return CocoConfig(path=str(write_coco(folder, document)), upright=upright)


def odvg(folder: Path, height: int, width: int, upright: bool | None) -> OdvgConfig:
    regions = [{"phrase": "cat", "bbox": [5, 10, 25, 30]}]
    line = {"filename": "a.png", "height": height, "width": width, "grounding": {"caption": "", "regions": regions}}
    (folder / "val.jsonl").write_text(json.dumps(line))
    return OdvgConfig(path=str(folder / "val.jsonl"), upright=upright)


def voc(folder: Path, height: int, width: int, upright: bool | None) -> VocConfig:
    box = "<bndbox><xmin>6</xmin><ymin>11</ymin><xmax>25</xmax><ymax>30</ymax></bndbox>"
    size = f"<size><width>{width}</width><height>{height}</height></size>"
    (folder / "a.xml").write_text(f"<annotation>{size}<object><name>cat</name>{box}</object></annotation>")
    return VocConfig(path=str(folder), upright=upright)


@pytest.mark.parametrize("dataset", [coco, odvg, voc])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("upright", [None, True, False])
def test_annotated_size_or_setting_decides(tmp_path: Path, dataset, orientation: int, upright: bool | None) -> None:
    swapped = orientation >= 5
    height, width = (60, 40) if swapped else (40, 60)
    config = dataset(tmp_path, height, width, upright)
    stored, shown = write_photo(tmp_path / "a.png", orientation)
    source = config.build()
    assert source.image_sizes(0)[0].tolist() == [height, width]
    if swapped and upright is False:
        with pytest.raises(BadSampleError, match=r"a\.png is 60 wide and 40 high, .*turn the image, or set `upright`"):
            source.load(0, 0)
    else:
        assert np.array_equal(source.load(0, 0).image, shown if swapped or upright else stored)


@pytest.mark.parametrize("dataset", [coco, odvg, voc])
def test_annotations_of_the_stored_pixels(tmp_path: Path, dataset) -> None:
    config = dataset(tmp_path, 40, 60, None)
    stored, _ = write_photo(tmp_path / "a.png", 6)
    assert np.array_equal(config.build().load(0, 0).image, stored)


@pytest.mark.parametrize(("height", "width"), [(60, 40), (40, 60), (0, 0)])
def test_predictions_are_made_on_the_annotated_pixels(tmp_path: Path, height: int, width: int) -> None:
    config = coco(tmp_path, height, width, None)
    stored, shown = write_photo(tmp_path / "a.png", 6)
    image = next(named_images(config.path)[0]).read()
    assert np.array_equal(image, shown if height == 60 else stored)
    assert np.array_equal(image, config.build().load(0, 0).image)
