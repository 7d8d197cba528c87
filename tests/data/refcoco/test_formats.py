"""Small versions of RefCOCO-M, refcoco-benchmark, Ref-L4, reviewed RefCOCO and gRefCOCO; official names and counts."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as masks

from vg.data.refcoco.official import Counts, check_counts, identify
from vg.data.refcoco.source import Refcoco, RefcocoConfig
from vg.errors import BadSampleError, DataError, NoSuchSplitError
from vg.evaluation.evaluator import new_metric

datasets = pytest.importorskip("datasets")

REAL = Path(__file__).parents[3] / ".." / "shared" / "data"
NAME = "COCO_train2014_000000000716.jpg"
XYWH, XYXY = [10.0, 20.0, 30.0, 15.0], [10.0, 20.0, 40.0, 35.0]
OTHER_XYWH, OTHER_XYXY = [50.0, 5.0, 20.0, 40.0], [50.0, 5.0, 70.0, 45.0]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """An image root with one image, 80 wide and 60 high."""
    root = tmp_path / "images"
    (root / "train2014").mkdir(parents=True)
    (root / "train2014" / NAME).write_bytes(jpeg())
    return root


def jpeg() -> bytes:
    Image.new("RGB", (80, 60), (1, 2, 3)).save(file := io.BytesIO(), "JPEG")
    return file.getvalue()


def build(path: Path | str, split: str = "val", **options: Any) -> Refcoco:
    return RefcocoConfig(path=str(path), split=split, **options).build()


def to_parquet(rows: list[dict[str, Any]], file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    data = datasets.Dataset.from_list(rows)
    (data.cast_column("image", datasets.Image()) if "image" in data.column_names else data).to_parquet(file)
    return file


def run_length(box: list[float]) -> dict[str, Any]:
    """Return the mask of a box (xywh) in an image of 60 x 80 (height x width)."""
    mask = np.zeros((60, 80), np.uint8, order="F")
    left, top, width, height = map(int, box)
    mask[top : top + height, left : left + width] = 1
    code = masks.encode(mask)
    return {"size": [60, 80], "counts": code["counts"].decode()}


def moondream(boxes: list[list[float]]) -> dict[str, Any]:
    samples = [
        {"id": id, "category": category, "sentences": sentences, "bbox": box, "mask": run_length(mask_box)}
        for id, category, sentences, box, mask_box in zip(
            [7, 8], ["person", "dog"], [["red man", "man on left"], ["dog"]], boxes, [XYWH, OTHER_XYWH], strict=True
        )
    ]
    return {"image": {"bytes": jpeg(), "path": None}, "image_id": 716, "file_name": NAME, "samples": samples}


@pytest.mark.parametrize("boxes", [[XYWH, OTHER_XYWH], [XYXY, OTHER_XYXY]], ids=["xywh", "xyxy"])
def test_box_format_of_refcoco_m_is_detected_from_its_masks(boxes: list[list[float]], tmp_path: Path) -> None:
    source = build(to_parquet([moondream(boxes)], tmp_path / "mini" / "validation-00000-of-00001.parquet"))
    samples = [source.load(index, epoch=0) for index in range(len(source))]
    assert [sample.phrases[0] for sample in samples] == ["red man", "man on left", "dog"]
    assert [sample.boxes.tolist() for sample in samples] == [[XYXY], [XYXY], [OTHER_XYXY]]
    assert samples[2].image.shape == (60, 80, 3)
    assert [sample.id.split("/")[-2:] for sample in samples] == [["7", "0"], ["7", "1"], ["8", "0"]]
    assert source.num_refs == 2
    annotations = source.annotations()
    assert [annotation.id for annotation in annotations] == [sample.id for sample in samples]
    assert [annotation.person for annotation in annotations] == [True, True, False]
    assert [annotation.image_key for annotation in annotations] == ["coco/716"] * 3
    assert source.image_sizes(0).tolist() == [[60, 80]] * 3


def test_boxes_in_other_units_than_their_masks_raise(tmp_path: Path) -> None:
    shares = [[value / 80 for value in box] for box in (XYWH, OTHER_XYWH)]
    with pytest.raises(DataError, match=r"val \(val\): the boxes fit the masks .*neither as x, y, width, height"):
        build(to_parquet([moondream(shares)], tmp_path / "mini" / "val.parquet"))


def nested(expression: str, box: list[float]) -> dict[str, Any]:
    """A row of jxu124/refcoco-benchmark."""
    left, top, width, height = XYWH
    polygon = [left, top, left + width, top, left + width, top + height]
    ann = {"bbox": box, "segmentation": [polygon], "category_id": 1, "id": 5}
    sentences = [{"sent": expression, "raw": expression, "sent_id": 1, "tokens": [expression]}]
    ref = {"ann_id": 5, "category_id": 1, "sentences": sentences, "split": "val"}
    image = {"bytes": jpeg(), "path": None}
    return {"ref_list": [{"ann_info": ann, "ref_info": ref}], "image_info": {"file_name": NAME}, "image": image}


def test_one_of_several_datasets_in_a_folder(tmp_path: Path) -> None:
    for name in ("mine_unc_val", "mine_plus_unc_val", "mine_unc_testA"):
        to_parquet([nested(name, XYWH)], tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    source = build(tmp_path, dataset="mine_unc")
    assert [source.load(0, epoch=0).phrases, source.load(0, epoch=0).boxes.tolist()] == [("mine_unc_val",), [XYXY]]
    assert source.provenance.data == f"{tmp_path.name} (mine_unc)"
    assert build(tmp_path, "testA", dataset="mine_unc").annotations()[0].expression == "mine_unc_testA"
    with pytest.raises(NoSuchSplitError, match="no split 'testB'; it has testA, val"):
        build(tmp_path, "testB", dataset="mine_unc")
    with pytest.raises(DataError, match="are not numbered shards"):
        build(tmp_path)


def test_hub_splits_prefixed_with_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {name: datasets.Dataset.from_list([nested(name, XYWH)]) for name in ("mine_unc_val", "mine_umd_val")}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, revision: datasets.DatasetDict(splits))
    source = build("someone/refs", dataset="mine_umd")
    assert source.annotations()[0].expression == "mine_umd_val"
    assert source.provenance.data == "someone/refs (mine_umd)"
    with pytest.raises(NoSuchSplitError, match="no dataset 'yours'; its splits are mine_unc_val, mine_umd_val"):
        build("someone/refs", dataset="yours")


def test_one_of_several_datasets_in_a_column(tmp_path: Path, images: Path) -> None:
    rows = [
        {"file_name": NAME, "ann_id": 5, "bbox": XYWH, "sent": name, "dataset": name, "split": "val"}
        for name in ("refcoco_unc", "refcocog_umd")
    ]
    (tmp_path / "refs.json").write_text(json.dumps(rows))
    source = build(tmp_path / "refs.json", dataset="refcocog_umd", image_root=str(images))
    assert source.load(0, epoch=0).phrases == ("refcocog_umd",)
    assert (source.provenance.partition, source.provenance.official) == ("umd", False)
    assert len(build(tmp_path / "refs.json", image_root=str(images))) == 2
    with pytest.raises(NoSuchSplitError, match="no dataset 'refcoco'; it has refcoco_unc, refcocog_umd"):
        build(tmp_path / "refs.json", dataset="refcoco", image_root=str(images))


def test_ref_l4(tmp_path: Path, images: Path) -> None:
    row = {"id": 1, "caption": "The man in red.", "bbox": XYWH, "bbox_id": "coco_5", "file_name": NAME}
    row |= {"ori_category_id": "refcoco_1", "image_id": "coco_716", "is_rewrite": True, "split": "val"}
    to_parquet([row, row | {"id": 2, "caption": "A man."}], tmp_path / "Ref-L4" / "ref-l4-val.parquet")
    source = build(tmp_path / "Ref-L4", image_root=str(images))
    assert [source.load(index, epoch=0).phrases[0] for index in (0, 1)] == ["The man in red.", "A man."]
    assert source.load(1, epoch=0).boxes.tolist() == [XYXY]
    assert source.num_refs == 1


def review(count: int) -> dict[str, Any]:
    return {
        "images": [{"id": id, "file_name": NAME, "caption": f"man {id}"} for id in range(count)],
        "annotations": [
            {"id": id, "image_id": id, "bbox": XYWH, "original_id": 5, "category_id": 1, "caption_quality": id % 3}
            for id in range(count)
        ],
    }


def test_reviewed_annotations(tmp_path: Path, images: Path) -> None:
    (tmp_path / "mini_val_reviewed.json").write_text(json.dumps(review(5)))
    source = build(tmp_path / "mini_val_reviewed.json", image_root=str(images))
    expressions = [annotation.expression for annotation in source.annotations()]
    assert expressions == ["man 1", "man 2", "man 4"], "expressions of quality 0 are left out"
    assert source.load(2, epoch=0).boxes.tolist() == [XYXY]
    assert (source.provenance.data, source.provenance.split) == ("mini_reviewed", "val")
    (tmp_path / "refcoco_val_reviewed.json").write_text(json.dumps(review(5)))
    with pytest.raises(DataError, match=r"refcoco \(val\) has 5 expressions, but .*10,834 expressions"):
        build(tmp_path / "refcoco_val_reviewed.json", image_root=str(images))
    (tmp_path / "refcoco_val_reviewed.json").write_text(json.dumps(review(10834)))
    whole = build(tmp_path / "refcoco_val_reviewed.json", image_root=str(images))
    assert (whole.provenance.partition, whole.provenance.official, len(whole)) == ("unc", False, 7222)
    coco = review(1)
    del coco["annotations"][0]["caption_quality"]
    (tmp_path / "mini_val_reviewed.json").write_text(json.dumps(coco))
    with pytest.raises(DataError, match=r"mini_val_reviewed.json has images and annotations but is not a reviewed"):
        build(tmp_path / "mini_val_reviewed.json", image_root=str(images))


def write_grefs(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    refs = [
        {"ref_id": ref_id, "ann_id": ids, "image_id": 716, "split": "val", "sentences": [{"sent": sent}]} | changes
        for ref_id, (ids, sent) in enumerate([([5], "man"), ([5, 6], "both"), ([-1], "cat")])
    ]
    (folder / "grefs(unc).json").write_text(json.dumps(refs))
    boxes = [{"id": 5, "image_id": 716, "bbox": XYWH}, {"id": 6, "image_id": 716, "bbox": OTHER_XYWH}]
    instances = {"annotations": boxes, "images": [{"id": 716, "file_name": NAME}]}
    (folder / "instances.json").write_text(json.dumps(instances))
    return folder


def test_grefcoco(tmp_path: Path, images: Path) -> None:
    folder = write_grefs(tmp_path / "grefcoco")
    for path in (folder, folder / "grefs(unc).json"):
        source = build(path, image_root=str(images))
        samples = [source.load(index, epoch=0) for index in range(len(source))]
        assert [sample.boxes.tolist() for sample in samples] == [[XYXY], [XYXY, OTHER_XYXY], []]
        assert samples[2].boxes.shape == (0, 4)
        assert [sample.phrase_ids.tolist() for sample in samples] == [[0], [0, 0], []]
        assert type(new_metric(source)).__name__ == "GrecMetric"
        assert source.provenance.data == "grefcoco-unc"
    source = build(write_grefs(folder, ann_id=[5, 99]), image_root=str(images))
    with pytest.raises(BadSampleError, match=r"a box is (None), expected.*use the instances.json"):
        source.load(0, epoch=0)
    (folder / "instances.json").unlink()
    with pytest.raises(DataError, match=r"instances.json is missing.*put it beside grefs\(unc\).json"):
        build(folder, image_root=str(images))
    (folder / "grefs(unc).json").write_text("[")
    with pytest.raises(DataError, match=r"grefs\(unc\).json cannot be read"):
        build(folder, image_root=str(images))


def test_number_of_other_objects_of_the_category(tmp_path: Path, images: Path) -> None:
    folder = tmp_path / "mini"
    folder.mkdir()
    ref = {"ref_id": 1, "ann_id": 5, "image_id": 716, "category_id": 1, "split": "val", "sentences": [{"sent": "man"}]}
    (folder / "refs(unc).p").write_bytes(pickle.dumps([ref, ref | {"ann_id": 6, "category_id": 3}]))
    anns = [{"id": id, "image_id": 716, "category_id": category, "bbox": XYWH} for id, category in enumerate([1] * 6)]
    anns += [{"id": 6, "image_id": 716, "category_id": 3, "bbox": XYWH}]
    instances = {"annotations": anns, "images": [{"id": 716, "file_name": NAME}]}
    (folder / "instances.json").write_text(json.dumps(instances))
    man, car = build(folder, image_root=str(images)).annotations()
    assert (man.person, man.num_others) == (True, 5)
    assert (car.person, car.num_others) == (False, 0)
    captions = [
        {"ann_id": id, "captions": ["a", "b"], "bbox": XYXY, "file_name": NAME, "category_id": 1} for id in "xyz"
    ]
    described = build(to_parquet(captions, tmp_path / "val.parquet"), image_root=str(images)).annotations()
    assert [annotation.num_others for annotation in described] == [2] * 6


def test_files_are_read_once_for_all_splits_unless_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_grefs(tmp_path / "grefcoco")
    build(folder)
    monkeypatch.setattr("vg.data.refcoco.pickles.load_plain", lambda file: pytest.fail("read a second time"))
    build(folder)
    monkeypatch.undo()
    write_grefs(folder, sentences=[{"sent": "something else"}])
    assert build(folder).annotations()[0].expression == "something else"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("jxu124/refcoco", [("RefCOCO", "unc")]),
        ("jxu124/refcocoplus@abc", [("RefCOCO+", "unc")]),
        ("lmms-lab/RefCOCOg", [("RefCOCOg", "umd"), ("RefCOCOg", "google")]),
        ("refcocog-google", [("RefCOCOg", "google")]),
        ("jxu124/refcoco-benchmark (refcoco_plus_unc)", [("RefCOCO+", "unc")]),
        ("moondream/refcoco-m", [("RefCOCO-M", "unc")]),
        ("refcoco+_umd", []),
        ("refcoco_mini", []),
        ("grefcoco-unc", []),
        ("shapes", []),
    ],
)
def test_official_names(name: str, expected: list[tuple[str, str]]) -> None:
    assert identify(name) == expected


def test_official_counts() -> None:
    assert check_counts("jxu124/refcoco", "val", Counts(10834, 3811)) == ("unc", True)
    assert check_counts("refcocog", "val", Counts(9536, 8000)) == ("google", True)
    assert check_counts("refcocog", "val", Counts(4896, 2573)) == ("umd", True)
    assert check_counts("refcoco", "val", Counts(8811), strict=False) == ("unc", False)
    assert check_counts("mine", "val", Counts(1, 1)) == (None, None)
    for found in (Counts(3811, 3811), Counts(8811, 8811), Counts(10834, 10834)):
        with pytest.raises(DataError, match=r"10,834 expressions of 3,811 objects \(unc\).*give a local copy a name"):
            check_counts("jxu124/refcoco", "val", found)
    with pytest.raises(DataError, match=r"4,896 .*\(umd\) or 9,536 expressions \(google\)"):
        check_counts("refcocog", "val", Counts(5, 5))


def test_a_subset_of_a_split_under_an_official_name_raises(tmp_path: Path, images: Path) -> None:
    row = {"file_name": NAME, "ann_id": 5, "bbox": XYWH, "sent": "man"}
    (tmp_path / "refcoco_val.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"refcoco \(val\) has 1 expressions of 1 objects, but the official split"):
        build(tmp_path / "refcoco_val.jsonl", image_root=str(images))
    (tmp_path / "refcoco_val.jsonl").rename(tmp_path / "refcoco_mini_val.jsonl")
    assert build(tmp_path / "refcoco_mini_val.jsonl", image_root=str(images)).provenance.official is None


@pytest.mark.skipif(not (REAL / "refcoco_annotations").is_dir(), reason="the published annotations are not available")
def test_published_annotations_are_recognized_as_official() -> None:
    source = build(REAL / "refcoco_annotations" / "refcoco_unc_val.jsonl")
    assert (source.provenance.partition, source.provenance.split, source.provenance.official) == ("unc", "val", True)
