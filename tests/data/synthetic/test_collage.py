"""Collages: what is cut out, where it is pasted, which split it belongs to, and errors about the files."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as masks

from tests.data.synthetic.reader import Reader
from vg.data.synthetic import crops
from vg.data.synthetic.collage import Collage, CollageConfig, Pasted
from vg.data.synthetic.expressions import described_scene
from vg.data.synthetic.layout import Scene
from vg.errors import BadSampleError, DataError

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "coco_permissive"
TYPES = ("attribute", "superlative", "relation", "ordinal", "chain")
COLORS = {"cat": (220, 30, 30), "dog": (30, 180, 30), "traffic light": (30, 30, 220)}
SIDE = 320


def write(folder: Path, num_images: int = 20, **changes: Any) -> CollageConfig:
    """Write images with an octagon of the color of its category on the left, and nothing on the right."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for index in range(num_images):
        category = index % len(COLORS)
        width, height = rng.integers(40, 100, 2).tolist()
        left, top = 20, int(rng.integers(20, 200))
        image = rng.integers(90, 130, (SIDE, SIDE, 3), np.uint8)
        polygon = [(0.3, 0), (0.7, 0), (1, 0.3), (1, 0.7), (0.7, 1), (0.3, 1), (0, 0.7), (0, 0.3)]
        points = [value for x, y in polygon for value in (left + x * width, top + y * height)]
        mask = masks.decode(masks.frPyObjects([points], SIDE, SIDE))[..., 0]
        image[mask == 1] = list(COLORS.values())[category]
        Image.fromarray(image).save(folder / f"{index}.png")
        box = [left, top, width, height]
        row = {"id": index, "image_id": index, "category_id": category, "bbox": box, "iscrowd": 0}
        rows.append(row | {"segmentation": [points], "area": int(mask.sum())})
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE} for i in range(num_images)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(COLORS)],
        "annotations": rows,
    }
    (folder / "instances.json").write_text(json.dumps(document))
    return CollageConfig(annotations=str(folder / "instances.json"), images=str(folder), **changes)


def rewrite(config: CollageConfig, index: int, **changes: Any) -> None:
    """Change one annotation of the file."""
    file = Path(config.annotations)
    document = json.loads(file.read_text())
    document["annotations"][index] |= changes
    file.write_text(json.dumps(document))


def ids(source: Collage) -> set[str]:
    rng = np.random.default_rng(0)
    scenes = [source.scene(rng, epoch) for epoch in range(30) for _ in range(5)]
    return {item.crop.id for scene in scenes for item in scene.objects}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> CollageConfig:
    return write(tmp_path_factory.mktemp("coco"), 60)


def fitting(match: re.Match, prefix: str, scene: Scene) -> list[Pasted]:
    return [item for item in scene.objects if item.crop.category == match[f"{prefix}category"]]


READER = Reader(f"(?:the )?(?P<{{0}}category>{'|'.join(COLORS)})", fitting)


@pytest.mark.parametrize("scenes", ["plain", "crowded"])
def test_every_expression_refers_to_its_target_only(config, scenes):
    source = CollageConfig(annotations=config.annotations, images=config.images, scenes=scenes).build()
    rng = np.random.default_rng(0)
    for expression_type in TYPES:
        for _ in range(200):
            scene, expression = described_scene(rng, expression_type, lambda rng: source.scene(rng, 0))
            assert expression.type == expression_type
            assert READER.read(expression.text, scene) == (expression_type, [expression.target])


