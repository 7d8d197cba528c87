"""ODVG json lines: numbered classes with a label map, or phrases of captions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.detection.detection_files import write_image
from vg.data.check import detect_format
from vg.data.detection.issues import Issues
from vg.data.detection.odvg import OdvgConfig, OdvgSource
from vg.data.detection.vocabulary import VocabularyConfig
from vg.data.overlap import without_overlap
from vg.data.source import checked
from vg.errors import BadSampleError, DataError

DETECTION = {
    "filename": "a.png",
    "height": 40,
    "width": 60,
    "detection": {
        "instances": [
            {"bbox": [5, 10, 25, 30], "label": 2, "category": "hot dog"},
            {"bbox": [50, 30, 80, 60], "label": 0, "category": "traffic_light"},
            {"bbox": [5, 5, 5.5, 30], "label": 0, "category": "traffic_light"},
        ]
    },
}
CAPTION = "A man with a red hat next to a man"
GROUNDING = {
    "filename": "a.png",
    "grounding": {
        "caption": CAPTION,
        "regions": [
            {"bbox": [5, 10, 25, 30], "phrase": "A man"},
            {"bbox": [[7, 7, 14, 12], [30, 7, 40, 12]], "phrase": None, "tokens_positive": [[13, 16], [17, 20]]},
            {"bbox": [35, 5, 55, 35], "phrase": "a  man", "tokens_positive": [[29, 34]]},
        ],
    },
}


def write(folder: Path, *rows: Any, label_map: Any = None, **settings: Any) -> OdvgSource:
    write_image(folder / "a.png")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "train.jsonl").write_text("\n\n".join(lines) + "\n")
    if label_map is not None:
        (folder / "map.json").write_text(json.dumps(label_map))
        settings["label_map"] = str(folder / "map.json")
    return OdvgConfig(path=str(folder / "train.jsonl"), **settings).build()


def test_phrases_that_contradict_their_spans(tmp_path: Path) -> None:
    source = write(tmp_path, GROUNDING)
    issues = Issues()
    OdvgConfig(path=str(tmp_path / "train.jsonl")).read(issues)
    assert [issue for issue in issues if "tokens_positive" in issue.what] == [], "spaces and case do not matter"
    write(tmp_path, changed(GROUNDING, "regions", 2, phrase="a dog"))
    OdvgConfig(path=str(tmp_path / "train.jsonl")).read(issues)
    (issue,) = [issue for issue in issues if "tokens_positive" in issue.what]
    assert (issue.severity, issue.count) == ("warning", 1)
    assert issue.examples == ["line 1, region 2: phrase 'a dog', tokens_positive 'a man'"]
    assert len(source) == 1


def test_phrases_without_objects(tmp_path: Path) -> None:
    """A region with an empty list of boxes; an instance always has a box."""
    region = {"bbox": [], "phrase": "a dog"}
    source = write(tmp_path, changed(GROUNDING, "regions", 1, **region))
    sample = checked(source.load(0, 0))
    assert sample.phrases == ("A man", "a dog")
    assert sample.phrase_ids.tolist() == [0, 0]
    source = write(tmp_path, changed(DETECTION, "instances", 0, bbox=[]), label_map=MAP)
    with pytest.raises(BadSampleError, match="boxes that are not four finite numbers"):
        source.load(0, 0)


MAP = {"0": "traffic_light", "2": "hot dog", "1": "cat"}


def test_numbered_classes(tmp_path: Path):
    source = write(tmp_path, DETECTION, DETECTION | {"detection": {"instances": []}}, label_map=MAP)
    assert len(source) == 2
    assert (source.provenance.split, source.provenance.task) == ("train", "detection")
    sample, empty = (checked(source.load(index, 0)) for index in range(2))
    assert sample.phrases == ("traffic light", "cat", "hot dog")
    assert sample.boxes.tolist() == [[5, 10, 25, 30], [50, 30, 60, 40]], "clipped, and the thin one left out"
    assert sample.phrase_ids.tolist() == [2, 0]
    assert empty.boxes.shape == (0, 4)
    assert sample.id != empty.id

    sampled = write(tmp_path, DETECTION, label_map=MAP, vocabulary=VocabularyConfig(negatives=1, full=1))
    first = [sampled.load(0, epoch) for epoch in range(10)]
    assert all([s.phrases[id] for id in s.phrase_ids] == ["hot dog", "traffic light"] for s in first)
    assert {len(s.phrases) for s in first} == {2, 3}


def test_files_of_splits_share_their_categories(tmp_path: Path) -> None:
    """A class that val lacks is in its prompts, and the labels of val may be others."""
    names = {"train": ["hot dog", "cat", "traffic_light"], "val": ["traffic_light"], "test": []}
    for split, categories in names.items():
        instances = [{"bbox": [5, 10, 25, 30], "label": i, "category": name} for i, name in enumerate(categories)]
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(DETECTION | {"detection": {"instances": instances}}))
    write_image(tmp_path / "a.png")
    found = detect_format(tmp_path)
    assert {split: settings["classes"] for split, settings in found.items()} == dict.fromkeys(names, names["train"])
    configs = {split: OdvgConfig(**settings) for split, settings in found.items()}
    samples = {split: config.build().load(0, 0) for split, config in configs.items()}
    assert {sample.phrases for sample in samples.values()} == {("hot dog", "cat", "traffic light")}
    assert [sample.phrase_ids.tolist() for sample in samples.values()] == [[0, 1, 2], [2], []]
    issues = Issues()
    assert configs["val"].read(issues).names == names["train"]
    assert [*issues] == []
    with pytest.raises(DataError, match=r"of an unknown class: line 1: 'hot dog'; add it to classes \(cat\)"):
        OdvgConfig(path=configs["train"].path, classes=["cat"]).build()
    with pytest.raises(ValueError, match="classes is for lines without a label_map"):
        OdvgConfig(path=configs["train"].path, classes=["cat"], label_map="map.json")


def test_categories_are_a_label_map(tmp_path: Path) -> None:
    sample = checked(write(tmp_path, DETECTION, DETECTION | {"detection": {"instances": []}}).load(0, 0))
    assert sample.phrases == ("traffic light", "hot dog")
    assert sample.phrase_ids.tolist() == [1, 0]
    other = json.dumps(DETECTION).replace("hot dog", "dog")
    with pytest.raises(DataError, match=r"several categories: line 3: label 2 is 'dog' here, 'hot dog' before"):
        write(tmp_path, DETECTION, other)


def test_phrases_of_a_caption(tmp_path: Path):
    sample = checked(write(tmp_path, GROUNDING).load(0, 0))
    assert sample.phrases == ("A man", "red hat"), "one phrase for both men, and the words at tokens_positive"
    assert sample.phrase_ids.tolist() == [0, 1, 1, 0]
    assert sample.boxes.tolist() == [[5, 10, 25, 30], [7, 7, 14, 12], [30, 7, 40, 12], [35, 5, 55, 35]]


def test_both_types_of_lines_in_one_file_and_image_sizes(tmp_path: Path):
    source = write(tmp_path, GROUNDING, DETECTION, label_map=MAP)
    assert [len(source.load(index, 0).phrases) for index in range(2)] == [2, 3]
    np.testing.assert_array_equal(source.image_sizes(0), [[40, 60], [40, 60]])
    assert source.image_keys() == [str(tmp_path / "a.png")] * 2


def changed(row: dict[str, Any], items: str, index: int, **values: Any) -> dict[str, Any]:
    row = json.loads(json.dumps(row))
    key = "detection" if items == "instances" else "grounding"
    row[key][items][index] |= values
    return row


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{half", r"{half: not JSON \(.*fix or remove"),
        ([1], r"\[1\]: not an object"),
        (DETECTION | {"detection": {"instances": [3]}}, r", instance 0: 3; correct or remove"),
        (
            GROUNDING | {"grounding": {"caption": CAPTION, "regions": [*GROUNDING["grounding"]["regions"], "A man"]}},
            r", region 3: A man; correct or remove",
        ),
        ({"file_name": "a.png"}, r"the keys are \['file_name'\]; `filename` is missing"),
        (
            {"filename": "a.png", "objects": []},
            r"the keys are \['filename', 'objects'\]; `detection` or `grounding` is missing",
        ),
        ({"filename": "a.png", "detection": []}, r"detection is \[\]; it needs a list of instances"),
        (GROUNDING | {"filename": "b.png"}, "image b.png not found below"),
        (GROUNDING | {"grounding": {"caption": CAPTION, "regions": []}}, "remove these lines: they have no phrase"),
        (GROUNDING | {"height": 60, "width": 40}, "60 wide and 40 high, its annotation has 40 and 60"),
        (changed(DETECTION, "instances", 1, label=3), "instance 1: label 3, .*; label_map has 0 to 2"),
        (changed(DETECTION, "instances", 1, label=None), "instance 1: label None"),
        (changed(DETECTION, "instances", 1, label=[2]), r"instance 1: label \[2\]"),
        (
            changed(DETECTION, "instances", 1, label=1),
            "instance 1: label 1 is 'traffic_light' here, 'cat' in the label map; .* ids of COCO from 1",
        ),
        (
            changed(DETECTION, "instances", 0, bbox=[1, 2, 3]),
            r"instance 0: bbox \[1, 2, 3\]; write left, top, right, bottom in pixels",
        ),
        (changed(DETECTION, "instances", 0, bbox=None), "instance 0: bbox None"),
        (changed(DETECTION, "instances", 0, bbox=[30, 20, 10, 15]), "is inverted .*; was x, y, width, height"),
        (changed(GROUNDING, "regions", 0, bbox=[[1, 2, 3, 4], [1, 2]]), r"region 0: bbox \[\[1, 2, 3, 4\], \[1, 2\]\]"),
        (changed(GROUNDING, "regions", 1, tokens_positive=None), "region 1: phrase None and no tokens_positive"),
        (changed(GROUNDING, "regions", 1, tokens_positive=[13, 16]), r"tokens_positive \[13, 16\], .*\[begin, end\]"),
        (changed(GROUNDING, "regions", 0, phrase=" "), "region 0: phrase ' '"),
        *(
            (
                changed(GROUNDING, "regions", index, tokens_positive=spans),
                rf"region {index}: tokens_positive {re.escape(str(spans))}, the caption has 34 characters; .*correct",
            )
            for spans in ([[13, 16], [29, 35]], [[-3, 2]], [[16, 13]], [[3, 3]], [[1.0, 3]], [[True, 3]], [5], "5", 5)
            for index in (1, 2)  # also where the region has a phrase
        ),
        (changed(GROUNDING, "regions", 1, tokens_positive=[[1, 2]]), "region 1: phrase None and no tokens_positive"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, row: Any, message: str):
    source = write(tmp_path, GROUNDING, row, label_map=MAP)
    with pytest.raises(BadSampleError, match=rf"train\.jsonl.* line 3.*{message}"):
        source.load(1, 0)


def test_invalid_lines_have_keys_and_sizes_of_their_own(tmp_path: Path) -> None:
    """So that bad_samples=skip can skip them; they are no image that training and evaluation share."""
    rows = [GROUNDING, "{", {"grounding": {}}, GROUNDING | {"height": "x", "width": 60}]
    source = write(tmp_path, *rows)
    keys = source.image_keys()
    assert keys[0] == keys[3] == str(tmp_path / "a.png")
    assert keys[1:3] == [f"{tmp_path}/train.jsonl, line {line}" for line in (3, 5)]
    assert source.image_sizes(0).tolist() == [[40, 60], [1, 1], [1, 1], [40, 60]]
    evaluation = write(tmp_path / "val", GROUNDING, "{", image_root=str(tmp_path))
    with pytest.warns(UserWarning, match="2 of 4 training samples"):
        assert len(without_overlap(source, [evaluation], drop=True)) == 2


def test_errors_of_the_first_line_and_of_paths(tmp_path: Path):
    with pytest.raises(DataError, match=r"train.jsonl: .*line 1; set label_map to a json file"):
        write(tmp_path, json.dumps(DETECTION).replace("category", "name"))
    with pytest.raises(DataError, match=r"train.jsonl: .*line 1: the keys are \['images'\]"):
        write(tmp_path, {"images": []})
    with pytest.raises(DataError, match=r"map\.json: .*; expected a json file such as {\"0\": \"person\""):
        write(tmp_path, DETECTION, label_map=["cat"])
    with pytest.raises(DataError, match=r"label_map cannot be read: .*nowhere\.json"):
        OdvgConfig(path=str(tmp_path / "train.jsonl"), label_map=str(tmp_path / "nowhere.json")).build()
    with pytest.raises(DataError, match="image_root nowhere is not a folder"):
        write(tmp_path, GROUNDING, image_root="nowhere")
    with pytest.raises(DataError, match=r"cannot read .*x\.jsonl: No such file.*in ODVG format"):
        OdvgConfig(path=str(tmp_path / "x.jsonl")).build()
