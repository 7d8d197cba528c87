"""Errors in RefCOCO data name the file, row or key and say how to fix it."""

import io
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from vg.data.refcoco.pickles import load_plain
from vg.data.refcoco.rows import detect_format, referent_of
from vg.data.refcoco.source import Refcoco, RefcocoConfig
from vg.errors import BadSampleError, DataError

datasets = pytest.importorskip("datasets")

NAME = "COCO_train2014_000000000716.jpg"
LINE = {"file_name": NAME, "image_id": 716, "ann_id": 5, "bbox": [10.0, 20.0, 30.0, 15.0], "sent": "red man"}
JXU124 = {"ann_id": 5, "image_path": NAME, "captions": ["red man"], "bbox": [10.0, 20.0, 40.0, 35.0]}
NAN = float("nan")


def jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(noise).save(file := io.BytesIO(), "JPEG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A dataset folder with the image."""
    (tmp_path / NAME).write_bytes(jpeg())
    return tmp_path


def write_lines(file: Path, *rows: object) -> Path:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def build(path: Path | str, split: str = "val", **options) -> Refcoco:
    return RefcocoConfig(path=str(path), split=split, **options).build()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sent": ""}, "empty phrase"),
        ({"sent": "  "}, "empty phrase"),
        ({"sent": None}, "empty phrase"),
        ({"sent": []}, "empty phrase"),
        ({"ann_id": None}, "ann_id is missing"),
        ({"bbox": None}, "four numbers"),
        ({"bbox": [1, 2, 3]}, "four numbers"),
        ({"bbox": "1234x"}, "four numbers"),
        ({"bbox": [10, 20, NAN, 15]}, "not finite"),
        ({"bbox": [10, 20, 0, 15]}, "no area"),
        ({"bbox": [70, 20, 12, 15]}, "lies outside"),
        ({"bbox": [10, 20, 78, 55]}, "was xyxy read as xywh"),
        ({"raw_anns": json.dumps({"bbox": [10, 20, 33, 15]})}, "contradicts raw_anns"),
        ({"raw_anns": "{"}, "raw_anns is not a JSON object"),
        ({"raw_anns": "[]"}, "raw_anns is not a JSON object"),
        ({"kinds": ["a", "b"]}, r"5: kinds is \['a', 'b'\], expected a list with one per expression \(1\)"),
        ({"kinds": True}, "5: kinds is True, expected a list"),
        ({"file_name": "b.jpg"}, r"image b.jpg not found below .*train2014/b.jpg.*image_root"),
        ({"file_name": None}, "no image"),
        ({"image": b"GIF89a"}, "cannot be read"),
        ({"image": jpeg()[:-900]}, f"image {NAME} cannot be read .*truncated"),
    ],
)
def test_a_bad_row_fails_only_its_own_sample(changes, message, folder, monkeypatch):
    rows = [LINE, LINE | changes]
    file = folder / "mini_val.jsonl"
    monkeypatch.setattr("vg.data.refcoco.tables._read_json", lambda _: rows)  # JSON cannot contain bytes
    file.touch()
    source = build(file)
    assert len(source) == 2
    assert source.load(0, epoch=0).phrases == ("red man",)
    with pytest.raises(BadSampleError, match=rf"(?s){re.escape(str(file))} \(val\), row 2 \(.*\): .*{message}"):
        source.load(1, epoch=0)


@pytest.mark.parametrize("bbox", [[10.0, 20.0, 30.0, 15.0], [10.0, 20.0, 41.5, 35.0]])
def test_xyxy_boxes_are_checked_against_the_coco_box(bbox):
    row, schema = JXU124 | {"raw_anns": json.dumps({"bbox": [10.0, 20.0, 30.0, 15.0]})}, detect_format(JXU124, "")
    assert referent_of(row, schema).boxes.tolist() == [[10, 20, 40, 35]]
    with pytest.raises(BadSampleError, match=r"5: bbox .* read as xyxy, contradicts raw_anns"):
        referent_of(row | {"bbox": bbox}, schema)


def test_an_empty_expression_fails_only_its_own_sample(folder):
    file = write_lines(folder / "val.jsonl", JXU124 | {"captions": ["a", "", "c"]}, JXU124 | {"captions": []})
    source = build(file)
    assert [source.load(index, epoch=0).phrases for index in (0, 2)] == [("a",), ("c",)]
    for index in (1, 3):
        with pytest.raises(BadSampleError, match="empty phrase"):
            source.load(index, epoch=0)


@pytest.mark.parametrize("changes", [{}, {"boxes": None}, {"boxes": 3}])
def test_a_row_of_grefcoco_without_boxes(changes, folder):
    row = {name: value for name, value in LINE.items() if name != "bbox"}
    source = build(write_lines(folder / "val.jsonl", row | {"boxes": []}, row | changes))
    assert source.load(0, epoch=0).boxes.shape == (0, 4)
    with pytest.raises(BadSampleError, match=r"row 2 \(.*\): 5: boxes is (None|3), expected a list of boxes"):
        source.load(1, epoch=0)


