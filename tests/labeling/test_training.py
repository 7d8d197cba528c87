"""`vg train` on the labels of `vg label`, and labels of images that are in shards."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.labeling.conftest import NUM_IMAGES
from tests.labeling.test_label import CLASSES, LOW, label, lines_of
from vg.cli import main
from vg.data.check.formats import detect_format
from vg.data.detection.odvg import OdvgConfig
from vg.data.expressions import CsvConfig
from vg.data.image_files import list_images
from vg.data.images import read_image
from vg.data.overlap import without_overlap
from vg.data.shards.labels import digest_of
from vg.data.shards.source import ShardsConfig
from vg.data.shards.write import write_shards
from vg.errors import DataError
from vg.labeling.plan import open_plan

RECIPE = Path(__file__).parents[2] / "configs/demo_grounding_dino.yaml"


def write_csv(photos: Path) -> CsvConfig:
    """Two expressions for each image."""
    rows = [f"{name},{word},10,10,300,300" for name in list_images(photos) for word in ("left thing", "right thing")]
    (photos / "table.csv").write_text("image,phrase,left,top,right,bottom\n" + "\n".join(rows) + "\n")
    return CsvConfig(path=str(photos / "table.csv"))


@pytest.fixture(params=["tar", "parquet"])
def shards(request: Any, photos: Path, tmp_path: Path) -> Path:
    write_shards(write_csv(photos), tmp_path / "shards", request.param, samples_per_shard=16)
    return tmp_path / "shards"


def train(data: dict[str, Any], output: Path) -> list[dict[str, Any]]:
    options = ["train.max_steps=2", "data.eval.size=2", "data.workers=0", "data.batch_size=2", "train.trackers=[]"]
    main(
        [
            "train",
            str(RECIPE),
            f"data.train={json.dumps(data)}",
            f"train.output={output}",
            "train.log_every=1",
            *options,
        ]
    )
    return [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]


def test_training_on_labels_of_files(detector: Path, photos: Path, tmp_path: Path) -> None:
    label(detector, photos, tmp_path / "labels", *CLASSES, *LOW, "--shard-size", 8)
    data = {"name": "odvg", "path": str(tmp_path / "labels"), "image_root": str(photos)}
    assert detect_format(tmp_path / "labels") == {"train": data}, "as vg check and vg finetune read them"
    assert sum("loss" in row for row in train(data, tmp_path / "run")) == 2


def test_training_on_labels_of_shards(detector: Path, photos: Path, shards: Path, tmp_path: Path) -> None:
    """An image with two expressions is labeled once, as its file is; nothing is copied."""
    out = tmp_path / "labels"
    label(detector, shards, out, *CLASSES, *LOW, "--batch-size", 1)
    lines = lines_of(out)
    assert [line["sample"] for line in lines] == list(range(0, 2 * NUM_IMAGES, 2))
    assert len(list(out.glob("*.jsonl"))) == 3, "as many as shards of images"
    label(detector, photos, tmp_path / "of_files", *CLASSES, *LOW, "--batch-size", 1)
    of_files = lines_of(tmp_path / "of_files")
    for line, of_file in zip(lines, of_files, strict=True):
        assert line["detection"] == of_file["detection"]
    config = ShardsConfig(path=str(shards), labels=str(out))
    source = config.build()
    assert len(source) == NUM_IMAGES
    assert source.num_classes == 2
    for index in (0, 7, NUM_IMAGES - 1):
        sample = source.load(index, 0)
        assert sample.phrases == CLASSES[1:]
        assert len(sample.boxes) == len(lines[index]["detection"]["instances"])
        np.testing.assert_array_equal(sample.image, read_image(photos / of_files[index]["filename"], "it"))
        assert tuple(source.image_sizes(0)[index]) == sample.image.shape[:2]
    assert source.shard_ends().tolist() == [8, 16, 20]
    assert len(set(source.image_groups(0).tolist())) == NUM_IMAGES
    assert source.image_keys() == ShardsConfig(path=str(shards)).build().image_keys()[::2]
    assert pickle.loads(pickle.dumps(source)).image_keys() == source.image_keys()
    assert source.fingerprint() != ShardsConfig(path=str(shards)).build().fingerprint()
    data = {"name": "shards", "path": str(shards), "labels": str(out)}
    assert detect_format(out) == {"train": data}
    assert sum("loss" in row for row in train(data, tmp_path / "run")) == 2


def test_labels_of_other_images(detector: Path, photos: Path, tmp_path: Path) -> None:
    write_shards(write_csv(photos), tmp_path / "shards", samples_per_shard=16)
    label(detector, photos, tmp_path / "labels", *CLASSES)
    with pytest.raises(DataError, match=r"labels, 000000\.jsonl, line 1: no index of a sample .*; label the images"):
        ShardsConfig(path=str(tmp_path / "shards"), labels=str(tmp_path / "labels")).build()
    label(detector, tmp_path / "shards", tmp_path / "other", *CLASSES)
    (photos / "table.csv").write_text("\n".join((photos / "table.csv").read_text().splitlines()[:9]) + "\n")
    write_shards(CsvConfig(path=str(photos / "table.csv")), tmp_path / "few", samples_per_shard=16)
    with pytest.raises(DataError, match=r"other has labels of another dataset than .*few"):
        ShardsConfig(path=str(tmp_path / "few"), labels=str(tmp_path / "other")).build()


def test_labels_of_as_many_other_images(detector: Path, photos: Path, tmp_path: Path) -> None:
    write_shards(write_csv(photos), tmp_path / "shards", samples_per_shard=16)
    label(detector, tmp_path / "shards", tmp_path / "labels", *CLASSES)
    names = list_images(photos)
    read_image(photos / names[0], "it")
    (photos / names[0]).write_bytes((photos / names[1]).read_bytes())
    write_shards(write_csv(photos), tmp_path / "other", samples_per_shard=16)
    with pytest.raises(DataError, match=r"labels has labels of another dataset than .*other, of .*shards; label its"):
        ShardsConfig(path=str(tmp_path / "other"), labels=str(tmp_path / "labels")).build()


def test_overlap_of_labels_of_shards(photos: Path, tmp_path: Path) -> None:
    """The keys of images are those of the lines, not those of all samples; lines without boxes are no samples."""
    for number, name in enumerate(list_images(photos)):
        (photos / name).rename(photos / f"{number + 1:012d}.png")
    config = write_csv(photos)
    write_shards(config, tmp_path / "shards")
    (tmp_path / "labels").mkdir()
    line = {"filename": "a", "id": "a", "grounding": {"caption": "a dog", "regions": []}}
    lines = [json.dumps({**line, "sample": sample}) + "\n" for sample in range(0, 2 * NUM_IMAGES, 2)]
    (tmp_path / "labels/000000.jsonl").write_text("".join(lines))
    source = ShardsConfig(path=str(tmp_path / "shards"), labels=str(tmp_path / "labels")).build()
    (photos / "table.csv").write_text("\n".join((photos / "table.csv").read_text().splitlines()[:3]) + "\n")
    with pytest.warns(UserWarning, match="1 of 20 training samples"):
        assert len(without_overlap(source, [config.build()], True)) == NUM_IMAGES - 1
    digest = digest_of(ShardsConfig(path=str(tmp_path / "shards")).build().fingerprint(), "caption")
    (tmp_path / "labels/labels.json").write_text(json.dumps({"shards": 1, "names": digest, "captions": "caption"}))
    with pytest.raises(DataError, match=r"labels has no label to train on; label the images with a lower --threshold"):
        ShardsConfig(path=str(tmp_path / "shards"), labels=str(tmp_path / "labels")).build()


def test_captions_in_shards(photos: Path, tmp_path: Path) -> None:
    """Every caption of an image is labeled."""
    region = {"bbox": [0, 0, 9, 9], "phrase": "dog", "tokens_positive": [[2, 5]]}
    rows = [
        {"filename": name, "height": 1, "width": 1, "grounding": {"caption": f"a dog {i}", "regions": [region]}}
        for name in list_images(photos)[:3]
        for i in range(2)
    ]
    for row in rows:
        row["height"], row["width"] = read_image(photos / str(row["filename"]), "it").shape[:2]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = OdvgConfig(path=str(tmp_path / "a.jsonl"), image_root=str(photos), captions="whole")
    write_shards(config, tmp_path / "shards", samples_per_shard=4)
    plan = open_plan(str(tmp_path / "shards"), "grounding.caption", None, 1000)
    assert [image.caption for shard in range(len(plan)) for image in plan.images(shard)] == ["a dog 0", "a dog 1"] * 3
