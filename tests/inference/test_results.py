"""Results: selections, conversions, and files of all formats that come back with the same phrases and boxes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.mask import decode

import vg
from vg.data.detection.coco import CocoConfig
from vg.data.detection.issues import RaiseFirstError
from vg.data.detection.odvg import OdvgConfig
from vg.errors import ConfigError, DataError
from vg.inference.formats import FORMATS, read_records, write_results
from vg.inference.result import Result

# One in another, case, accents, an emoji, right to left, quotes and commas.
PHRASES = ("hot dog", "dog", "car", "carrot", "Red CUP", "café", "🐶 face", "כלב קטן", 'the "big", one', "a\tb")


def result(name: str = "a.png", masks: bool = False) -> Result:
    count = len(PHRASES)
    left = np.arange(count, dtype=np.float32) * 7.25
    boxes = np.stack((left, left / 2, left + 20.5, left / 2 + 10), axis=1)
    return Result(
        name,
        np.arange(80 * 120 * 3, dtype=np.uint32).astype(np.uint8).reshape(80, 120, 3),
        PHRASES,
        boxes,
        np.linspace(0.9, 0.1, count, dtype=np.float32),
        np.arange(count)[::-1].copy(),
        np.stack([np.arange(80 * 120).reshape(80, 120) % (k + 2) == 0 for k in range(count)]) if masks else None,
    )


def empty(name: str) -> Result:
    return result(name).select(np.zeros(0, np.int64))


def test_a_result_is_a_sequence_of_boxes() -> None:
    found = result()
    assert len(found) == len(list(found)) == 10
    phrase, score, box = found[0]
    assert (phrase, box) == ("a\tb", (0.0, 0.0, 20.5, 10.0))
    assert score == pytest.approx(0.9)
    assert found.labels == list(PHRASES[::-1])
    assert str(found).splitlines()[0] == "a.png, 120 x 80: 10 boxes"
    assert "  כלב קטן: left 14.5, top 7.2, right 35.0, bottom 17.2, score 0.72" in str(found)
    assert str(empty("b.png")) == "b.png, 120 x 80: 0 boxes"
    assert found[np.int64(0)] == found[0]
    assert len(found[found.scores > 0.5]) == (found.scores > 0.5).sum()
    assert found[[2, -1]].labels == [found.labels[2], found.labels[-1]]
    assert len(found[[]]) == 0


def test_selections() -> None:
    found = result(masks=True)
    assert found[:3].labels == found.labels[:3]
    assert found[:3].masks.shape == (3, 80, 120)
    assert len(found.above(torch.tensor(0.5))) == len(found.above(0.5))
    for wrong in (5, float("nan"), "0.5"):
        for select in (found.above, found.nms):
            with pytest.raises(ConfigError, match="expected a score or IoU from 0 to 1"):
                select(wrong)
    with pytest.raises(ConfigError, match="side 0: expected at least 1"):
        found.draw(side=0)
    assert found.above(0.5).scores.min() >= 0.5
    assert found.best().labels == list(PHRASES)
    assert found.best().masks.shape == (10, 80, 120)
    twins = Result("a", found.image, ("x", "y"), found.boxes[[0, 0, 0]], found.scores[:3], np.array([0, 0, 1]))
    assert twins.nms(0.5).labels == ["x", "y"]
    assert twins.nms(0.5, exclusive=True).labels == ["x"]


def test_crops_have_at_least_one_pixel() -> None:
    boxes = np.array([[2.4, 3.6, 10.2, 9.7], [119.9, 79.9, 120, 80], [5, 5, 5, 5]], np.float32)
    crops = Result("a", result().image, ("x",), boxes, np.ones(3), np.zeros(3, np.int64)).crop()
    assert [crop.shape for crop in crops] == [(7, 8, 3), (1, 1, 3), (1, 1, 3)]
    np.testing.assert_array_equal(crops[0], result().image[3:10, 2:10])


def test_drawing_keeps_the_size() -> None:
    assert result(masks=True).draw().shape == (80, 120, 3)
    np.testing.assert_array_equal(empty("a").draw(), result().image)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    results = [result("a.png"), empty("b.png"), result("c d.png")]
    for found in results:
        Image.fromarray(found.image).save(tmp_path / found.name)
    paths = {format: tmp_path / f"results.{format}" for format in FORMATS}
    for format, path in paths.items():
        write_results(results, path, format)
    return paths


def expected() -> list[tuple[str, list[float]]]:
    return sorted((entry["phrase"], entry["box"]) for entry in result().to_dict()["boxes"])


def test_json_lines_come_back(files: dict[str, Path]) -> None:
    records = list(read_records(files["jsonl"]))
    assert [record["image"] for record in records] == ["a.png", "b.png", "c d.png"]
    assert records[0] == result("a.png").to_dict()
    assert records[1]["boxes"] == []
    assert records[1]["phrases"] == list(PHRASES)


def test_coco_comes_back(files: dict[str, Path]) -> None:
    source = CocoConfig(path=str(files["coco"])).build()
    assert len(source) == 3
    assert set(source.vocabulary.names) == set(PHRASES)
    document = json.loads(files["coco"].read_text())
    names = {entry["id"]: entry["name"] for entry in document["categories"]}
    found = [
        (names[x["category_id"]], [*x["bbox"][:2], x["bbox"][0] + x["bbox"][2], x["bbox"][1] + x["bbox"][3]])
        for x in document["annotations"]
        if x["image_id"] == 3
    ]
    for (phrase, box), (true_phrase, true_box) in zip(sorted(found), expected(), strict=True):
        assert phrase == true_phrase
        assert box == pytest.approx(true_box, abs=0.011)
    assert all("score" in entry for entry in document["annotations"])


@pytest.mark.parametrize("captions", ["phrases", "whole"])
def test_odvg_comes_back(captions: Literal["phrases", "whole"], tmp_path: Path) -> None:
    """All images with all phrases, also those without boxes, which are negatives."""
    results = [result("a.png"), empty("b.png"), result("c d.png"), result("e.png")[:4]]
    for found in results:
        Image.fromarray(found.image).save(tmp_path / found.name)
    write_results(results, tmp_path / "results.jsonl", "odvg")
    config = OdvgConfig(path=str(tmp_path / "results.jsonl"), captions=captions)
    assert len(config.read(RaiseFirstError(config.path)).files) == len(results)
    source = config.build()
    assert len(source) == len(results)
    for index, written in enumerate(results):
        sample = source.load(index, 0)
        assert sample.phrases == tuple(" ".join(phrase.split()) for phrase in PHRASES)
        np.testing.assert_array_equal(sample.image, written.image)
        found = zip(sample.phrase_ids.tolist(), sample.boxes.tolist(), strict=True)
        entries = [(entry["phrase_id"], entry["box"]) for entry in written.to_dict()["boxes"]]
        for (phrase_id, box), (true_id, true_box) in zip(sorted(found), sorted(entries), strict=True):
            assert phrase_id == true_id
            assert box == pytest.approx(true_box, abs=1e-4)


def test_csv_comes_back(files: dict[str, Path]) -> None:
    with files["csv"].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["phrase"] for row in rows if row["image"] == "b.png"] == [""]
    found = [
        (row["phrase"], [float(row[side]) for side in ("left", "top", "right", "bottom")])
        for row in rows
        if row["image"] == "c d.png"
    ]
    assert sorted(found) == expected()


def test_label_studio(files: dict[str, Path]) -> None:
    task, nothing, _ = json.loads(files["label-studio"].read_text())
    assert nothing["predictions"][0]["result"] == []
    found = []
    for region in task["predictions"][0]["result"]:
        value = region["value"]
        x, y, w, h = (value[key] / 100 for key in ("x", "y", "width", "height"))
        (phrase,) = value["rectanglelabels"]
        found.append((phrase, [120 * x, 80 * y, 120 * (x + w), 80 * (y + h)]))
    for (phrase, box), (true_phrase, true_box) in zip(sorted(found), expected(), strict=True):
        assert phrase == true_phrase
        assert box == pytest.approx(true_box, abs=0.02)


def test_masks_come_back(tmp_path: Path) -> None:
    found = result(masks=True)
    write_results(found, tmp_path / "masks.json", "coco")
    annotations = json.loads((tmp_path / "masks.json").read_text())["annotations"]
    assert [row["area"] for row in annotations] == found.masks.sum(axis=(1, 2)).tolist()  # type: ignore[union-attr]
    for entry, mask in zip(found.to_dict()["boxes"], found.masks, strict=True):
        np.testing.assert_array_equal(decode(entry["mask"]).astype(bool), mask)
    assert found.to_coco(7)[0].keys() == {"image_id", "category_id", "bbox", "score", "segmentation"}


def test_supervision() -> None:
    pytest.importorskip("supervision", reason="supervision is not installed")
    detections = result(masks=True).to_supervision()
    assert list(detections.data["class_name"]) == list(PHRASES[::-1])
    assert detections.xyxy.shape == (10, 4)


def test_without_supervision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        result().to_supervision()


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown format 'xml'; use jsonl, coco, csv, odvg, label-studio"):
        vg.write_results([], tmp_path / "x", "xml")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"a record without height, width, phrases: expected those of Result\.to_dict"):
        vg.write_results([{"image": "a", "boxes": []}], tmp_path / "x", "coco")
    (tmp_path / "x.jsonl").write_text('{"image": "a", "boxes": []}\n[1]\n')
    with pytest.raises(DataError, match=r"x\.jsonl, line 2: not a result of vg predict"):
        list(read_records(tmp_path / "x.jsonl"))


@pytest.mark.parametrize("format", FORMATS)
def test_a_single_result_is_written_like_a_list(format: str, tmp_path: Path) -> None:
    write_results([result()], tmp_path / "list", format)
    for number, single in enumerate((result(), result().to_dict())):
        write_results(single, tmp_path / str(number), format)
        assert (tmp_path / str(number)).read_bytes() == (tmp_path / "list").read_bytes()
    for wrong, name in ((None, "NoneType"), ("runs/demo", "str"), ([[result()]], "list"), (result()[0], "str")):
        with pytest.raises(DataError, match=f"expected results of a Grounder, .* got one of type {name}"):
            write_results(wrong, tmp_path / "wrong", format)
    assert not (tmp_path / "wrong").exists()
