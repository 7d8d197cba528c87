"""Locations of the benchmark data, slices of expressions, and confidence intervals."""

from __future__ import annotations

import io
import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vg.data.refcoco.source import Annotation
from vg.data.source import Provenance
from vg.errors import DataError, NoSuchSplitError
from vg.evaluation.benchmark import table
from vg.evaluation.benchmark.run import intervals
from vg.evaluation.benchmark.slices import has_attribute, has_location, has_relation, names_person, slices
from vg.evaluation.benchmark.suite import DATASETS, open_source, open_splits
from vg.evaluation.results import DatasetResult, EvaluationResult
from vg.evaluation.table import table as evaluation_table

datasets = pytest.importorskip("datasets")

REAL = Path(__file__).parents[3] / ".." / "shared" / "data"
NAME = "COCO_train2014_000000000716.jpg"
LINE = {"file_name": NAME, "ann_id": 5, "bbox": [10.0, 20.0, 30.0, 15.0], "sent": "red man"}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the one image, 80 x 60 pixels, in train2014; counts are not checked."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("vg.data.refcoco.source.check_counts", lambda *_: ("unc", True))
    folder = tmp_path / "data"
    (folder / "train2014").mkdir(parents=True)
    (folder / "train2014" / NAME).write_bytes(jpeg())
    return folder


def jpeg() -> bytes:
    Image.new("RGB", (80, 60)).save(file := io.BytesIO(), "JPEG")
    return file.getvalue()


def write_data(form: str, data: Path) -> None:
    if form == "toolbox":
        (data / "refcoco").mkdir()
        sentences = [{"sent": "red man"}]
        ref = {"ref_id": 1, "ann_id": 5, "image_id": 716, "category_id": 1, "split": "val", "sentences": sentences}
        for partition in ("unc", "google"):
            (data / "refcoco" / f"refs({partition}).p").write_bytes(pickle.dumps([ref]))
        instances = {"annotations": [{"id": 5, "bbox": LINE["bbox"]}], "images": [{"id": 716, "file_name": NAME}]}
        (data / "refcoco" / "instances.json").write_text(json.dumps(instances))
    elif form == "folder":
        (data / "refcoco").mkdir()
        (data / "refcoco" / "validation.jsonl").write_text(json.dumps(LINE))
    elif form == "files":
        (data / "refcoco_unc_val.jsonl").write_text(json.dumps(LINE))
        (data / "refcoco_plus_unc_val.jsonl").write_text(json.dumps(LINE | {"sent": "another"}))
    elif form == "column":
        rows = [LINE | {"dataset": "refcoco_unc", "split": "val"}, LINE | {"dataset": "other", "split": "val"}]
        (data / "refs.json").write_text(json.dumps(rows))
    elif form == "download":
        (data / "data").mkdir()
        about = {"ann_id": 5, "category_id": 1, "sentences": [{"sent": "red man"}]}
        objects = [{"ann_info": {"bbox": LINE["bbox"]}, "ref_info": about}]
        row = {"ref_list": objects, "image_info": {"file_name": NAME}, "image": {"bytes": jpeg(), "path": None}}
        for name in ("refcoco_unc_val", "refcoco_plus_unc_val", "refcocog_umd_val"):
            datasets.Dataset.from_list([row]).to_parquet(data / "data" / f"{name}-00000-of-00001.parquet")


@pytest.mark.parametrize("form", ["toolbox", "folder", "files", "column", "download"])
def test_data_in_every_supported_format(form: str, data: Path) -> None:
    write_data(form, data)
    (split,) = open_splits(data, datasets=["refcoco"], splits=["val"])
    assert split.title == "RefCOCO val"
    assert [annotation.expression for annotation in split.annotations] == ["red man"]
    assert split.source.load(0, epoch=0).boxes.tolist() == [[10, 20, 40, 35]]
    assert split.annotations[0].id == split.source.load(0, epoch=0).id


def test_reviewed_annotations_of_one_split(data: Path) -> None:
    document = {
        "images": [{"id": id, "file_name": NAME, "caption": sent} for id, sent in enumerate(["red man", "wrong"])],
        "annotations": [
            {"id": id, "image_id": id, "bbox": LINE["bbox"], "caption_quality": quality}
            for id, quality in enumerate([1, 0])
        ],
    }
    (data / "refcocos_annotation_reviewed").mkdir()
    (data / "refcocos_annotation_reviewed" / "refcoco+_testA_reviewed.json").write_text(json.dumps(document))
    (split,) = open_splits(data, datasets=["refcoco+-reviewed"], splits=["testA"])
    assert [annotation.expression for annotation in split.annotations] == ["red man"]
    assert split.source.provenance.data == "refcoco+_reviewed"


