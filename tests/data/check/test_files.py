"""`vg check` on ODVG lines, Pascal VOC and YOLO folders and mixtures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.check.cases import check, errors, found, instances, odvg, valid_coco, voc, write, yolo
from tests.data.detection.detection_files import write_image
from vg.data.check import diagnose, to_json, to_text
from vg.data.detection.yolo import YoloConfig
from vg.data.mixture import MixtureConfig
from vg.data.synthetic.shapes import ShapesConfig


def test_odvg_lines(tmp_path: Path) -> None:
    good = {"bbox": [5, 5, 30, 30], "label": 1, "category": "cat"}
    bad = [{**good, "label": 9}, {**good, "category": "dog"}, {**good, "bbox": [5, 5, 1]}, {**good, "label": [1]}, 3]
    config = odvg(
        tmp_path, "{", "[]", {"detection": 3}, {"x": 1}, instances(good, *bad), labels={"1": "cat", "2": "dog"}
    )
    diagnosis = check(config)
    assert found(diagnosis, "not valid ODVG").count == 4
    assert found(diagnosis, "not valid ODVG").examples[0].startswith("line 1: {")
    assert found(diagnosis, "labels that are not in the label map").count == 2
    assert "is 'dog' here, 'cat' in the label map" in found(diagnosis, "mean another class").examples[0]
    assert found(diagnosis, "not four finite numbers").examples == ["line 5, instance 3: bbox [5, 5, 1]"]
    assert found(diagnosis, "not objects").examples == ["line 5, instance 5: 3"]
    assert found(diagnosis, "do not count from 0").severity == "warning"
    unnamed = {"bbox": [5, 5, 30, 30], "label": 1}
    assert found(check(odvg(tmp_path / "b", instances(unnamed))), "without a label map").severity == "error"
    other = instances({**good, "label": 0, "category": "dog"}, unnamed)
    diagnosis = check(odvg(tmp_path / "c", instances(good), other))
    assert not errors(diagnosis), "the categories are the label map"
    assert diagnosis.datasets[0].annotations.names == ["dog", "cat"]
    diagnosis = check(odvg(tmp_path / "d", instances(good, {**good, "category": "dog"})))
    assert found(diagnosis, "several categories").examples == ["line 1: label 1 is 'dog' here, 'cat' before"]


def test_odvg_phrases(tmp_path: Path) -> None:
    def region(phrase: str | None, *box: float) -> dict[str, Any]:
        return {"phrase": phrase, "bbox": list(box)}

    regions = [region("a cat", 5, 5, 30, 30), region("A cat", 30, 5, 50, 30), region(None, 5, 5, 9, 9)]
    long = [region(f"the thing of number {number}", 5, 5, 30, 30) for number in range(60)]
    rows = [{"grounding": {"caption": "a cat", "regions": items}} for items in (regions, long)]
    diagnosis = check(odvg(tmp_path, *rows))
    assert found(diagnosis, "regions without a phrase").examples[0].startswith("line 1, region 2")
    assert found(diagnosis, "phrases with several boxes").examples == ["line 1: 'a cat' has 2 boxes"]
    assert found(diagnosis, "do not fit in one prompt").examples == ["line 2: at least 362 tokens"]
    swapped = instances(*({"bbox": [30 + n, 12, 10, 10], "label": 0} for n in range(12)))
    mixed = found(
        check(odvg(tmp_path / "b", swapped, labels={"0": "cat"})), "boxes that are not xyxy (left, top, right, bottom)"
    )
    assert "fit as xywh (left, top, width, height)" in mixed.fix


def test_whole_captions(tmp_path: Path) -> None:
    def row(caption: str, *spans: Any) -> dict[str, Any]:
        boxes = [[5, 5, 30, 30 + index] for index in range(len(spans))]
        regions = [{"bbox": box, "tokens_positive": span} for box, span in zip(boxes, spans, strict=True)]
        return {"grounding": {"caption": caption, "regions": regions}}

    good = row("a cat and a cat", [[0, 5]], [[10, 15]], [[0, 5]])
    assert errors(check(replace(odvg(tmp_path / "a", good), captions="whole"))) == []
    several = found(check(replace(odvg(tmp_path / "a", good), captions="whole")), "phrases with several boxes")
    assert several.examples == ["line 1: 'a cat' has 2 boxes"], "the other cat is another phrase"
    long = row("a cat and " * 99 + "a dog", [[0, 5]])
    diagnosis = check(
        replace(odvg(tmp_path, good, long, row("a cat", None), row("a, cat", [[1, 2]])), captions="whole")
    )
    assert found(diagnosis, "captions that do not fit").examples == ["line 2: at least 302 tokens"]
    assert "set captions: phrases" in found(diagnosis, "captions that do not fit").fix
    assert found(diagnosis, "without tokens_positive").examples == ["line 3, region 0: phrase None, 'a cat'"]
    assert found(diagnosis, "without a letter or digit").examples == ["line 4, region 0: phrase None, 'a, cat': ','"]
    assert not any("whose phrases do not fit" in issue.what for issue in diagnosis.issues)
    counted = diagnose(
        {"train": replace(odvg(tmp_path, row("a cat.", [[0, 1]])), captions="whole")}, 5, lambda x: [3] * len(x)
    )
    assert errors(counted) == [], "[CLS] a cat . [SEP]"
    counted = diagnose(
        {"train": replace(odvg(tmp_path, row("a big cat", [[0, 1]])), captions="whole")}, 5, lambda x: [3] * len(x)
    )
    assert found(counted, "captions that do not fit").examples == ["line 1: 6 tokens"]


def test_voc_folders(tmp_path: Path) -> None:
    box = "<bndbox><xmin>{}</xmin><ymin>5</ymin><xmax>30</xmax><ymax>30</ymax></bndbox>"
    good, bad = box.format(5), box.format("left")
    config = voc(tmp_path, f"<object><name>cat</name>{good}</object><object><name>cat</name>{bad}</object><object/>")
    voc(tmp_path, f"<object><name>cow</name>{good}</object>", "b")
    (tmp_path / "c.xml").write_text("<annotation>")
    write_image(tmp_path / "d.png")
    diagnosis = check(config)
    assert found(diagnosis, "objects without a name or a number").examples[0].startswith("a.xml, object 2")
    assert found(diagnosis, "invalid xml files").count == 1
    assert found(diagnosis, "without an xml file").examples == ["d.png"]
    config.classes = ["cat"]
    assert found(check(config), "unknown class").examples == ["b.xml, object 1: 'cow'"]
    config.split = "train"
    assert found(check(config), "cannot load").severity == "error"


def test_yolo_folders(tmp_path: Path) -> None:
    lines = [
        "0 .5 .5 .2 .2",
        "2 .5 .5 .2 .2",
        "0 .5 .5 .2",
        "cat .5 .5 .2 .2",
        "0 30 20 10 10",
        "1 .1 .1 .5 .1 .5 .5",
        "0 x",
    ]
    diagnosis = check(yolo(tmp_path, "\n".join(lines)))
    assert found(diagnosis, "not in data.yaml").examples == [
        "labels/a.txt, line 2: 2 .5 .5 .2 .2",
        "labels/a.txt, line 4: cat .5 .5 .2 .2",
    ]
    assert found(diagnosis, "invalid label lines").count == 2
    assert found(diagnosis, "beyond 0..1").examples == ["labels/a.txt, line 5: 0 30 20 10 10"]
    assert found(diagnosis, "without a label file").severity == "note"
    np.testing.assert_allclose(diagnosis.datasets[0].xyxy, [[24, 16, 36, 24], [6, 4, 30, 20]])
    write_image(tmp_path / "images" / "a.jpg")
    (tmp_path / "data.yaml").write_text("{names: [cat, dog], train: [images, images]}")
    diagnosis = check(YoloConfig(path=str(tmp_path)))
    assert found(diagnosis, "label files with several images").examples == ["labels/a.txt: images/a.jpg, images/a.png"]
    assert found(diagnosis, "train lists several times").count == 3
    corners = "\n".join(f"0 {0.02 * number} .02 .6 .6" for number in range(12))
    assert "xywh (left, top, width, height)" in found(check(yolo(tmp_path / "b", corners)), "not cxcywh").fix


def test_drawn_scenes_and_components_of_a_mixture(tmp_path: Path) -> None:
    mixture = MixtureConfig(datasets=[ShapesConfig(size=5), write(tmp_path, valid_coco())])
    diagnosis = diagnose({"train": mixture, "val": ShapesConfig(split="val", size=50)}, 256, limit=4)
    assert [dataset.name for dataset in diagnosis.datasets] == ["train.datasets.0", "train.datasets.1", "val"]
    assert [len(dataset.annotations.ids) for dataset in diagnosis.datasets] == [4, 12, 4]
    assert not errors(diagnosis)
    assert len(diagnosis.images(6)) == 6


JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    1e300,
    float("nan"),
    "",
    "x",
    [],
    [[]],
    [1, 2, 3, 4],
    {},
    {"id": 1},
    "\x00",
    10**30,
]


def damaged(value: Any, random: np.random.Generator) -> Any:
    """Return a copy with one value, at any depth, replaced by junk."""
    if not isinstance(value, dict | list) or not value or random.random() < 0.15:
        return JUNK[random.integers(len(JUNK))]
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[random.integers(len(keys))]
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = damaged(value[key], random)
    return copy


@pytest.mark.parametrize("seed", range(3))
def test_junk_values_raise_no_exception(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    document = valid_coco(3)
    coco = write(tmp_path, document)
    box = {"bbox": [[5, 5, 30, 30], [1, 1, 9, 9]], "label": 1, "category": "dog"}
    rows = [instances(box), {"grounding": {"caption": "a dog", "regions": [{"phrase": "dog", "bbox": [1, 1, 9, 9]}]}}]
    lines = odvg(tmp_path / "odvg", *rows, labels={"0": "cat", "1": "dog"})
    xml = voc(tmp_path / "voc", "")
    labels = yolo(tmp_path / "yolo", "")
    objects = (
        "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
    )
    for _ in range(40):
        Path(coco.path).write_text(json.dumps(damaged(document, random)))
        odvg(
            tmp_path / "odvg",
            *(json.dumps(damaged({"filename": "a.png", **row}, random)) for row in rows),
            labels={"1": "dog"},
        )
        words = [str(JUNK[random.integers(len(JUNK))]).replace("\x00", "?") for _ in range(2)]
        voc(tmp_path / "voc", objects.format(*words))
        yolo(tmp_path / "yolo", " ".join(["0", "0.5", "0.5", *words]))
        diagnosis = diagnose({"train": coco, "odvg": lines, "voc": xml, "yolo": labels}, 256)
        diagnosis.images(8)
        to_text(diagnosis)
        json.dumps(to_json(diagnosis))
