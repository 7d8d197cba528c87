"""The detection of the format and the splits of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.check.cases import instances, odvg, valid_coco, voc, write, yolo
from tests.data.detection.detection_files import write_image
from vg.data.check import detect_format
from vg.data.detection.voc import VocConfig
from vg.errors import DataError


def test_detected_formats(tmp_path: Path) -> None:
    write(tmp_path / "coco", valid_coco())
    assert detect_format(tmp_path / "coco") == {"train": {"name": "coco", "path": str(tmp_path / "coco" / "set.json")}}
    odvg(tmp_path / "odvg", instances(), labels={"0": "cat"})
    settings = detect_format(tmp_path / "odvg" / "set.jsonl")["train"]
    assert settings["label_map"] == str(tmp_path / "odvg" / "label_map.json")
    voc(tmp_path / "voc", "")
    assert detect_format(tmp_path / "voc")["train"]["name"] == "voc"
    (tmp_path / "voc" / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "voc" / "ImageSets" / "Main" / "test.txt").write_text("a")
    with pytest.raises(DataError, match="voc has test, but no train: name the part to train on train"):
        detect_format(tmp_path / "voc")
    (tmp_path / "voc" / "ImageSets" / "Main" / "trainval.txt").write_text("a")
    in_voc = {"name": "voc", "path": str(tmp_path / "voc")}
    expected = {"train": in_voc | {"split": "trainval"}, "test": in_voc | {"split": "test"}}
    assert list(detect_format(tmp_path / "voc").items()) == list(expected.items())
    yolo(tmp_path / "yolo", "")
    assert detect_format(tmp_path / "yolo") == detect_format(tmp_path / "yolo" / "data.yaml")
    assert detect_format(Path(__file__).parents[3] / "configs" / "demo_rec.yaml") == {}
    for name in ("instances_train2017", "instances_val2017"):
        (tmp_path / "both" / "annotations").mkdir(parents=True, exist_ok=True)
        (tmp_path / "both" / "annotations" / f"{name}.json").write_text("{}")
    assert list(detect_format(tmp_path / "both")) == ["train", "val"]
    (tmp_path / "two").mkdir()
    for name in ("train_val", "test"):
        (tmp_path / "two" / f"{name}.json").write_text('{"annotations": []}')
    files = {split: settings["path"] for split, settings in detect_format(tmp_path / "two").items()}
    assert files == {
        "train": str(tmp_path / "two" / "train_val.json"),
        "test": str(tmp_path / "two" / "test.json"),
    }
    mixed = tmp_path / "two"
    (mixed / "classes.json").write_text("[]")
    assert len(detect_format(mixed)) == 2, "no annotations"
    (mixed / "annotations_2.json").write_text('{"annotations": []}')
    with pytest.raises(DataError, match=r"not clear which split annotations_2\.json belongs to"):
        detect_format(mixed)
    (tmp_path / "upper").mkdir()
    (tmp_path / "upper" / "ANNO.JSON").write_text("{}")
    assert detect_format(tmp_path / "upper")["train"]["name"] == "coco"
    for split in ("train", "valid"):
        voc(tmp_path / "nested" / split, "")
    nested = {split: {"name": "voc", "path": str(tmp_path / "nested" / split)} for split in ("train", "valid")}
    assert detect_format(tmp_path / "nested") == nested
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    voc(tmp_path / "nested" / "train", f"<object><name>dog</name>{box}</object>")
    voc(tmp_path / "nested" / "valid", f"<object><name>cat</name>{box}</object>")
    both = {split: settings | {"classes": ["cat", "dog"]} for split, settings in nested.items()}
    assert detect_format(tmp_path / "nested") == both, "splits have the same prompts"
    voc(tmp_path / "nested", "")
    with pytest.raises(DataError, match=r"xml files \(Pascal VOC\) and xml files in train, valid"):
        detect_format(tmp_path / "nested")
    (tmp_path / "yolo" / "data.yaml").rename(tmp_path / "yolo" / "pets.yaml")
    assert detect_format(tmp_path / "yolo")["train"]["path"] == str(tmp_path / "yolo" / "pets.yaml")
    (tmp_path / "yolo" / "pets.yaml").unlink()
    (tmp_path / "yolo" / "classes.txt").write_text("cat\nbig dog\n")
    with pytest.raises(DataError, match=r'data\.yaml with the lines\ntrain: images\nnames: \["cat", "big dog"\]'):
        detect_format(tmp_path / "yolo")
    for path, message in (
        (tmp_path / "none", "does not exist"),
        (tmp_path, "neither data.yaml"),
        (Path(__file__), "not a dataset"),
    ):
        with pytest.raises(DataError, match=message):
            detect_format(path)


def test_unrelated_files_beside_annotations(tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / f"{name}.json").write_text('{"images": [], "annotations": []}')
    (tmp_path / "test.json").write_text('{"images": []}')
    (tmp_path / "dataset_info.yaml").write_text("{names: [cat], title: Pets}")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "meta.xml").write_text("<project/>")
    found = detect_format(tmp_path)
    assert {split: settings["name"] for split, settings in found.items()} == dict.fromkeys(found, "coco")
    assert list(found) == ["train", "val"], "test.json has no annotations"
    (tmp_path / "data.yml").write_text("{names: [cat]}")
    with pytest.raises(DataError, match=r"several formats, data\.yml \(YOLO\) and \w+\.json \(COCO\)"):
        detect_format(tmp_path)
    for file in tmp_path.glob("*.json"):
        file.unlink()
    (tmp_path / "data.yml").unlink()
    with pytest.raises(DataError, match=r"dataset_info\.yaml \(YOLO\) and xml files in test \(Pascal VOC\)"):
        detect_format(tmp_path)


def test_json_without_annotations_beside_yolo_labels(tmp_path: Path) -> None:
    yolo(tmp_path, "0 .5 .5 .2 .2")
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "classes.txt").write_text("cat\n")
    (tmp_path / "notes.json").write_text('{"categories": [{"id": 0, "name": "cat"}], "info": {}}')  # Label Studio
    with pytest.raises(DataError, match=r'for its YOLO labels, write .*\ntrain: images\nnames: \["cat"\]'):
        detect_format(tmp_path)


@pytest.mark.parametrize("name", ["_annotations.csv", "annotation_coco.json", "labels.jsonl"])
def test_one_annotation_file_in_the_folder_of_each_split(name: str, tmp_path: Path) -> None:
    table = "filename,class,xmin,ymin,xmax,ymax\na.png,cat,1,1,9,9\n"
    text = {".csv": table, ".jsonl": "{}"}.get(Path(name).suffix, '{"annotations": []}')
    for split in ("train", "valid"):
        write_image(tmp_path / split / "a.png")
        (tmp_path / split / name).write_text(text)
    (tmp_path / "train" / "meta.json").write_text("{}")
    paths = {split: settings["path"] for split, settings in detect_format(tmp_path).items()}
    assert paths == {split: str(tmp_path / split / name) for split in ("train", "valid")}
    yolo(tmp_path, "")
    with pytest.raises(DataError, match=r"several formats, data\.yaml \(YOLO\) and valid/"):
        detect_format(tmp_path)


def test_xml_files_in_folders_of_splits(tmp_path: Path) -> None:
    """As one dataset, images of val would be trained on."""
    for split in ("train", "val"):
        voc(tmp_path / "annotations" / split, "")
    with pytest.raises(DataError, match=r"annotations has the folders train and val: move .*/train\)"):
        detect_format(tmp_path)


def test_advice_for_yolo_of_cvat(tmp_path: Path) -> None:
    write_image(tmp_path / "obj_train_data" / "a.png")
    (tmp_path / "obj.names").write_text("cat\n")
    with pytest.raises(DataError, match=r'with the lines\ntrain: obj_train_data\nnames: \["cat"\]'):
        detect_format(tmp_path)


@pytest.mark.parametrize("folder", ["annotations", "annotations/xmls", "xmls"])
def test_voc_in_other_folders(folder: str, tmp_path: Path) -> None:
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    voc(tmp_path / folder, f"<object><name>cat</name>{box}</object>")
    (tmp_path / "images").mkdir()
    (tmp_path / folder / "a.png").rename(tmp_path / "images" / "a.png")
    found = detect_format(tmp_path)
    assert found == {"train": {"name": "voc", "path": str(tmp_path)}}
    assert len(VocConfig(path=str(tmp_path)).build().load(0, 0).boxes) == 1
    write(tmp_path, valid_coco())
    assert detect_format(tmp_path)["train"]["name"] == "coco", "xml files there may be something else"
