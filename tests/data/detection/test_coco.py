"""COCO json: samples, boxes that are left out, and error messages."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests.data.detection.detection_files import CATEGORIES, REAL, annotation, coco_document, write_coco, write_image
from vg.data.dataset import GroundingDataset
from vg.data.detection.coco import CocoConfig
from vg.data.detection.vocabulary import VocabularyConfig
from vg.data.source import Provenance, checked
from vg.errors import BadSampleError, DataError


def test_images_boxes_and_classes(tmp_path: Path):
    source = CocoConfig(path=str(write_coco(tmp_path))).build()
    assert source.provenance == Provenance(tmp_path.name, "val", "detection")
    assert len(source) == 3
    assert source.category_ids == {"cat": 3, "traffic light": 7, "hot dog": 90}
    assert source.vocabulary.names == ("cat", "traffic_light", "hot dog")

    first, empty, portrait = (checked(source.load(index, 0)) for index in range(3))
    assert [first.id, empty.id, portrait.id] == ["25", "4", "139"]
    assert first.phrases == empty.phrases == ("cat", "traffic light", "hot dog")
    boxes = [[1.5, 2, 11.5, 22], [10, 20, 40, 35], [1.5, 2, 11.5, 22], [50, 30, 60, 40], [10, 10, 10.5, 15]]
    assert first.boxes.tolist() == boxes
    assert first.phrase_ids.tolist() == [1, 2, 1, 0, 0]
    assert first.crowd.tolist() == [False, True, False, False, False]
    assert first.areas.tolist() == [200, 200, 200, 900, 2.5], "the second is annotated, the others are areas of boxes"
    assert empty.boxes.shape == (0, 4)
    assert (empty.crowd, portrait.crowd) == (None, None)
    assert portrait.areas.tolist() == [300.5]
    assert portrait.image.shape == (60, 40, 3)


def test_thin_boxes_are_left_out_with_min_side(tmp_path: Path):
    """Published training leaves them out; evaluation counts them, as pycocotools does."""
    file = str(write_coco(tmp_path))
    everything, thick = (checked(CocoConfig(path=file, min_side=side).build().load(0, 0)) for side in (0, 1))
    assert everything.boxes[4].tolist() == [10, 10, 10.5, 15]
    assert thick.boxes.tolist() == everything.boxes[:4].tolist()
    assert thick.phrase_ids.tolist() == [1, 2, 1, 0]
    assert thick.crowd.tolist() == [False, True, False, False]
    assert thick.areas.tolist() == [200, 200, 200, 900]


def test_crowd_regions_are_left_out_with_sampled_phrases(tmp_path: Path):
    config = CocoConfig(path=str(write_coco(tmp_path)), min_side=1, vocabulary=VocabularyConfig(negatives=1, full=1))
    source = config.build()
    for epoch in range(10):
        sample = checked(source.load(0, epoch))
        assert [sample.phrases[id] for id in sample.phrase_ids] == ["traffic light", "traffic light", "cat"]
        assert sample.crowd is None
    assert len({source.load(1, epoch).phrases for epoch in range(20)}) == 3


def test_sizes_and_keys(tmp_path: Path):
    document = coco_document()
    del document["images"][2]["height"]
    document["images"][1]["file_name"] = "COCO_val2014_000000000139.jpg"
    source = CocoConfig(path=str(write_coco(tmp_path, document))).build()
    write_image(tmp_path / "000000000139.jpg")
    assert source.image_sizes(0).tolist() == [[40, 60], [40, 60], [60, 40]], "the last one from its file"
    assert source.image_keys() == [str(tmp_path / "a.png"), "coco/139", str(tmp_path / "c.png")]


def test_image_folders(tmp_path: Path):
    file = write_coco(tmp_path / "coco" / "annotations")
    document = json.loads(file.read_text())
    document["images"][0] = {"id": 25, "coco_url": "http://images.cocodataset.org/val2017/000000000025.png"}  # LVIS
    file.write_text(json.dumps(document))
    write_image(tmp_path / "coco" / "val2017" / "000000000025.png")
    source = CocoConfig(path=str(file)).build()
    assert source.provenance.data == "coco"
    assert source.load(0, 0).image.shape == (40, 60, 3)
    with pytest.raises(BadSampleError, match=r"b\.png not found below .*set image_root"):
        source.load(1, 0)
    CocoConfig(path=str(file), image_root=str(file.parent)).build().load(1, 0)
    with pytest.raises(DataError, match=r"image_root .* is not a folder"):
        CocoConfig(path=str(file), image_root=str(tmp_path / "nowhere")).build()


def test_annotated_size_differs_from_image(tmp_path: Path):
    document = coco_document()
    document["images"][0] |= {"height": 60, "width": 40}
    document["images"][1] |= {"height": 41}
    source = CocoConfig(path=str(write_coco(tmp_path, document))).build()
    with pytest.raises(BadSampleError, match=r"a\.png is 60 wide and 40 high, .* has 40 and 60; .*turned by 90"):
        source.load(0, 0)
    with pytest.raises(BadSampleError, match=r"b\.png .* has 60 and 41; use the image that was annotated"):
        source.load(1, 0)


def test_boxes_in_another_format_cause_a_warning(tmp_path: Path):
    document = coco_document()
    xyxy = [annotation(number, 25, 3, [30, 20, 45 + number, 30]) for number in range(8)]
    file = write_coco(tmp_path, document | {"annotations": xyxy})
    with pytest.warns(
        UserWarning, match=r"\(val\): 8 of 8 boxes extend beyond their image, first in 25; .*COCO has x, y"
    ):
        CocoConfig(path=str(file)).build()
    inside = [annotation(number, 25, 3, [30, 20, 5, 5]) for number in range(20)]
    file = write_coco(tmp_path, document | {"annotations": [*inside, annotation(30, 25, 3, [30, 20, 40, 30])]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CocoConfig(path=str(file)).build()


VALID = {"images": coco_document()["images"], "annotations": [], "categories": CATEGORIES}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "the file has a list; COCO json has lists of images, annotations and categories"),
        ({"images": [], "categories": []}, r"no list of annotations, the file has the keys \['categories', 'images'\]"),
        (
            VALID | {"images": [{"file_name": "a.png"}]},
            r"images without id or file_name: images\[0\]: {'file_name': 'a.png'}",
        ),
        (VALID | {"images": [{"id": 1}]}, r"images without id or file_name: images\[0\]: {'id': 1}; add .*coco_url"),
        (
            VALID | {"images": [VALID["images"][0]] * 2},
            r"duplicate ids in images: images\[1\]: {'id': 25, 'file_name': 'a.png'.*; renumber them",
        ),
        (VALID | {"categories": []}, "there are no classes"),
        (
            VALID | {"categories": [{"id": 1, "name": ["cat", "dog"]}]},
            r"categories without id or name: categories\[0\]",
        ),
        (
            VALID | {"annotations": [annotation(8, 25, 3, [0, 0, 5, 5]) | {"iscrowd": "0"}]},
            "values of iscrowd that are not 0 or 1: annotation 8: iscrowd '0'",
        ),
        (
            VALID | {"annotations": [annotation(8, 25, 3, [0, 0, 5, 5]) | {"area": float("nan")}]},
            "areas that are not numbers: annotation 8: area nan",
        ),
        (VALID | {"categories": [{"id": 1}]}, r"categories without id or name: categories\[0\]: {'id': 1}"),
        (
            VALID | {"annotations": [annotation(8, 1, 3, [0, 0, 5, 5])]},
            "image_id is not in images: annotation 8: image_id 1; add it to images",
        ),
        (
            VALID | {"annotations": [annotation(8, 25, 1, [0, 0, 5, 5])]},
            "not in categories: annotation 8: category_id 1;",
        ),
        (VALID | {"annotations": [{"image_id": 25, "category_id": 3}]}, r"annotations\[0\]: bbox None"),
        (
            VALID | {"annotations": [annotation(8, 25, 3, [0, 0, 5])]},
            r"annotation 8: bbox \[0, 0, 5\]; write x, y, width, height in pixels",
        ),
        (
            VALID | {"annotations": [annotation(8, 25, 3, [0, 0, 5, -1])]},
            r"inverted boxes .*annotation 8 \(a.png, cat\)",
        ),
        (VALID | {"annotations": [annotation(8, 25, 3, [0, 0, 5, None])]}, "four finite numbers: annotation 8: bbox"),
        (
            VALID | {"annotations": [annotation(8, 25, 3, [0, 0, 5, float("nan")])]},
            "four finite numbers: annotation 8: bbox",
        ),
        (
            VALID | {"annotations": [annotation(7, 25, 3, [1, 1, 5, 5]), annotation(8, 25, 3, [[1, 1, 5, 5]])]},
            "four finite numbers: annotation 8: bbox",
        ),
    ],
)
def test_errors_name_the_entry(tmp_path: Path, document, message):
    with pytest.raises(DataError, match=f"instances_val.json.*{message}"):
        CocoConfig(path=str(write_coco(tmp_path, document))).build()


def test_missing_file_and_invalid_json(tmp_path: Path):
    with pytest.raises(DataError, match=r"cannot read .*nothing\.json: No such file"):
        CocoConfig(path=str(tmp_path / "nothing.json")).build()
    (tmp_path / "half.json").write_text('{"images": [')
    with pytest.raises(DataError, match=r"cannot read .*half.json: Not JSON \(.*; path is an intact json file"):
        CocoConfig(path=str(tmp_path / "half.json")).build()


@pytest.mark.parametrize(
    ("file", "images", "boxes", "crowds"),
    [
        ("raccoon120/instances_train.json", 100, 105, 0),
        ("raccoon120/instances_val.json", 20, 22, 0),
        ("bccd/instances_val.json", 73, 978, 0),
        ("coco_permissive/instances_permissive_val.json", 47, 428, 6),
    ],
)
def test_real_datasets(file: str, images: int, boxes: int, crowds: int):
    if not (REAL / file).exists():
        pytest.skip("no shared/data beside the repository")
    source = CocoConfig(path=str(REAL / file)).build()
    data = GroundingDataset(source)
    assert len(data) == images
    samples = [data[index] for index in range(images)]
    document = json.loads((REAL / file).read_text())
    assert sum(len(sample.boxes) for sample in samples) == boxes == len(document["annotations"])
    assert sum(int(sample.crowd.sum()) for sample in samples if sample.crowd is not None) == crowds
    sizes = np.array([sample.image.shape[:2] for sample in samples])
    np.testing.assert_array_equal(sizes, source.image_sizes(0))
    names = {category["id"]: category["name"] for category in document["categories"]}
    for sample in samples[:20]:
        own = [row for row in document["annotations"] if str(row["image_id"]) == sample.id]
        assert [sample.phrases[id] for id in sample.phrase_ids] == [names[row["category_id"]] for row in own]
        xywh = np.array([row["bbox"] for row in own], np.float32).reshape(-1, 4)
        np.testing.assert_allclose(sample.boxes[:, 2:] - sample.boxes[:, :2], xywh[:, 2:], atol=0.02)
