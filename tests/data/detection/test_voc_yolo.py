"""Pascal VOC and YOLO folders: samples and error messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.data.detection.detection_files import write_image
from vg.data.detection.issues import Issues
from vg.data.detection.voc import VocConfig
from vg.data.detection.yolo import YoloConfig
from vg.data.source import checked
from vg.errors import BadSampleError, DataError

OBJECT = (
    "<object><name>{}</name>{}<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def voc_object(name: str, *box: float, more: str = "") -> str:
    return OBJECT.format(name, more, *box)


def write_voc(folder: Path, objects_of: dict[str, list[str]], flat: bool = False, size: str = "40 60") -> Path:
    """Write xml files and images; `objects_of`: name of the image -> its objects."""
    for name, objects in objects_of.items():
        write_image((folder if flat else folder / "JPEGImages") / f"{name}.png")
        height, width = size.split()
        head = f"<filename>wrong.jpg</filename><size><width>{width}</width><height>{height}</height></size>"
        file = (folder if flat else folder / "Annotations") / f"{name}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"<annotation>{head}{''.join(objects)}</annotation>")
    return folder


OBJECTS = {
    "a": [voc_object("dog", 6, 11, 25, 30, more="<difficult>0</difficult>"), voc_object("cat", 1, 1, 60, 40)],
    "b": [voc_object("dog", 6, 11, 25, 30, more="<difficult>1</difficult>")],
    "c": [],
}


def test_the_right_one_of_several_voc_images(tmp_path: Path) -> None:
    """Masks and other cameras have images of the same name: <filename> and <folder> decide, or it is an error."""
    for name in ("images/a.jpg", "masks/a.png", "images/b/0.png", "images/c/0.png", "masks/d.png", "photos/d.png"):
        write_image(tmp_path / name)
    write_image(tmp_path / "top.png")
    write_image(tmp_path / "masks" / "top.png")
    heads = {
        "a": "<filename>a.jpg</filename>",
        "0": "<folder>VOC</folder><filename>b\\0.png</filename>",
        "d": "<folder>photos</folder><filename>d.png</filename>",
        "top": "<filename>top.png</filename>",
    }
    (tmp_path / "Annotations").mkdir()
    for name, head in heads.items():
        text = f"<annotation>{head}{voc_object('dog', 6, 11, 25, 30)}</annotation>"
        (tmp_path / "Annotations" / f"{name}.xml").write_text(text)
    config = VocConfig(path=str(tmp_path))
    files = [str(file.relative_to(tmp_path)) for file in config.build().image_files() if file]
    assert files == ["images/b/0.png", "images/a.jpg", "photos/d.png", "top.png"]
    file = tmp_path / "Annotations" / "d.xml"
    file.write_text(file.read_text().replace("photos", "VOC2007"))
    with pytest.raises(DataError, match=r"several images for d\.xml: masks/d\.png, photos/d\.png; write the path"):
        config.build()


@pytest.mark.parametrize("flat", [False, True])
def test_voc(tmp_path: Path, flat: bool):
    folder = write_voc(tmp_path / "pets", OBJECTS, flat)
    source = VocConfig(path=str(folder)).build()
    a, b, c = (checked(source.load(index, 0)) for index in range(3))
    assert [a.id, b.id, c.id] == ["a", "b", "c"]
    assert a.phrases == b.phrases == ("cat", "dog"), "in alphabetical order"
    assert a.boxes.tolist() == [[5, 10, 25, 30], [0, 0, 60, 40]], "Pascal counts pixels from 1"
    assert a.phrase_ids.tolist() == [1, 0]
    assert (a.crowd, a.areas) == (None, None)
    assert b.crowd.tolist() == [True], "difficult"
    assert c.boxes.shape == (0, 4)
    assert (source.provenance.data, source.provenance.split) == ("pets", "all")
    assert source.image_sizes(0).tolist() == [[40, 60]] * 3


def test_voc_splits_share_their_classes(tmp_path: Path):
    folder = write_voc(tmp_path, OBJECTS)
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("b\nc -1\n\n")
    source = VocConfig(path=str(folder), split="val").build()
    assert [source.load(index, 0).id for index in range(2)] == ["b", "c"]
    assert source.vocabulary.phrases == ("cat", "dog")
    assert source.load(0, 0).phrase_ids.tolist() == [1]
    assert VocConfig(path=str(folder), classes=["dog", "cat"]).build().load(0, 0).phrase_ids.tolist() == [0, 1]
    with pytest.raises(DataError, match=r"train\.txt cannot be read .*; existing splits: val; split: null selects"):
        VocConfig(path=str(folder), split="train").build()
    (lists / "test.txt").write_text("a\nd\ne\n")
    with pytest.raises(DataError, match=r"missing xml files: d\.xml, listed in test\.txt \(2 in all\)"):
        VocConfig(path=str(folder), split="test").build()
    with pytest.raises(DataError, match=r"a\.xml, object 2: 'cat'; add it to classes \(dog\)"):
        VocConfig(path=str(folder), classes=["dog"]).build()


def test_subfolders_of_voc_annotations(tmp_path: Path):
    folder = write_voc(tmp_path, {"b/x": OBJECTS["a"], "a/x": [], "a/y": [], "z": OBJECTS["b"]})
    for name in ("c/x.png", "c/z.png"):  # not the images of a/x.xml, b/x.xml and z.xml
        write_image(folder / "JPEGImages" / name)
    (folder / "Annotations" / "z.xml").write_text("<annotation><filename>z.png</filename></annotation>")
    config, issues = VocConfig(path=str(folder)), Issues()
    assert list(config.read(issues).ids) == ["a/x", "a/y", "b/x", "z"]
    assert [(issue.what, issue.examples) for issue in issues] == [
        ("images without an xml file, which are not used", ["c/x.png"])
    ]
    source = config.build()
    assert [len(source.load(index, 0).boxes) for index in range(4)] == [0, 0, 2, 0]
    files = [f"{folder}/JPEGImages/{name}.png" for name in ("a/x", "a/y", "b/x", "z")]
    assert list(map(str, source.image_files())) == files
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "val.txt").write_text("b/x\na/y\n")
    assert list(VocConfig(path=str(folder), split="val").read(issues).ids) == ["b/x", "a/y"]
    for stale, message in ((".checkpoints", None), ("backup", r"backup/z\.xml, z\.xml annotate z\.png; keep one")):
        (folder / "Annotations" / stale).mkdir()
        copy = (folder / "Annotations" / "z.xml").read_text()
        (folder / "Annotations" / stale / "z.xml").write_text(copy)
        if message is None:
            assert len(config.build()) == 4
            continue
        with pytest.raises(DataError, match=f"images with several xml files: {message}"):
            config.build()
        (folder / "Annotations" / stale / "z.xml").unlink()
    (folder / "Annotations" / "b" / "x.xml").write_text("<annotation>")
    with pytest.raises(DataError, match=r"b/x\.xml: no element found"):
        config.build()


def test_names_with_spaces_in_voc_lists(tmp_path: Path):
    names = ["a dog", "a dog 1", "b"]
    folder = write_voc(tmp_path, dict.fromkeys(names, OBJECTS["a"]))
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "val.txt").write_text("a dog 1\na dog  -1\nb  7\n")
    source = VocConfig(path=str(folder), split="val").build()
    assert [source.load(index, 0).id for index in range(3)] == ["a dog 1", "a dog", "b"]
    (folder / "ImageSets" / "Main" / "val.txt").write_text("a cat\n")
    with pytest.raises(DataError, match=r"missing xml files: a cat\.xml, listed in val\.txt"):
        VocConfig(path=str(folder), split="val").build()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", "no element found"),
        ("<a><object><name>dog</name></object></a>", "object 1: name 'dog', box .*None"),
        (f"<a>{voc_object('', 1, 2, 3, 4)}</a>", "object 1: name ''"),
        (
            f"<a>{voc_object('dog', 1, 2, 3, 4)}{voc_object('dog', 1, 2, 3, '')}</a>",
            "object 2: name 'dog', box .*'3', ''",
        ),
    ],
)
def test_voc_errors(tmp_path: Path, text: str, message: str):
    folder = write_voc(tmp_path, OBJECTS)
    (folder / "Annotations" / "b.xml").write_text(text)
    with pytest.raises(DataError, match=rf"b\.xml.*{message}"):
        VocConfig(path=str(folder)).build()


def test_inverted_boxes_are_found_before_any_image_is_loaded(tmp_path: Path):
    objects = {"b": [voc_object("dog", 6, 11, 25, 30), voc_object("cat", 30, 5, 10, 20)]}
    folder = write_voc(tmp_path / "voc", OBJECTS | objects)
    with pytest.raises(DataError, match=r"inverted boxes .*b\.xml, object 2 \(b\.png, cat\): \[30, 5, 10, 20\]; boxes"):
        VocConfig(path=str(folder)).build()
    file = write_yolo(tmp_path / "yolo")
    (tmp_path / "yolo" / "labels" / "val" / "b.txt").write_text("0 0.5 0.5 0.1 -0.01\n")
    with pytest.raises(DataError, match=r"inverted boxes .*labels/val/b\.txt, line 1"):
        YoloConfig(path=str(file), split="val").build()


def test_voc_without_files_or_with_other_images(tmp_path: Path):
    with pytest.raises(DataError, match="contains no xml file"):
        VocConfig(path=str(tmp_path)).build()
    folder = write_voc(tmp_path, OBJECTS | {"a": [voc_object("dog", 6, 11, 25, 30)]}, size="60 40")
    with pytest.raises(BadSampleError, match=r"a\.png is 60 wide and 40 high, its annotation has 40 and 60"):
        VocConfig(path=str(folder)).build().load(0, 0)
    (folder / "JPEGImages" / "a.png").unlink()
    with pytest.raises(BadSampleError, match=r"wrong\.jpg not found below"):
        VocConfig(path=str(folder)).build().load(0, 0)


def write_yolo(folder: Path, **changes: Any) -> Path:
    for name, labels in {"a": "1 0.25 0.5 0.25 0.5\n\n0 0.9 0.1 0.2 0.2\n", "b": "1 0.1 0.1 0.5 0.1 0.3 0.6\n"}.items():
        write_image(folder / "images" / "val" / f"{name}.png")
        (folder / "labels" / "val").mkdir(parents=True, exist_ok=True)
        (folder / "labels" / "val" / f"{name}.txt").write_text(labels)
    write_image(folder / "images" / "val" / "c.png")
    document = {"path": ".", "val": "images/val", "names": ["hot_dog", "cat"], "nc": 2} | changes
    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in document.items() if value is not None}))
    return file


def test_yolo(tmp_path: Path):
    source = YoloConfig(path=str(write_yolo(tmp_path)), split="val").build()
    a, b, c = (checked(source.load(index, 0)) for index in range(3))
    assert a.phrases == ("hot dog", "cat")
    np.testing.assert_allclose(a.boxes, [[7.5, 10, 22.5, 30], [48, 0, 60, 8]], atol=1e-4)
    assert a.phrase_ids.tolist() == [1, 0]
    np.testing.assert_allclose(b.boxes, [[6, 4, 30, 24]], atol=1e-4, err_msg="the box of a polygon")
    assert c.boxes.shape == (0, 4), "no label file"
    assert [a.id, b.id, c.id] == ["images/val/a", "images/val/b", "images/val/c"]
    assert source.image_sizes(0).tolist() == [[40, 60]] * 3


@pytest.mark.parametrize(
    "changes",
    [
        {"names": {1: "cat", 0: "hot_dog"}, "nc": None},
        {"val": ["images/val"]},
        {"path": None, "val": "../images/val"},  # as Roboflow writes
        {"path": "/datasets/elsewhere"},  # of the machine it was written on
        {"val": "val.txt"},
        {"val": "windows.txt"},
        {"val": ".\\images\\val"},
    ],
)
def test_yolo_in_its_variants(tmp_path: Path, changes: dict[str, Any]):
    folder = tmp_path / "set"
    file = write_yolo(folder, **changes)
    (folder / "val.txt").write_text("./images/val/a.png\nimages/val/b.png\n./images/val/c.png\n")
    (folder / "windows.txt").write_text("".join(f".\\images\\val\\{name}.png\r\n" for name in "abc"))
    source = YoloConfig(path=str(folder), split="val").build()
    assert file.exists()
    assert source.vocabulary.names == ("hot_dog", "cat")
    assert [len(source.load(index, 0).boxes) for index in range(3)] == [2, 1, 0]


def test_yolo_images_that_are_listed_several_times(tmp_path: Path):
    write_yolo(tmp_path, val=["images/val", "images", "val.txt"])
    (tmp_path / "val.txt").write_text("./images/val/../val/a.png\n")
    source = YoloConfig(path=str(tmp_path), split="val").build()
    assert [source.load(index, 0).id for index in range(len(source))] == [f"images/val/{name}" for name in "abc"]


def test_yolo_images_with_one_label_file(tmp_path: Path):
    """Their samples would have the same id, of which metrics keep one."""
    write_yolo(tmp_path)
    write_image(tmp_path / "images" / "val" / "a.jpg")
    with pytest.raises(
        DataError, match=r"several images: labels/val/a\.txt: images/val/a\.jpg, images/val/a\.png; move all but one"
    ):
        YoloConfig(path=str(tmp_path), split="val").build()


@pytest.mark.parametrize("folder", ["images/val", "./images"])
def test_yolo_labels_without_an_image(tmp_path: Path, folder: str):
    write_yolo(tmp_path, val=[folder, "val.txt"])
    (tmp_path / "val.txt").write_text("images/val/a.png\n")
    labels = tmp_path / "labels" / "val"
    for name, text in {"classes": "hot_dog\ncat\n", "empty": "", "lost": "1 0.25 0.5 0.25 0.5\n"}.items():
        (labels / f"{name}.txt").write_text(text)
    YoloConfig(path=str(tmp_path), split="val").read(issues := Issues())
    (found,) = [issue for issue in issues if issue.what == "label files of val without an image"]
    assert (found.severity, found.count, found.examples) == ("warning", 1, ["labels/val/lost.txt"])
    write_yolo(tmp_path, val="val.txt")
    YoloConfig(path=str(tmp_path), split="val").read(issues := Issues())
    assert not any("without an image" in issue.what for issue in issues), "they are of images that are not listed"


@pytest.mark.parametrize("kind", ["parent", "absolute folder", "absolute list"])
def test_yolo_images_beside_the_folder_of_the_yaml(tmp_path: Path, kind: str):
    write_yolo(tmp_path)
    images = tmp_path / "images" / "val"
    value = {"parent": "../images/val", "absolute folder": str(images), "absolute list": "val.txt"}[kind]
    file = write_yolo(tmp_path / "config", path=None, val=value)
    (tmp_path / "config" / "val.txt").write_text("".join(f"{images / name}.png\n" for name in "abc"))
    for image in (tmp_path / "config" / "images" / "val").iterdir():
        image.unlink()  # only those outside remain
    (tmp_path / "config" / "images" / "val").rmdir()
    source = YoloConfig(path=str(file), split="val").build()
    assert [len(checked(source.load(index, 0)).boxes) for index in range(3)] == [2, 1, 0]
    assert source.load(0, 0).id == "images/val/a"


@pytest.mark.parametrize(("shape", "keypoints"), [([2, 2], ".45 .45 .55 .55"), ([2, 3], ".45 .45 1 .55 .55 0")])
def test_yolo_keypoints_are_no_polygons(tmp_path: Path, shape: list[int], keypoints: str):
    file = write_yolo(tmp_path, kpt_shape=shape)
    labels = tmp_path / "labels" / "val"
    (labels / "a.txt").write_text(f"0 .5 .5 .2 .2 {keypoints}\n")
    (labels / "b.txt").write_text("0 .5 .5 .2 .2\n")
    source = YoloConfig(path=str(file), split="val").build()
    np.testing.assert_allclose(source.load(0, 0).boxes, [[24, 16, 36, 24]], atol=1e-4)
    np.testing.assert_allclose(source.load(1, 0).boxes, [[24, 16, 36, 24]], atol=1e-4)
    (labels / "b.txt").write_text("0 .1 .1 .5 .1 .3 .6\n")
    with pytest.raises(DataError, match=r"expected: class x y width height, and \d numbers of keypoints"):
        YoloConfig(path=str(file), split="val").build()


def test_yolo_labels_refer_to_the_upright_image(tmp_path: Path):
    file = write_yolo(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    write_image(tmp_path / "images" / "val" / "a.png", exif=exif)
    source = YoloConfig(path=str(file), split="val").build()
    sample = source.load(0, 0)
    assert sample.image.shape == (60, 40, 3)
    np.testing.assert_allclose(sample.boxes[0], [5, 15, 15, 45], atol=1e-4)
    assert source.image_sizes(0)[0].tolist() == [60, 40]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("dog 0.5 0.5 0.1 0.1", "classes count from 0 to 1"),
        ("2 0.5 0.5 0.1 0.1", "2 0.5 0.5 0.1 0.1; classes count from 0 to 1"),
        ("-1 0.5 0.5 0.1 0.1", "-1 0.5 0.5 0.1 0.1; classes count from 0 to 1"),
        ("0 0.5 0.5 0.1", r"\(3 coordinates\); expected: class x y width height"),
        ("0 0.5 0.5 0.1 0.1 0.3", r"\(5 coordinates\)"),
        ("0 30 20 10 10", "0 30 20 10 10; divide x and width"),
        ("0 nan 0.5 0.1 0.1", "0 nan .*all of them numbers"),
    ],
)
def test_yolo_errors_name_the_line(tmp_path: Path, line: str, message: str):
    file = write_yolo(tmp_path)
    (tmp_path / "labels" / "val" / "b.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(DataError, match=rf"labels/val/b\.txt, line 2: .*{message}"):
        YoloConfig(path=str(file), split="val").build()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": None}, "names: expected a list .*, got None"),
        ({"names": [{"cat": 1}]}, "expected a list of class names or a mapping 0: name"),
        ({"names": {0: "cat", "one": "dog"}}, "expected a list of class names or a mapping 0: name"),
        ({"names": {1: "cat", 2: "dog"}}, "expected a list of class names or a mapping 0: name"),
        ({"names": [True, "cat"]}, "YAML reads one of the names as True; put it in quotes"),
        ({"names": [None, "cat"]}, "YAML reads one of the names as None; put it in quotes"),
        ({"kpt_shape": 17}, r"kpt_shape is 17, expected \[number of keypoints, 2 or 3\]"),
        ({"nc": 3}, "nc is 3 but there are 2 names"),
        ({"val": None, "train": "images/val"}, "has no split 'val'; it has train"),
        ({"val": "photos"}, r"val is photos, but .*photos does not exist"),
    ],
)
def test_yolo_errors_of_the_yaml(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(DataError, match=rf"data\.yaml.*{message}"):
        YoloConfig(path=str(write_yolo(tmp_path, **changes)), split="val").build()


def test_yolo_without_files(tmp_path: Path):
    with pytest.raises(DataError, match=r"cannot read .*data\.yaml: No such file"):
        YoloConfig(path=str(tmp_path)).build()
    (tmp_path / "data.yaml").write_text("- a\n")
    with pytest.raises(DataError, match="must have the keys names, train and val"):
        YoloConfig(path=str(tmp_path)).build()
    file = write_yolo(tmp_path)
    for label in (tmp_path / "labels" / "val").iterdir():
        label.unlink()
    with pytest.raises(
        DataError, match=r"images of val without a label file: images.val.a\.png: .*labels.val.a\.txt .*\(3 in all\)"
    ):
        YoloConfig(path=str(file), split="val").build()