def test_error_of_a_truncated_image_names_the_file(folder):
    (folder / NAME).write_bytes(jpeg()[:-900])
    with pytest.raises(BadSampleError, match=f"{NAME} cannot be read .*truncated"):
        build(write_lines(folder / "val.jsonl", LINE)).load(0, epoch=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mini_val.jsonl", "", "mini: the split val is empty"),
        ("mini_val.jsonl", json.dumps(LINE) + "\n{", "mini_val.jsonl, line 2: not JSON"),
        ("mini_val.jsonl", "[1]", "expected objects"),
        ("mini_val.json", "{", "mini_val.json, line 1: not JSON"),
        ("mini_val.jsonl", '{"a": 1, "bbox": 2}', r"\['a', 'bbox'\] are not a known RefCOCO schema"),
        ("mini_train.jsonl", json.dumps(LINE), "no split 'val'; it has train"),
        ("refs.jsonl", json.dumps(LINE | {"split": "testA"}), "no split 'val'; it has testA"),
        ("refs.txt", "", "unknown file type"),
        ("val.parquet", "PAR1", "val.parquet .*cannot be read"),
        ("refs(unc).p", "garbage", r"refs\(unc\).p cannot be read"),
    ],
)
def test_unreadable_files_raise(name, content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        build(tmp_path / name)


def test_invalid_paths_and_settings_raise(folder, monkeypatch):
    file = write_lines(folder / "val.jsonl", LINE)
    with pytest.raises(DataError, match=r"nothing.jsonl does not exist; path is a Hub id"):
        build(folder / "nothing.jsonl")
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="contains no RefCOCO data"):
        build(folder / "empty")
    with pytest.raises(DataError, match=r"image_root .*away is not a folder"):
        build(file, image_root=str(folder / "away"))
    with pytest.raises(DataError, match="remove revision"):
        build(file, revision="main")
    with pytest.raises(DataError, match="remove partition"):
        build(file, partition="unc")
    with pytest.raises(ValidationError, match="spilt"):
        TypeAdapter(RefcocoConfig).validate_python({"name": "refcoco", "spilt": "val"})


def test_files_of_several_datasets_are_not_merged(folder):
    write_lines(folder / "refcoco_val.jsonl", LINE)
    write_lines(folder / "refcocog_val.jsonl", LINE)
    with pytest.raises(DataError, match=r"refcoco_val.jsonl and .*refcocog_val.jsonl are not numbered shards"):
        build(folder)
    write_lines(folder / "other.jsonl", LINE)
    with pytest.raises(DataError, match=r"other.jsonl: no split in its name"):
        build(folder)


def test_loading_from_the_hub(monkeypatch):
    table = datasets.Dataset.from_list([JXU124])

    def load_dataset(path, revision):
        if path != "someone/refs":
            raise ConnectionError("no route to host")
        return datasets.DatasetDict(validation=table)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"(?s)someone/else \(path\) .*no route to host.*hf download someone/else"):
        build("someone/else")
    with pytest.raises(DataError, match="someone/refs has no pixels; set image_root"):
        build("someone/refs")
    source = build("someone/refs", image_root=".", revision="abc")
    assert (source.provenance.data, source.provenance.split) == ("someone/refs@abc", "val")


def write_refs(folder: Path, partition: str, ann_id: int = 5) -> None:
    ref = {"ref_id": 1, "ann_id": ann_id, "image_id": 716, "split": "val", "sentences": [{"sent": "red man"}]}
    (folder / f"refs({partition}).p").write_bytes(pickle.dumps([ref], protocol=2))


def write_instances(folder: Path) -> None:
    content = {"annotations": [{"id": 5, "bbox": LINE["bbox"]}], "images": [{"id": 716, "file_name": NAME}]}
    (folder / "instances.json").write_text(json.dumps(content))


def test_errors_of_the_refer_toolbox_format(folder):
    write_refs(folder, "unc")
    with pytest.raises(DataError, match=r"instances.json is missing.*put it beside refs\(unc\).p"):
        build(folder)
    (folder / "instances.json").write_text("{}")
    with pytest.raises(DataError, match=r"instances.json is not a COCO annotation file"):
        build(folder)
    write_instances(folder)
    assert build(folder).load(0, epoch=0).id == f"{folder.name}-unc/val/5/0"
    write_refs(folder, "google", ann_id=99)
    with pytest.raises(DataError, match="has the partitions google, unc; set partition"):
        build(folder)
    with pytest.raises(DataError, match="has the partitions google, unc; set partition"):
        build(folder, partition="umd")
    assert len(build(folder, partition="unc")) == 1
    with pytest.raises(BadSampleError, match=r"99: bbox is (None), expected.*use the instances.json"):
        build(folder, partition="google").load(0, epoch=0)
    with pytest.raises(DataError, match="no split 'testA'; it has val"):
        build(folder, "testA", partition="unc")
    (folder / "refs(unc).p").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(DataError, match="not a list of refs"):
        build(folder, partition="unc")


class Malicious:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_is_rejected_without_running_it(protocol, tmp_path):
    file, trace = tmp_path / "refs(unc).p", tmp_path / "trace"
    file.write_bytes(pickle.dumps([{"ref_id": Malicious(trace)}], protocol=protocol))
    with pytest.raises(DataError, match=r"refs\(unc\).p cannot be read \(it imports \w+.system"):
        load_plain(file)
    assert not trace.exists()


def test_a_python_2_pickle_is_read(tmp_path):
    file = tmp_path / "refs(unc).p"
    file.write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xe9'\np3\nsS'ref_id'\nI7\nsS'box'\n(F1.5\nL2L\ntsa.")
    assert load_plain(file) == [{"sent": "café", "ref_id": 7, "box": (1.5, 2)}]
    file.write_bytes(b"(lp0\n(dp1\nS'sent'")
    with pytest.raises(DataError, match="cannot be read"):
        load_plain(file)