@pytest.mark.parametrize("size", [64, 128])
def test_objects_are_cut_out_pasted_in_their_box_and_do_not_overlap(config, size):
    source = CollageConfig(annotations=config.annotations, images=config.images, image_size=size).build()
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = source.scene(rng, 0)
        empty = source.draw(Scene((), size, scene.background)).astype(int)
        assert 100 < empty.mean() < 150, "no object is in the background"
        assert np.ptp(empty, axis=2).max() < 30
        image = source.draw(scene)
        for item in scene.objects:
            drawn = abs(source.draw(Scene((item,), size, scene.background)) - empty).max(axis=2) > 30  # [H, W]
            rows, columns = (np.flatnonzero(drawn.any(axis=axis)) for axis in (1, 0))
            found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert np.abs(np.subtract(found, item.box)).max() <= 1, item
            left, top, right, bottom = item.box
            middle = image[(top + bottom) // 2, (left + right) // 2].astype(int)
            assert abs(middle - COLORS[item.crop.category]).max() < 20
            assert abs(image[top, left] - empty[top, left]).max() < 60, "corners of the octagon are transparent"
            for other in scene.objects:
                gaps = (left - other.box[2], other.box[0] - right, top - other.box[3], other.box[1] - bottom)
                assert other is item or max(gaps) > 0


def test_an_object_is_in_one_split_only(config):
    sources = {
        split: CollageConfig(annotations=config.annotations, images=config.images, split=split).build()
        for split in ("train", "val", "test")
    }
    found = {split: ids(source) for split, source in sources.items()}
    assert sum(map(len, found.values())) == len(set.union(*found.values())) == 60
    assert 40 < len(found["train"]) < 55
    for split, source in sources.items():
        one, other = (source.load(0, epoch) for epoch in (0, 1))
        assert (one.image.tobytes() == other.image.tobytes()) == (split != "train")
        assert one.id == other.id == f"collage/{split}/000000/0"


def test_an_epoch_uses_a_limited_number_of_objects(config, monkeypatch):
    source = config.build()
    rng = np.random.default_rng(0)
    monkeypatch.setattr("vg.data.synthetic.collage.MAX_CROPS", 10)
    used = [{item.crop.id for _ in range(100) for item in source.scene(rng, epoch).objects} for epoch in (0, 1, 0)]
    assert len(used[0]) == len(used[1]) == 10
    assert used[0] != used[1]
    assert used[0] == used[2]


def test_every_epoch_has_all_categories(config, monkeypatch):
    source = config.build()
    categories = {crop.category for crop in source._crops}
    monkeypatch.setattr("vg.data.synthetic.collage.MAX_CROPS", len(categories))
    for epoch in range(20):
        crops, _ = source._used(epoch)
        assert crops.keys() == categories


def test_objects_that_no_expression_describes_are_an_error(config):
    source = replace(config, kinds=("relation",)).build()
    (crop, *_) = source._crops
    source._crops = [crop]
    with pytest.raises(DataError, match="none of 1000 scenes can be described by an expression of the type 'relation'"):
        source.load(0, 0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"segmentation": [[20, 20, 80, 20, 80, 21, 20, 21]], "area": 3600}, "smaller than 1024 pixels"),
        (
            {"segmentation": [[500, 500, 560, 500, 560, 560]], "area": 3600},
            "smaller than 1024 pixels",
        ),
        ({"iscrowd": 1}, "crowd regions"),
        ({"segmentation": []}, "without segmentation"),
        ({"bbox": [20, 20, 30, 30], "area": 900}, "smaller than 1024 pixels"),
        ({"bbox": [20, 20, 200, 50]}, "elongated"),
        ({"bbox": [1, 20, 60, 60]}, "at the image border"),
        ({"segmentation": [[20, 20, 60, 20, 60, 60], [80, 80, 120, 80, 120, 120]]}, "in several pieces"),
    ],
)
def test_objects_that_are_not_visible_as_a_whole_are_left_out(tmp_path, changes, reason):
    config = write(tmp_path)
    rewrite(config, 0, **changes)
    assert "annotation 0" not in ids(config.build())
    one = write(tmp_path / "one", 1)
    rewrite(one, 0, **changes)
    with pytest.raises(DataError, match=rf"no object can be cut out \(1 {reason}\)"):
        one.build()


def test_objects_whose_mask_includes_others_are_left_out(tmp_path):
    config = write(tmp_path)
    inner = [40, 60, 75, 60, 75, 95, 40, 95]
    document = json.loads(Path(config.annotations).read_text())
    outer = document["annotations"][0]["segmentation"] = [[20, 40, 120, 40, 120, 140, 20, 140]]
    document["annotations"][0] |= {"bbox": [20, 40, 100, 100], "area": 10_000}
    food = {"id": 77, "image_id": 0, "category_id": 1, "bbox": [40, 60, 35, 35], "area": 1225, "segmentation": [inner]}
    document["annotations"].append(food)
    Path(config.annotations).write_text(json.dumps(document))
    assert "annotation 0" not in ids(config.build()), outer


@pytest.mark.parametrize("compressed", [False, True])
def test_run_length_encodings_are_read(tmp_path, compressed):
    config = write(tmp_path)
    expected = config.build().load(0, 0)
    document = json.loads(Path(config.annotations).read_text())
    for row in document["annotations"]:
        (encoding,) = masks.frPyObjects(row["segmentation"], SIDE, SIDE)
        values = masks.decode(encoding).T.flatten()
        starts = np.flatnonzero(np.diff(values, prepend=0)).tolist()
        counts = np.diff([0, *starts, len(values)]).tolist()
        row["segmentation"] = {"size": [SIDE, SIDE], "counts": encoding["counts"].decode() if compressed else counts}
    Path(config.annotations).write_text(json.dumps(document))
    sample = config.build().load(0, 0)
    assert sample.phrases == expected.phrases
    assert np.array_equal(sample.image, expected.image)


