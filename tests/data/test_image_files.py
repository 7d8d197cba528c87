"""Which file is the image of a dataset, where folders of splits have images of equal names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from vg.data import DatasetConfig
from vg.data.check import detect_format
from vg.data.detection.coco import CocoConfig
from vg.data.image_files import image_files, image_key, image_root
from vg.data.images import find_image
from vg.errors import BadSampleError

GRAY = {"train": 50, "val": 200}  # of all images of a split


def write(root: Path, *names: str) -> None:
    """Write images; those of different folders are different."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        gray = next((gray for split, gray in GRAY.items() if split in name), 0)
        Image.new("RGB", (20, 10), (gray,) * 3).save(root / name)


def coco(*files: str) -> dict[str, Any]:
    """A COCO json with a box in each image."""
    return {
        "images": [{"id": i, "file_name": file, "height": 10, "width": 20} for i, file in enumerate(files)],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [2, 2, 5, 5]} for i in range(len(files))],
        "categories": [{"id": 1, "name": "cat"}],
    }


def shades(folder: Path) -> dict[str, int]:
    """The gray of the only image of each split that is detected in a folder."""
    splits = detect_format(folder)
    sources = {split: TypeAdapter(DatasetConfig).validate_python(own).build() for split, own in splits.items()}
    return {split: round(float(np.mean(source.load(0, 0).image))) for split, source in sources.items()}


LAYOUTS = {
    "annotations/instances_{}2017.json": ("{}2017/1.png", "{}2017/000000000001.png", "images/{}2017/1.png"),
    "annotations/instances_{}.json": ("{}/1.png", "images/{}/1.png"),
    "{}.json": ("{}/1.png", "images/{}/1.png"),
    "{}.csv": ("{}/1.png",),
    "annotations/{}.jsonl": ("images/{}/1.png",),
}


@pytest.mark.parametrize(("file", "image"), [(file, image) for file, images in LAYOUTS.items() for image in images])
def test_each_split_has_its_own_folder(file: str, image: str, tmp_path: Path) -> None:
    name = Path(image).name
    for split in GRAY:
        write(tmp_path, image.format(split))
        line = {"filename": name, "grounding": {"caption": "cat", "regions": [{"phrase": "cat", "bbox": [2, 2, 7, 7]}]}}
        table = f"image,class,x,y,width,height\n{name},cat,2,2,5,5\n"
        path = tmp_path / file.format(split)
        path.parent.mkdir(exist_ok=True)
        path.write_text({".csv": table, ".jsonl": json.dumps(line)}.get(path.suffix, json.dumps(coco(name))))
    assert shades(tmp_path) == GRAY


def test_folders_of_images(tmp_path: Path) -> None:
    file = tmp_path / "annotations" / "instances_default.json"
    write(tmp_path, "images/default/a.png", "images/train/0.png", "b.png")
    for name, root in (("a.png", "images/default"), ("train/0.png", "images"), ("b.png", ""), ("c.png", "")):
        assert image_root(file, [name]) == tmp_path / root
    assert image_root(file, ["c.png", "a.png", "../b.png"]) == tmp_path / "images" / "default", "where most are"
    write(tmp_path, "annotations/c.png", "depth/a.png", "images/a.png", "train2017/x.png", "val2017/y.png")
    assert image_root(tmp_path / "annotations" / "labels.csv", ["c.png"]) == tmp_path / "annotations"
    assert image_root(tmp_path / "depth.json", ["a.png"]) == tmp_path / "images", "depth is no split"
    assert image_root(tmp_path / "my_train2017.json", ["x.png", "y.png"]) == tmp_path, "of both folders"
    assert image_root(tmp_path / "my_train2017.json", ["x.png"]) == tmp_path / "train2017"


@pytest.mark.parametrize("name", ["001.png", "000000000001.png"])
def test_a_name_of_different_images_is_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path, f"train2017/{name}")
    assert find_image(name, tmp_path) == tmp_path / "train2017" / name
    write(tmp_path, f"val2017/{name}")
    message = rf"{name} may be train2017/{name} or val2017/{name} below .* are different images; set image_root"
    with pytest.raises(BadSampleError, match=message):
        find_image(name, tmp_path)
    files = [tmp_path / name, tmp_path / "val2017" / name]
    assert image_files([name, f"val2017/{name}"], tmp_path) == files, "no file of one, as if it were missing"
    (tmp_path / "val2017" / name).write_bytes((tmp_path / "train2017" / name).read_bytes())
    assert find_image(name, tmp_path) == image_files([name], tmp_path)[0] == tmp_path / "train2017" / name, "a copy"
    write(tmp_path, name)
    assert find_image(name, tmp_path) == tmp_path / name


def test_an_image_of_another_split_is_not_used(tmp_path: Path) -> None:
    write(tmp_path, "val2017/001.png")
    with pytest.raises(BadSampleError, match=r"not found below .*\(data\.train\.image_root=FOLDER data\.eval\."):
        find_image("train2017/001.png", tmp_path)


def test_ids_of_coco_are_the_same_image_in_all_folders(tmp_path: Path) -> None:
    name = "COCO_train2014_000000000716.jpg"
    write(tmp_path, f"train2014/{name}", "val2017/000000000716.jpg")
    assert find_image(name, tmp_path) == tmp_path / "train2014" / name
    assert image_key("000000000716.jpg", tmp_path / "val2017") == image_key(name, tmp_path) == "coco/716"


def test_equal_numbers_of_two_splits_are_different_images(tmp_path: Path) -> None:
    write(
        tmp_path, *(f"{folder}/00000000000{number}.jpg" for number, folder in ((1, "train"), (2, "train"), (1, "val")))
    )
    files = [str(tmp_path / split / f"00000000000{number}.jpg") for split, number in (("train", 2), ("val", 1))]
    assert [image_key(Path(file).name, Path(file).parent) for file in files] == files
    write(tmp_path, "coco/train/000000000001.jpg", "coco/val/000000000002.jpg")
    assert image_key("000000000002.jpg", tmp_path / "coco" / "val") == "coco/2"


def test_backslashes_of_windows(tmp_path: Path) -> None:
    write(tmp_path, "images/a.png", "train2017/000000000716.jpg", "b\\c.png")
    found = {name: find_image(name, tmp_path) for name in ("images\\a.png", ".\\images\\a.png", "b\\c.png")}
    assert [*found.values()] == [tmp_path / "images" / "a.png"] * 2 + [tmp_path / "b\\c.png"]
    assert image_files([*found], tmp_path) == [*found.values()]
    assert image_key("train2017\\000000000716.jpg", tmp_path) == "coco/716"
    with pytest.raises(BadSampleError, match="outside"):
        find_image("..\\a.png", tmp_path / "images")
    (tmp_path / "set.json").write_text(json.dumps(coco("images\\a.png")))
    assert CocoConfig(path=str(tmp_path / "set.json")).build().load(0, 0).image.shape == (10, 20, 3)