def test_missing_data_is_reported(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_data("files", data)
    with caplog.at_level(logging.WARNING):
        splits = open_splits(data)
    assert [split.id for split in splits] == ["refcoco val", "refcoco+ val"]
    assert "left out: refcocog test is not in" in caplog.text
    with pytest.raises(DataError, match=r"(?s)not all .*refcoco testA is not in .*refcoco testB .*hf download"):
        open_splits(data, datasets=["refcoco"])
    with pytest.raises(NoSuchSplitError, match="gref"):
        open_source("grefcoco", "val", None, None)
    (data / "train2014" / NAME).unlink()
    with pytest.raises(DataError, match=f"{NAME} not found .*image_root"):
        open_splits(data)[0].source.load(0, epoch=0)


def test_a_damaged_file_is_not_reported_as_missing(data: Path) -> None:
    (data / "data").mkdir()
    (data / "data" / "refcoco_unc_val-00000-of-00001.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"refcoco_unc_val-00000-of-00001.parquet .*cannot be read"):
        open_splits(data, splits=["val"])


@pytest.mark.skipif(not (REAL / "refcoco_annotations").is_dir(), reason="no shared/data beside the repository")
def test_published_annotations_are_the_official_splits() -> None:
    folder = REAL / "refcoco_annotations"
    sources = {key: open_source(key, "val", folder, None) for key in ("refcoco", "refcoco+", "refcocog")}
    assert {key: len(source) for key, source in sources.items()} == {
        "refcoco": 10834,
        "refcoco+": 10758,
        "refcocog": 4896,
    }
    assert all(source.provenance.official for source in sources.values())
    assert [source.provenance.partition for source in sources.values()] == ["unc", "unc", "umd"]
    masks = slices(sources["refcoco+"].annotations())
    shares = {name: float(masks[name]["yes"].mean()) for name in ("location words", "relations", "person")}
    assert shares["location words"] < 0.15, "RefCOCO+ forbids them"
    assert slices(sources["refcoco"].annotations())["location words"]["yes"].mean() > 0.5
    assert slices(sources["refcocog"].annotations())["relations"]["yes"].mean() > 0.1


def annotation(expression: str, box: tuple[float, ...] = (0, 0, 10, 10), **known: object) -> Annotation:
    boxes = np.array(box, np.float32).reshape(-1, 4)
    return Annotation("id", expression, boxes, "image", known.get("person"), known.get("others"))  # type: ignore[arg-type]


def test_words_of_expressions() -> None:
    assert has_location("man on the LEFT")
    assert not has_location("leftover pizza")
    assert has_attribute("the red-haired one")
    assert not has_attribute("man")
    assert has_relation("left of the dog")
    assert not has_relation("the one on the left")
    assert not has_relation("man standing behind"), "behind what?"
    assert names_person("a woman's hat")
    assert not names_person("manhole")


def test_slices() -> None:
    annotations = [
        annotation("red man", (0, 0, 127, 128), person=True, others=0),
        annotation("the dog next to him over there", (0, 0, 128, 128), person=False, others=7),
        annotation("one two three four five", (0, 0, 256, 256)),
        annotation("a b c d e f g h i j", ()),
    ]
    found = {
        attribute: {label: np.flatnonzero(mask).tolist() for label, mask in masks.items()}
        for attribute, masks in slices(annotations).items()
    }
    assert found["words"] == {"1-2": [0], "3-5": [2], "6-9": [1], "10+": [3]}
    assert found["box"] == {"small": [0], "medium": [1], "large": [2]}
    assert found["others of its class"] == {"0": [0], "3+": [1]}
    assert found["person"] == {"yes": [0], "no": [1, 2, 3]}, "the annotated class takes precedence over the word him"
    assert found["relations"] == {"yes": [1], "no": [0, 2, 3]}


def test_intervals_resample_whole_images() -> None:
    random = np.random.default_rng(0)
    per_image = (random.random(400) < 0.7).astype(float)  # equal for all 5 expressions of an image
    values = np.repeat(per_image, 5)
    low, high = intervals({"a": values}, np.repeat(np.arange(400).astype(str), 5).tolist())["a"]
    width = 2 * 1.96 * values.std() / np.sqrt(400)
    assert low < values.mean() < high
    assert high - low == pytest.approx(width, rel=0.15)
    alone = intervals({"a": values}, [str(image) for image in range(len(values))])["a"]
    assert alone[1] - alone[0] == pytest.approx(width / np.sqrt(5), rel=0.15)
    partly = np.where(np.arange(len(values)) % 2, values, np.nan)
    assert intervals({"a": partly}, np.repeat(np.arange(400).astype(str), 5).tolist())["a"] != (low, high)
    assert intervals({"a": np.full(4, np.nan), "b": np.ones(4)}, ["x", "x", "x", "x"]) == {}


def test_table_title_names_the_evaluated_data() -> None:
    titles = []
    for partition, official in ((None, None), ("unc", True), ("unc", False)):
        provenance = Provenance("refcoco-unc", "val", partition=partition, official=official)
        dataset = DatasetResult("", provenance, "top box", {"miou": 0.5, "num_expressions": 3}, {})
        titles.append(evaluation_table(EvaluationResult((dataset,), "miou")).splitlines()[0])
    assert titles == [
        "refcoco-unc, val split (top box)",
        "refcoco-unc, unc val split (top box)",
        "refcoco-unc, unc val split, not the complete official one (top box)",
    ]


def test_published_results_have_known_splits_and_a_source() -> None:
    assert len(table.published()["methods"]) >= 10
    for method in table.published()["methods"]:
        assert method["source"]
        known = {"vision", "text", "resolution", "trained", "total", "data", "extra", "epochs"}
        assert method.get("about", {}).keys() <= known, method["name"]
        for key in method.keys() - {"name", "source", "note", "about"}:
            assert method[key].keys() <= set(DATASETS[key].splits), method["name"]
            assert all(10 < value < 100 for value in method[key].values()), method["name"]
    assert table.published()["pooled"]["refcoco"] == {"miou": 0.6196, "map@50": 0.5746, "map@75": 0.2173}
