"""Mixtures of datasets, and images that training shares with evaluation."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.data.detection.detection_files import REAL, write_coco, write_image
from vg.config import parse_config
from vg.data.detection.coco import CocoConfig
from vg.data.detection.vocabulary import VocabularyConfig
from vg.data.mixture import Mixture, MixtureConfig
from vg.data.overlap import without_overlap
from vg.data.refcoco.source import RefcocoConfig
from vg.data.source import Provenance, Source, checked
from vg.data.subset import Subset
from vg.data.synthetic.shapes import ShapesConfig
from vg.errors import BadSampleError, ConfigError, DataError
from vg.types import Sample


class Indices(Source[Sample]):
    """Samples whose ids are their index and the epoch for which they were loaded."""

    def __init__(self, name: str, length: int, keys: list[str] | None = None):
        self.provenance = Provenance(name, "train")
        self.length = length
        self.keys = keys if keys is not None else [f"{name}{index}" for index in range(length)]

    def __len__(self) -> int:
        return self.length

    def load(self, index: int, epoch: int) -> Sample:
        if index == 99:
            raise BadSampleError("sample 99 is bad")
        return Sample(
            f"{index}@{epoch}",
            np.zeros((4, 4, 3), np.uint8),
            ("x",),
            np.zeros((0, 4), np.float32),
            np.zeros(0, np.int64),
        )

    def image_sizes(self, epoch: int) -> np.ndarray:
        return np.stack([np.arange(self.length), np.full(self.length, 7)], axis=1)

    def image_keys(self) -> list[str]:
        return self.keys


def ids(mixture: Mixture, epoch: int) -> list[str]:
    return [mixture.load(index, epoch).id for index in range(len(mixture))]


def test_every_sample_once_by_default():
    mixture = Mixture([Indices("a", 3), Indices("b", 2)])
    expected = [f"a/train/{index}@5" for index in range(3)] + ["b/train/0@5", "b/train/1@5"]
    assert ids(mixture, 5) == expected
    assert mixture.provenance.data == "a (train) + b (train)"


def test_weights_are_passes_per_epoch():
    mixture = Mixture([Indices("a", 10), Indices("b", 4), Indices("c", 4)], [0.3, 2, 1.5])
    assert len(mixture) == 3 + 8 + 6
    assert mixture.provenance.data == "a (train) x 0.3 + b (train) x 2 + c (train) x 1.5"
    seen: Counter[str] = Counter()
    for epoch in range(10):
        names = [id.split("@")[0] for id in ids(mixture, epoch)]
        assert Counter(name.split("/")[0] for name in names) == {"a": 3, "b": 8, "c": 6}
        assert set(Counter(name for name in names if name[0] == "b").values()) == {2}
        assert set(Counter(name for name in names if name[0] == "c").values()) <= {1, 2, 3}
        seen.update(names)
    assert {seen[f"a/train/{index}"] for index in range(10)} == {3}, "all equally often in the long run"
    assert {seen[f"c/train/{index}"] for index in range(4)} == {15}


def test_a_repeated_sample_is_loaded_for_another_epoch():
    mixture = Mixture([Indices("b", 2)], [2])
    epochs = [[id.split("@")[1] for id in ids(mixture, epoch)] for epoch in range(2)]
    assert epochs == [["0", "0", "1", "1"], ["2", "2", "3", "3"]]
    scenes = Mixture([ShapesConfig(size=2, image_size=64).build()], [2])
    assert len({scenes.load(index, epoch).image.tobytes() for index in range(4) for epoch in range(2)}) == 8


def test_an_epoch_depends_on_its_index_only():
    sources = [Indices("a", 10), Indices("b", 4)]
    mixture = Mixture(sources, [0.35, 1])
    straight = [ids(mixture, epoch) for epoch in range(6)]
    assert ids(Mixture(sources, [0.35, 1]), 4) == straight[4]
    assert ids(mixture, 0) == straight[0]
    assert ids(Mixture(sources, [0.35, 1], seed=1), 0) != straight[0]


def test_image_sizes_follow_the_samples():
    mixture = Mixture([Indices("a", 10), Indices("b", 4)], [0.5, 2])
    for epoch in (0, 3):
        indices = [int(id.split("/")[2].split("@")[0]) for id in ids(mixture, epoch)]
        assert mixture.image_sizes(epoch)[:, 0].tolist() == indices
    with pytest.raises(DataError, match=r"shapes .* provides no image sizes"):
        Mixture([Indices("a", 2), ShapesConfig(size=2).build()]).image_sizes(0)


def test_ids_differ_for_datasets_of_one_name():
    mixture = Mixture([Indices("valid", 2), Indices("valid", 2), Indices("other", 1)])
    assert sorted(ids(mixture, 0)) == [
        *("other/train/0@0", "valid/train/0/0@0", "valid/train/0/1@0", "valid/train/1/0@0", "valid/train/1/1@0")
    ]


def test_a_small_weight_does_not_leave_out_a_dataset():
    mixture = Mixture([Indices("a", 1), Indices("b", 10)], [0.05, 0.5])
    assert Counter(id[0] for id in ids(mixture, 0)) == {"a": 1, "b": 5}


def test_errors():
    with pytest.raises(DataError, match="without datasets"):
        Mixture([])
    with pytest.raises(DataError, match="a mixture of 1 datasets has 2 weights"):
        Mixture([Indices("a", 2)], [1, 2])
    with pytest.raises(DataError, match=r"b \(train\) has no samples"):
        Mixture([Indices("a", 2), Indices("b", 0)])
    assert len(ids(Mixture([Indices("a", 2), Indices("b", 0)], [1, 0]), 0)) == 2
    with pytest.raises(BadSampleError, match=r"a \(train\): sample 99 is bad"):
        Mixture([Indices("a", 100)]).load(99, 0)
    with pytest.raises(IndexError, match="no item 2"):
        Mixture([Indices("a", 2)]).load(2, 0)


def test_in_a_configuration(tmp_path: Path):
    coco = {"name": "coco", "path": str(write_coco(tmp_path)), "vocabulary": {"negatives": 85}}
    values = {
        "model": {"name": "rec"},
        "data": {
            "train": {"name": "mixture", "datasets": [coco, {"name": "shapes", "size": 4}], "weights": [2, 0.5]},
            "eval": {"name": "shapes"},
        },
    }
    train = parse_config(values).data.train
    assert isinstance(train, MixtureConfig)
    assert train.datasets[0] == CocoConfig(path=coco["path"], vocabulary=VocabularyConfig(negatives=85))
    samples = [checked(train.build().load(index, 0)) for index in range(8)]
    assert len({sample.id for sample in samples}) == 5
    values["data"]["train"]["datasets"][0] = {"name": "coco", "pth": "x"}
    with pytest.raises(ConfigError, match=r"data\.train\.datasets\.0.*pth"):
        parse_config(values)
    values["data"]["train"] |= {"datasets": [dict(values["data"]["train"])]}
    with pytest.raises(ConfigError, match=r"data\.train\.datasets\.0.*'mixture'"):
        parse_config(values)


def test_overlap_causes_a_warning_and_can_be_dropped():
    train = Indices("a", 6, ["p", "p", "q", "r", "s", "p"])
    evaluations = [Indices("v", 3, ["p", "p", "z"]), Indices("w", 1, ["s"]), ShapesConfig(split="val").build()]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert without_overlap(train, evaluations, drop=False) is train
    first, second = (str(warning.message) for warning in seen)
    assert "3 of 6 training samples of a (train) have 1 of the 2 images that v (train) is evaluated on" in first
    assert "data.drop_overlap=true drops them" in first
    assert "1 of 6 training samples of a (train) have 1 of the 1 images that w" in second
    with pytest.warns(UserWarning, match="they are dropped from training"):
        kept = without_overlap(train, evaluations, drop=True)
    assert isinstance(kept, Subset)
    assert [kept.load(index, 1).id for index in range(len(kept))] == ["2@1", "3@1"]
    assert kept.image_sizes(0)[:, 0].tolist() == [2, 3]
    assert kept.provenance == train.provenance


def test_overlap_of_mixtures_and_no_overlap():
    sources = [Indices("a", 4, ["p", "q", "r", "s"]), Indices("b", 2, ["q", "t"])]
    evaluation = Mixture([Indices("v", 2, ["p", "q"])])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        kept = without_overlap(Mixture(sources, [1, 2], seed=3), [evaluation], drop=True)
    assert ["samples of a" in str(seen[0].message), "samples of b" in str(seen[1].message)] == [True, True]
    assert isinstance(kept, Mixture)
    assert (kept.weights, kept.seed) == ([1, 2], 3)
    assert [id.split("@")[0] for id in ids(kept, 0)] == ["a/train/2", "a/train/3", "b/train/1", "b/train/1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shapes = ShapesConfig().build()
        assert without_overlap(shapes, [evaluation], drop=True) is shapes
        assert without_overlap(sources[0], [Indices("v", 1, ["z"])], drop=True) is sources[0]
    with (
        pytest.warns(UserWarning, match="dropped"),
        pytest.raises(DataError, match=r"a \(train\): every image is also in the evaluation data"),
    ):
        without_overlap(sources[0], [sources[0]], drop=True)


def test_refcoco_and_coco_are_matched_by_the_id_of_the_image(tmp_path: Path):
    rows = [
        {"ann_id": 1, "sent": "a cat", "bbox": [1, 1, 9, 9], "file_name": "COCO_train2014_000000000025.jpg"},
        {"ann_id": 2, "sent": "a dog", "bbox": [1, 1, 9, 9], "file_name": "COCO_train2014_000000000139_7.jpg"},
        {"ann_id": 2, "sent": "the dog", "bbox": [1, 1, 9, 9], "file_name": "COCO_train2014_000000000139_7.jpg"},
    ]
    (tmp_path / "refs.json").write_text(json.dumps(rows))
    for image_id in (25, 139):
        write_image(tmp_path / "train2014" / f"COCO_train2014_{image_id:012d}.jpg")
    refcoco = RefcocoConfig(path=str(tmp_path / "refs.json"), image_root=str(tmp_path)).build()
    assert refcoco.image_keys() == ["coco/25", "coco/139", "coco/139"]
    assert refcoco.image_sizes(0).tolist() == [[40, 60]] * 3

    document = json.loads(write_coco(tmp_path / "coco").read_text())
    document["images"][2]["file_name"] = "000000000139.jpg"
    coco = CocoConfig(path=str(write_coco(tmp_path / "coco", document))).build()
    with pytest.warns(UserWarning, match="2 of 3 training samples .* have 1 of the 3 images that coco"):
        kept = without_overlap(refcoco, [coco], drop=True)
    assert [sample.phrases for sample in (kept.load(0, 0),)] == [("a cat",)]


@pytest.mark.skipif(not (REAL / "refcoco_annotations").exists(), reason="no shared/data beside the repository")
def test_the_real_overlap_of_refcoco_and_refcocog(tmp_path: Path):
    """634 of the 1,300 images of RefCOCOg's validation split (UMD) are in the training split of RefCOCO."""
    folder = REAL / "refcoco_annotations"
    val = RefcocoConfig(path=str(folder / "refcocog_umd_val.jsonl"), split="val", image_root=str(tmp_path)).build()
    image_ids = (folder / "refcoco_unc_train_image_ids.txt").read_text().split()
    train = Indices("refcoco", len(image_ids), [f"coco/{int(image_id)}" for image_id in image_ids])
    assert len(set(val.image_keys())) == 1300
    with pytest.warns(UserWarning, match="have 634 of the 1300 images"):
        kept = without_overlap(train, [val], drop=True)
    assert len(kept) == len(image_ids) - 634