def test_errors_name_file_row_and_fix(tmp_path):
    config = write(tmp_path)
    rewrite(config, 3, segmentation=[["a", 1, 2, 3, 4, 5]])
    with pytest.raises(DataError, match=r"instances\.json: annotation 3 \(3\.png, cat\).*write polygons"):
        config.build()
    rewrite(config, 3, segmentation={"size": [10, 20], "counts": "abc"})
    with pytest.raises(DataError, match=r"annotation 3 .*its size is \[10, 20\], that of the image is \[320, 320\]"):
        config.build()
    rewrite(config, 3, segmentation={"size": [SIDE, SIDE], "counts": [7, 2 * SIDE**2]})
    with pytest.raises(DataError, match=r"annotation 3 .*Invalid RLE"):
        config.build()

    config = write(tmp_path)
    (tmp_path / "7.png").unlink()
    with pytest.raises(DataError, match=r"1 of 20 image files are missing below .*, first 7\.png; put them there"):
        config.build()
    with pytest.raises(DataError, match="image_root /nowhere is not a folder"):
        CollageConfig(annotations=config.annotations, images="/nowhere").build()
    with pytest.raises(DataError, match=r"cannot read /nowhere\.json"):
        CollageConfig(annotations="/nowhere.json", images=config.images).build()

    few = write(tmp_path / "few", 4)
    with pytest.raises(DataError, match=r"split val has \d of 4 objects .* use more images"):
        CollageConfig(annotations=few.annotations, images=few.images, split="val").build()

    document = json.loads(Path(few.annotations).read_text())
    full = [{"image_id": i, "category_id": 0, "bbox": [0, 0, SIDE, SIDE], "iscrowd": 1} for i in range(4)]
    document["annotations"] += [{"id": 100 + i, **row} for i, row in enumerate(full)]
    Path(few.annotations).write_text(json.dumps(document))
    with pytest.raises(DataError, match="no image has a region of 96 x 96 pixels without objects"):
        few.build()
    for image in document["images"]:
        del image["height"]
    Path(few.annotations).write_text(json.dumps(document))
    with pytest.raises(DataError, match="image 0 has no height and width"):
        few.build()


def test_an_image_of_another_size_is_named(tmp_path):
    config = write(tmp_path)
    source = config.build()
    for file in tmp_path.glob("*.png"):
        Image.new("RGB", (50, 40)).save(file)
    crops.read_crop.cache_clear()
    crops.read_region.cache_clear()
    with pytest.raises(BadSampleError, match=r"\d\.png is 50 wide and 40 high"):
        source.load(0, 0)


def test_the_largest_empty_square_touches_no_box():
    rng = np.random.default_rng(0)
    for _ in range(50):
        corners = rng.uniform(0, 400, (rng.integers(0, 5), 2))
        boxes = np.hstack([corners, corners + rng.uniform(5, 150, corners.shape)])
        found = crops._largest_empty_square(boxes, 400, 500)
        assert found
        left, top, right, bottom = found
        assert right - left == bottom - top >= crops.MIN_REGION
        assert right <= 500
        assert bottom <= 400
        for x1, y1, x2, y2 in boxes.tolist():
            assert x2 < left or right <= x1 or y2 < top or bottom <= y1
    assert crops._largest_empty_square(np.zeros((0, 4)), 480, 640) == (0, 0, 480, 480)
    assert crops._largest_empty_square(np.array([[0, 0, 640, 480]]), 480, 640) is None


@pytest.mark.skipif(not REAL.is_dir(), reason="no shared/data beside the repository")
def test_real_images():
    paths = {"annotations": str(REAL / "instances_permissive.json"), "images": str(REAL / "images")}
    found = {}
    for split in ("train", "val", "test"):
        source = CollageConfig(split=split, image_size=96, size=20, **paths).build()
        for index in range(len(source)):
            sample = source.load(index, 0)
            assert sample.image.std() > 5
        found[split] = ids(source)
    assert len(found["train"]) > 120
    assert not found["train"] & found["val"] | found["train"] & found["test"] | found["val"] & found["test"]
