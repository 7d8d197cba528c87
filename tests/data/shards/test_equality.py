"""A sample read from shards equals that of the dataset that was written: every source, both formats, all settings."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import datasets
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from vg.data import DatasetConfig
from vg.data.dataset import GroundingDataset
from vg.data.detection.coco import CocoConfig
from vg.data.detection.odvg import OdvgConfig
from vg.data.detection.vocabulary import VocabularyConfig
from vg.data.expressions import CsvConfig
from vg.data.overlap import without_overlap
from vg.data.refcoco.source import RefcocoConfig
from vg.data.shards.containers import COLUMNS
from vg.data.shards.index import ShardFormat
from vg.data.shards.source import Shards, ShardsConfig
from vg.data.shards.write import write_shards
from vg.data.source import Source, checked
from vg.data.subset import SplitConfig
from vg.data.synthetic.shapes import ShapesConfig
from vg.types import Sample

FORMATS = get_args(ShardFormat)


def written(dataset: Any, folder: Path, format: ShardFormat = "tar", **settings: Any) -> Shards:
    """Write a dataset and open the shards; `settings` are those of the reader."""
    write_shards(dataset, folder, format, samples_per_shard=3)
    return ShardsConfig(path=str(folder), **settings).build()


def assert_same(shards: Shards, source: Source, epochs: Sequence[int] = (0, 2)) -> None:
    """Compare samples by id, apart from the location of a caption, which is for messages."""
    assert len(shards) == len(source)
    for epoch in epochs:
        expected = {sample.id: sample for sample in (source.load(index, epoch) for index in range(len(source)))}
        for index in range(len(shards)):
            sample = shards.load(index, epoch)
            np.testing.assert_equal(as_dict(sample), as_dict(expected.pop(sample.id)))
        assert not expected


def as_dict(sample: Sample) -> dict[str, Any]:
    types = {name: value.dtype for name, value in vars(sample).items() if isinstance(value, np.ndarray)}
    caption = sample.caption and sample.caption._replace(location="")
    return asdict(replace(sample, caption=caption)) | {"types": types}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("member", get_args(get_args(DatasetConfig)[0]), ids=lambda member: member.name)
def test_every_source(member: Any, format: ShardFormat, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    dataset = member.miniature(tmp_path / "data")
    shards, source = written(dataset, tmp_path / "shards", format), dataset.build()
    assert_same(shards, source, epochs=[0])  # generated scenes for training differ in every epoch
    assert shards.provenance == source.provenance
    assert list(shards.damaged_files()) == []
    if source.category_ids is not None:
        assert shards.category_ids == source.category_ids
    assert shards.num_classes == source.num_classes


def test_images_in_a_folder_named_coco_have_no_coco_id(tmp_path: Path) -> None:
    """The key of an image that is missing is its path, which may begin as keys of COCO do."""
    (tmp_path / "data").mkdir()
    config = CsvConfig.miniature(tmp_path / "data")
    Path(config.path).write_text(Path(config.path).read_text() + "coco/missing.png,a dog,1,1,20,20\n")
    shards = write_shards(config, tmp_path / "shards", bad_samples="skip")
    assert len(shards) == len(config.build()) - 1


def test_image_keys_of_tables_and_of_shards(tmp_path: Path) -> None:
    """Shards of a table that contains its images have keys of COCO, and so have shards of these shards."""
    name, buffer = "COCO_train2014_000000000716.jpg", io.BytesIO()
    Image.new("RGB", (60, 50), "red").save(buffer, "JPEG")
    row = {"question_id": "1", "file_name": name, "answer": ["a man"], "bbox": [1.0, 2.0, 10.0, 20.0]}
    features = {name: datasets.Value("string") for name in ("question_id", "file_name")}
    features |= {"answer": datasets.Sequence(datasets.Value("string")), "image": datasets.Image()}
    features |= {"bbox": datasets.Sequence(datasets.Value("float64"))}
    rows = [row | {"image": {"bytes": buffer.getvalue(), "path": name}}]
    datasets.Dataset.from_list(rows, datasets.Features(features)).save_to_disk(str(tmp_path / "table"))
    shards = written(RefcocoConfig(path=str(tmp_path / "table"), split="val"), tmp_path / "shards")
    again = written(ShardsConfig(path=str(tmp_path / "shards")), tmp_path / "again")
    assert shards.image_keys() == again.image_keys() == ["coco/716"]
    assert shards.row(0) == again.row(0)
    assert shards.row(0)["filename"] == "000000000716.jpg"


@pytest.fixture
def coco(tmp_path: Path) -> CocoConfig:
    """Settings of images of different sizes, of which one has a crowd region and one is without boxes."""
    rng = np.random.default_rng(0)
    images = []
    for index, (height, width) in enumerate([(40, 60), (64, 48), (33, 35), (20, 21), (50, 50)]):
        file = f"{index}.{'png' if index == 3 else 'jpg'}"
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(tmp_path / file)
        images.append({"id": 100 + index, "file_name": file, "height": height, "width": width})
    rows = [(100, 7, [1, 2, 9.3, 8], 0), (100, 3, [0.1, 0.2, 15, 12], 1), (101, 5, [5, 5, 20, 30], 0)]
    rows += [(103, 7, [1, 1, 40, 8], 0), (104, 3, [1, 2, 3, 4], 0), (104, 3, [10, 12, 13, 14], 1)]
    annotations = [
        {"id": i, "image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd, "area": 3.3 * i}
        for i, (image, category, box, crowd) in enumerate(rows)
    ]
    categories = [{"id": 3, "name": "traffic_light"}, {"id": 5, "name": "cat"}, {"id": 7, "name": "cup/mug"}]
    document = {"images": images, "categories": categories, "annotations": annotations}
    (tmp_path / "coco.json").write_text(json.dumps(document))
    return CocoConfig(path=str(tmp_path / "coco.json"))


@pytest.mark.parametrize(
    "vocabulary",
    [
        {},
        {"only": ["cat", "cup/mug"]},
        {"negatives": 1, "alternatives": True},
        {"clean": False, "phrases": {"cat": "a cat"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("format", FORMATS)
def test_all_classes_are_written_and_the_reader_selects(
    coco: CocoConfig, vocabulary: dict[str, Any], format: ShardFormat, tmp_path: Path
) -> None:
    dataset = replace(coco, vocabulary=VocabularyConfig(**vocabulary))
    shards = written(dataset, tmp_path / "shards", format, vocabulary=dataset.vocabulary)
    assert_same(shards, dataset.build())
    assert shards.num_classes == dataset.build().num_classes
    assert shards.category_ids == dataset.build().category_ids
    assert_same(ShardsConfig(path=str(tmp_path / "shards")).build(), coco.build())


def test_overlap_with_images_of_coco_is_found(coco: CocoConfig, tmp_path: Path) -> None:
    name = "COCO_train2014_000000000716.jpg"
    (tmp_path / "0.jpg").rename(tmp_path / name)
    annotations = (tmp_path / "coco.json").read_text().replace('"0.jpg"', f'"{name}"')
    (tmp_path / "coco.json").write_text(annotations)
    shards = written(coco, tmp_path / "shards")
    keys = shards.image_keys()
    assert keys[0] == coco.build().image_keys()[0] == "coco/716"
    assert len(set(keys)) == 5
    with pytest.warns(UserWarning, match="1 of 5 training samples"):
        kept = without_overlap(shards, [coco.build()], drop=True)
    assert [kept.load(index, 0).id for index in range(len(kept))] == ["101", "102", "103", "104"]
    parts = [SplitConfig(dataset=ShardsConfig(path=str(tmp_path / "shards")), part=part) for part in ("train", "val")]
    sizes = [len(part.build()) for part in parts]
    assert all(sizes)
    assert sum(sizes) == 5


def test_images_stay_in_their_part_when_shards_are_written_again(coco: CocoConfig, tmp_path: Path) -> None:
    corrected = replace(coco, vocabulary=VocabularyConfig(phrases={"cat": "kitten"}))
    drawn = []
    for dataset, folder in ((coco, "first"), (corrected, "second")):
        written(dataset, tmp_path / folder)
        split = SplitConfig(dataset=ShardsConfig(path=str(tmp_path / folder)), part="val", fraction=0.4)
        drawn.append([replace(split, seed=seed).build().indices.tolist() for seed in range(4)])
    assert drawn[0] == drawn[1]


def test_image_files_are_kept_as_they_are(coco: CocoConfig, tmp_path: Path) -> None:
    shards = written(coco, tmp_path / "shards")
    for index, name in enumerate(("0.jpg", "1.jpg", "2.jpg", "3.png", "4.jpg")):
        assert shards.image_bytes(index) == (tmp_path / name).read_bytes()


def test_rotated_images_of_yolo_become_png(tmp_path: Path) -> None:
    """YOLO applies the EXIF orientation, and the reader of shards does not."""
    from vg.data.detection.yolo import YoloConfig

    (tmp_path / "data").mkdir()
    dataset = YoloConfig.miniature(tmp_path / "data")
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "data" / "images" / "0.png"
    image = Image.open(file)
    image.crop((0, 0, 64, 48)).save(file, exif=exif)
    shards = written(dataset, tmp_path / "shards")
    assert_same(shards, dataset.build())
    assert {tuple(size) for size in shards.image_sizes(0).tolist()} == {(64, 48), (64, 64)}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("captions", ["phrases", "whole"])
def test_captions(captions: Any, format: ShardFormat, tmp_path: Path) -> None:
    """Equal words in two spans, spans of several words apart, cases, and a phrase without boxes that are used."""
    Image.new("RGB", (60, 50)).save(tmp_path / "a.jpg")
    text = "A man  and a man, a red\nor green ball"
    spans = [[[0, 5]], [[11, 16]], [[18, 23], [33, 37]], [[27, 32]], [[0, 5]], [[0, 1]]]
    boxes = [
        [[1, 1, 9, 9]],
        [[5, 5, 9.5, 9], [1, 2, 3, 4]],
        [2, 2, 8, 8],
        [90, 90, 99, 99],
        [4, 4, 8, 8],
        [1, 1, 70, 9],
    ]
    regions = [{"bbox": box, "tokens_positive": span} for box, span in zip(boxes, spans, strict=True)]
    line = {"filename": "a.jpg", "height": 50, "width": 60, "grounding": {"caption": text, "regions": regions}}
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(line)] * 2))
    dataset = OdvgConfig(path=str(tmp_path / "a.jsonl"), captions=captions)
    shards = written(dataset, tmp_path / "shards", format, captions=captions)
    assert_same(shards, dataset.build())
    if captions == "whole":
        assert "A man (2)" not in shards.load(0, 0).phrases
        assert "a man (2)" in shards.load(0, 0).phrases
        merged = ShardsConfig(path=str(tmp_path / "shards")).build()
        expected = replace(dataset, captions="phrases").build()
        assert merged.load(0, 0).phrases == expected.load(0, 0).phrases


def test_lines_of_classes_and_of_captions_in_one_file(tmp_path: Path) -> None:
    Image.new("RGB", (60, 50)).save(tmp_path / "a.jpg")
    image = {"filename": "a.jpg", "height": 50, "width": 60}
    lines = [
        {**image, "detection": {"instances": [{"bbox": [1, 1, 9, 9], "label": 1, "category": "cat"}]}},
        {**image, "grounding": {"caption": "a dog", "regions": [{"bbox": [1, 1, 9, 9], "phrase": "a dog"}]}},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "label_map.json").write_text('{"0": "dog", "1": "cat"}')
    dataset = OdvgConfig(path=str(tmp_path / "a.jsonl"), label_map=str(tmp_path / "label_map.json"))
    shards = written(dataset, tmp_path / "shards")
    assert_same(shards, dataset.build())
    assert shards.num_classes is None
    assert shards.category_ids is None


@pytest.mark.parametrize("format", FORMATS)
def test_expressions_keep_their_words_types_and_images_side_by_side(format: ShardFormat, tmp_path: Path) -> None:
    """Odd white space, absent objects, several objects, and rows of one image that are not neighbors."""
    for name in "ab":
        Image.new("RGB", (60, 50)).save(tmp_path / f"{name}.png")
    box = [1, 2, 10, 20]
    rows = [
        {"file_name": f"{'ab'[i % 2]}.png", "ann_id": i, "sent": sent, "boxes": boxes, "kinds": ["relation"]}
        for i, (sent, boxes) in enumerate(
            [("the  MAN", [box]), ("no\tdog", []), ("both", [box, box]), ("The man", [box])]
        )
    ]
    (tmp_path / "mini_val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = RefcocoConfig(path=str(tmp_path / "mini_val.jsonl"), split="val", image_root=str(tmp_path))
    shards = written(dataset, tmp_path / "shards", format)
    assert_same(shards, dataset.build())
    assert shards.image_groups(0).tolist() == [0, 0, 1, 1]
    assert shards.shard_ends().tolist() == [2, 4], "samples of an image are in one shard"


def test_images_in_tables_keep_their_format(tmp_path: Path) -> None:
    import datasets

    buffer = io.BytesIO()
    Image.new("RGB", (60, 50), "red").save(buffer, "JPEG")
    row = {"question_id": "1", "file_name": "a.jpg", "answer": ["a man"], "bbox": [1.0, 2.0, 10.0, 20.0]}
    rows = [row | {"image": {"bytes": buffer.getvalue(), "path": "a.jpg"}}]
    features = {name: datasets.Value("string") for name in ("question_id", "file_name")}
    features |= {"answer": datasets.Sequence(datasets.Value("string"))}
    features |= {"bbox": datasets.Sequence(datasets.Value("float64")), "image": datasets.Image()}
    datasets.Dataset.from_list(rows, datasets.Features(features)).save_to_disk(str(tmp_path / "table"))
    dataset = RefcocoConfig(path=str(tmp_path / "table"), split="val")
    shards = written(dataset, tmp_path / "shards")
    assert_same(shards, dataset.build())
    assert shards.image_bytes(0) == buffer.getvalue()


def test_a_part_of_a_dataset(coco: CocoConfig, tmp_path: Path) -> None:
    dataset = SplitConfig(dataset=replace(coco, vocabulary=VocabularyConfig(only=["cat"])), part="train", fraction=0.4)
    shards = written(dataset, tmp_path / "shards", vocabulary=VocabularyConfig(only=["cat"]))
    assert_same(shards, dataset.build())
    assert shards.image_bytes(0).startswith(b"\xff\xd8"), "JPEG, not PNG"


def test_tar_is_a_webdataset(coco: CocoConfig, tmp_path: Path) -> None:
    written(coco, tmp_path / "shards")
    with tarfile.open(tmp_path / "shards" / "000000.tar") as tar:
        names = tar.getnames()
        assert names == [f"000000000{i}.{suffix}" for i in range(3) for suffix in ("jpg", "json")]
        line = json.load(tar.extractfile(names[1]))  # type: ignore[arg-type]
        assert {"id", "filename", "height", "width", "detection"} <= line.keys()
        assert {(member.mtime, member.uid, member.uname) for member in tar.getmembers()} == {(0, 0, "")}


def test_parquet_is_read_by_datasets(coco: CocoConfig, tmp_path: Path) -> None:
    import datasets

    shards = written(coco, tmp_path / "shards", "parquet")
    files = [str(tmp_path / "shards" / shard.file) for shard in shards.index.shards]
    table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert tuple(table.column_names) == COLUMNS
    assert [row["id"] for row in table] == [shards.load(index, 0).id for index in range(len(shards))]
    for index, row in enumerate(table):
        assert np.array_equal(np.asarray(row["image"].convert("RGB")), shards.load(index, 0).image)
        assert (row["height"], row["width"]) == shards.load(index, 0).image.shape[:2]
        assert json.loads(row["annotation"])["id"] == row["id"]


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_bytes_in_every_run(format: ShardFormat, tmp_path: Path) -> None:
    for run in "ab":
        write_shards(ShapesConfig(split="val", size=7, image_size=64), tmp_path / run, format, 3, workers=ord(run) % 2)
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert len(names) == 5
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("format", FORMATS)
def test_data_workers_read_the_same_samples(start: str, format: ShardFormat, coco: CocoConfig, tmp_path: Path) -> None:
    """Each opens the shards itself, although the main process has opened one before."""
    shards = written(coco, tmp_path / "shards", format)
    shards.load(0, 0)
    loader = DataLoader(
        GroundingDataset(shards), batch_size=2, num_workers=2, collate_fn=list, multiprocessing_context=start
    )
    samples = [sample for batch in loader for sample in batch]
    expected = [replace(checked(shards.load(i, 0)), seed=(0, 0, i)) for i in range(len(shards))]
    np.testing.assert_equal(list(map(as_dict, samples)), list(map(as_dict, expected)))


def test_a_pickled_source_has_no_copy_of_the_index(coco: CocoConfig, tmp_path: Path) -> None:
    shards = written(coco, tmp_path / "shards")
    shards.load(0, 0)
    copy = pickle.dumps(shards)
    assert shards._rows.tobytes() not in copy
    assert_same(pickle.loads(copy), shards)
