"""Tables of expressions: columns, boxes, splits, and what vg predict writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.detection.detection_files import write_image
from vg.data.check import detect_format, diagnose
from vg.data.detection.vocabulary import VocabularyConfig
from vg.data.expressions import Columns, CsvConfig
from vg.errors import BadSampleError, DataError, NoSuchSplitError
from vg.inference.formats import write_results
from vg.inference.images import to_array
from vg.inference.result import Result
from vg.labeling.tables import read_table

BOX = [5.0, 6.0, 25.0, 36.0]  # xyxy
XYXY = {"left": 5, "top": 6, "right": 25, "bottom": 36}
XYWH = {"x": 5, "y": 6, "width": 20, "height": 30}


def write(folder: Path, *rows: dict[str, Any], name: str = "set.csv") -> CsvConfig:
    """Write rows and an image of 60 x 40 pixels for each."""
    for row in rows:
        for key in {"image", "file_name", "filename", "image_name"} & row.keys():
            if row[key]:
                write_image(folder / str(row[key]), 40, 60)
    if name.endswith(".jsonl"):
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    else:
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return CsvConfig(path=str(folder / name))


@pytest.mark.parametrize("name", ["set.csv", "set.jsonl"])
@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.png", "phrase": "the cat", **XYXY},
        {"file_name": "a.png", "expression": "the cat", "x1": 5, "y1": 6, "x2": 25, "y2": 36},
        {"filename": "a.png", "caption": "the cat", **XYWH},
        {"image": "a.png", "text": "the cat", "class": "animal", "xmin": 5, "ymin": 6, "xmax": 25, "ymax": 36},
        {"image": "a.png", "text": "the cat", "bbox_xywh": [5, 6, 20, 30], "id": 7},
        {"image": "a.png", "text": "the cat", "box_xyxy": BOX, "box": "other"},
        {"image": "a.png", "width": 60, "height": 40, "text": "the cat", "x": 5, "y": 6, "w": 20, "h": 30},
        {"image": "a.png", "image_path": "other.png", "text": "the cat", **XYXY},
        {"image_name": "a.png", "text": "the cat", **XYXY},
    ],
    ids=lambda row: ",".join(row),
)
def test_columns(tmp_path: Path, row: dict[str, Any], name: str) -> None:
    source = write(tmp_path, row, name=name).build()
    sample = source.load(0, epoch=0)
    assert sample.phrases == ("the cat",)
    assert sample.boxes.tolist() == [BOX]
    assert source.provenance.task == "expressions"


def test_names_of_columns_in_upper_case(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    header = "Filename,Class,Xmin,Ymin,Xmax,Ymax,Split,ID,Id\n"
    (tmp_path / "set.csv").write_text(f"{header}a.png,cat,5,6,25,36,train,1,2\na.png,cat,5,6,25,36,val,1,2\n")
    assert list(detect_format(tmp_path / "set.csv")) == ["train", "val"]
    assert CsvConfig(path=str(tmp_path / "set.csv"), split="val").build().load(0, 0).boxes.tolist() == [BOX]
    assert [*read_table(tmp_path / "set.csv", "Class")] == [("a.png", "cat")] * 2, "vg label"
    (tmp_path / "two.csv").write_text("Image,Caption,caption\na.png,upper,lower\n")
    assert [*read_table(tmp_path / "two.csv", "Caption")] == [("a.png", "upper")]
    assert [*read_table(tmp_path / "two.csv", "caption")] == [("a.png", "lower")]


def test_of_several_columns_the_clear_ones_are_read() -> None:
    columns = Columns.of(["image_path", "image_name", "phrase", "x", "y", "w", "h", *XYXY], "set.csv")
    assert columns == ("image_path", "phrase", tuple(XYXY))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["phrase", *XYXY], "no column for the image file; name it image or file_name or filename"),
        (["image", *XYXY], "no column for the phrase; name it phrase or expression or caption or text"),
        (["image", "phrase", "text", *XYXY], "phrase and text could each be the phrase; rename"),
        (["image", "phrase", "bbox"], "'bbox' does not say what its four numbers are; rename it to bbox_xyxy"),
        (["image", "phrase", *XYXY, *XYWH], "left, top, right, bottom and x, y, width, height could each be the box"),
        (
            ["image", "phrase", "x_min", "y_min", "x_max", "y_max"],
            "no column for the box .* The columns are image, phrase",
        ),
    ],
)
def test_unclear_columns_are_errors(columns: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Columns.of(columns, "set.csv")


def test_all_faulty_rows_are_reported(tmp_path: Path) -> None:
    good = {"image": "a.png", "phrase": "the cat", **XYXY}
    rows = [good, good | {"left": "five"}, good | {"phrase": " "}, good | {"image": ""}, good | {"right": ""}]
    rows += [good | {"right": 500}, good | {"phrase": "", **dict.fromkeys(XYXY, "")}]
    config = write(tmp_path, *rows)
    diagnosis = diagnose({"train": config}, max_tokens=64)
    found = {issue.what: (issue.severity, issue.count) for issue in diagnosis.issues}
    assert found["boxes that are not four finite numbers"] == ("error", 2)
    assert found["rows without a phrase"] == found["rows without an image"] == ("error", 1)
    assert found["boxes that extend beyond their image"] == ("error", 1)
    assert found["rows with an image only"] == ("note", 1)
    with pytest.raises(DataError, match=r"set\.csv: boxes that are not four finite numbers: line 3.*five"):
        config.build()


def test_damaged_tables(tmp_path: Path) -> None:
    file = tmp_path / "set.csv"
    for text, message in (
        ("image,phrase,x1,y1,x2,y2\na.png,the cat, on top,1,2,3,4\n", "line 2: not as many cells.* with commas, and"),
        ("image;phrase;x1;y1;x2;y2\na.png;the cat; on top;1;2;3;4\n", "line 2: not as many cells.* with semicolons"),
        ("image\tphrase\tx1\ty1\tx2\ty2\na.png\tthe cat\n", "line 2: not as many cells.* with tabs"),
        ("image,image\na,b\n", "two columns have the same name"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            CsvConfig(path=str(file)).build()
    (tmp_path / "set.jsonl").write_text("[1]")
    with pytest.raises(DataError, match="line 1: not an object"):
        CsvConfig(path=str(tmp_path / "set.jsonl")).build()
    for name in ("none.csv", "none.jsonl"):
        with pytest.raises(DataError, match=rf"cannot read .*{name}.*; path is a \.csv or \.jsonl file in UTF-8$"):
            CsvConfig(path=str(tmp_path / name)).build()


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_column_of_classes(tmp_path: Path, separator: str) -> None:
    """The usual columns of detection: a sample is an image with all its boxes, the splits share their classes."""
    for name in "ab":
        write_image(tmp_path / f"{name}.png", 40, 60)
    rows = ["filename,width,height,class,xmin,ymin,xmax,ymax,split", "a.png,60,40,cat,5,6,25,36,train"]
    rows += ["a.png,60,40,cat,1,2,9,9,train", "b.png,60,40,dog,5,6,25,36,val"]
    (tmp_path / "set.csv").write_text("\n".join(rows).replace(",", separator))
    datasets = detect_format(tmp_path)
    sample = CsvConfig(**datasets["train"]).build().load(0, 0)
    assert sample.phrases == ("cat", "dog")
    assert sample.boxes.tolist() == [[5, 6, 25, 36], [1, 2, 9, 9]]
    val = CsvConfig(**datasets["val"], vocabulary=VocabularyConfig(phrases={"dog": "hound"})).build()
    assert val.load(0, 0).phrases == ("cat", "hound")
    diagnosis = diagnose({"train": CsvConfig(path=str(tmp_path / "set.csv"))}, 256)
    assert [dataset.task for dataset in diagnosis.datasets] == ["detection"]
    assert diagnosis.count("error") == 0
    (tmp_path / "set.csv").write_text("\n".join(rows).replace(",split", ",name"))
    with pytest.raises(DataError, match="class and name could each be the phrase"):
        CsvConfig(path=str(tmp_path / "set.csv")).build()


def test_files_of_splits_share_their_classes(tmp_path: Path) -> None:
    """A class that val lacks is in its prompts."""
    row = {"image": "a.png", **XYXY}
    write(tmp_path, *(row | {"class": name} for name in ("dog", "cat", "ant")), name="train.csv")
    write(tmp_path, row | {"class": "cat"}, name="val.csv")
    found = detect_format(tmp_path)
    assert [settings["classes"] for settings in found.values()] == [["dog", "cat", "ant"]] * 2
    val = CsvConfig(**found["val"]).build().load(0, 0)
    assert (val.phrases, val.phrase_ids.tolist()) == (("dog", "cat", "ant"), [1])
    with pytest.raises(DataError, match=r"rows of an unknown class: line 2.*add it to classes \(dog, ant\)"):
        CsvConfig(path=found["val"]["path"], classes=["dog", "ant"]).build()
    write(tmp_path, *(row | {"class": name} for name in ("dog", "cat", "ant")), name="val.csv")
    assert not any("classes" in settings for settings in detect_format(tmp_path).values()), "they are equal"
    for name in ("train.csv", "val.csv"):
        write(tmp_path, row | {"phrase": f"a cat of {name}"}, name=name)
    assert not any("classes" in settings for settings in detect_format(tmp_path).values()), "they are free text"


def test_class_zero_of_json_lines(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "label": label, "box_xyxy": BOX} for label in (0, 1)]
    source = write(tmp_path, *rows, name="set.jsonl").build()
    assert source.load(0, 0).phrases == ("0", "1")
    assert len(source.load(0, 0).boxes) == 2
    empty = write(tmp_path, rows[0] | {"label": None}, name="set.jsonl")
    assert [issue.what for issue in diagnose({"train": empty}, 64).issues][:1] == ["rows without a phrase"]


def test_missing_image_names_the_row(tmp_path: Path) -> None:
    config = write(tmp_path, {"image": "a.png", "phrase": "the cat", **XYXY})
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadSampleError, match=r"set\.csv, line 2: image a\.png not found"):
        config.build().load(0, epoch=0)


def test_rows_of_a_split(tmp_path: Path) -> None:
    row = {"phrase": "the cat", **XYXY}
    splits = ["train", "train", "val", "testA"]
    config = write(tmp_path, *({"image": f"{i}.png", **row, "split": split} for i, split in enumerate(splits)))
    assert detect_format(tmp_path) == {
        split: {"name": "csv", "path": config.path, "split": split} for split in ("train", "val", "testA")
    }
    assert [len(CsvConfig(path=config.path, split=split).build()) for split in (None, "train", "val")] == [4, 2, 1]
    with pytest.raises(NoSuchSplitError, match="no split 'test'; its column 'split' has testA, train, val"):
        CsvConfig(path=config.path, split="test").build()
    write(tmp_path, *({"image": "0.png", **row, "split": split} for split in ("train", " train ")))
    (settings,) = detect_format(tmp_path).values()
    assert len(CsvConfig(**settings).build()) == 2
    write(tmp_path, {"image": "0.png", **row, "split": "val"})
    with pytest.raises(DataError, match="has val, but no train: name the part to train on train"):
        detect_format(tmp_path)
    write(tmp_path, *({"image": "0.png", **row, "split": split} for split in ("train", "")))
    with pytest.raises(DataError, match="the column 'split' is empty in some rows"):
        detect_format(tmp_path)


def test_boxes_are_those_of_the_upright_image(tmp_path: Path) -> None:
    """What vg predict and annotation tools show, so that predictions on photos of phones can be trained on."""
    config = write(tmp_path, {"image": "a.png", "phrase": "the cat", **XYXY})
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    write_image(tmp_path / "a.png", 40, 60, exif=exif)
    source = config.build()
    assert source.load(0, epoch=0).image.shape == (60, 40, 3)
    assert source.load(0, epoch=0).image.tolist() == to_array(tmp_path / "a.png").tolist()
    assert source.image_sizes(0).tolist() == [[60, 40]]
    assert source.image_files() == [tmp_path / "a.png"]
    (issue,) = (x for x in diagnose({"train": config}, max_tokens=256).issues if "orientation" in x.what)
    assert (issue.severity, issue.what[:43]) == ("note", "images that are read as viewers show them, ")


def test_unreadable_images_do_not_stop_grouping(tmp_path: Path) -> None:
    config = write(tmp_path, *({"image": name, "phrase": "the cat", **XYXY} for name in ("a.png", "b.png")))
    (tmp_path / "b.png").write_bytes(b"damaged")
    source = config.build()
    assert source.image_sizes(0).tolist() == [[40, 60], [1, 1]]
    with pytest.raises(BadSampleError, match=r"b\.png cannot be read"):
        source.load(1, epoch=0)


def test_predictions_are_a_dataset(tmp_path: Path) -> None:
    """The CSV of vg predict, with words of any script; an image without boxes is not lost, but has no sample."""
    phrases = ("der Hund, links", '"dog"', "🐕", "كلب")
    boxes = np.array([[i, i, 20 + i, 30 + i] for i in range(4)], np.float32)
    image = np.zeros((40, 60, 3), np.uint8)
    found = Result("a.png", image, phrases, boxes, np.full(4, 0.5, np.float32), np.arange(4))
    nothing = Result("b.png", image, phrases, boxes[:0], np.zeros(0, np.float32), np.zeros(0, np.int64))
    for name in ("a", "b"):
        write_image(tmp_path / f"{name}.png", 40, 60)
    write_results([found, nothing], tmp_path / "results.csv", "csv")
    source = CsvConfig(path=str(tmp_path / "results.csv")).build()
    samples = [source.load(index, epoch=0) for index in range(len(source))]
    assert [sample.phrases[0] for sample in samples] == list(phrases)
    assert np.concatenate([sample.boxes for sample in samples]).tolist() == boxes.tolist()
