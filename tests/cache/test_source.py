"""Samples from a feature cache: views, groups by image, bad samples, mixtures, several processes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cache.feature_data import cached_config
from tests.conftest import run_script
from vg.cache import format as cache_format
from vg.cache.build import build_cache
from vg.cache.images import image_indices
from vg.cache.key import cache_folder
from vg.cache.source import CachedSource, collate_encoded
from vg.cache.views import ImageViews
from vg.config import RunConfig, dump_config
from vg.data.collate import Collator
from vg.data.dataset import RunDataset
from vg.data.detection.coco import CocoConfig
from vg.data.mirror import mirrored
from vg.data.samplers import ImageGroupedSampler
from vg.data.source import Provenance, Source
from vg.datasets import evaluation_dataset, training_dataset
from vg.errors import BadSampleError, CacheError, DataError
from vg.training.data import training_sampler
from vg.training.trainer import Trainer
from vg.types import EncodedSample, Sample

BUILD = (
    "from vg.cache.build import build_cache; from vg.config import load_config; build_cache(load_config('config.yaml'))"
)


def cached_data(config: RunConfig) -> RunDataset:
    return training_dataset(config, config.model.build(), evaluations=[])


def source_of(config: RunConfig) -> Any:
    return cached_data(config).source


def by_view(source: CachedSource, index: int) -> dict[int, EncodedSample]:
    """Return view -> sample, from the first epoch with that view."""
    samples = [source.load(index, epoch) for epoch in range(40)]
    return {sample.image_key[1] % source.folder.num_views: sample for sample in reversed(samples)}


def test_every_view_has_its_own_expression_box_and_features(folder: Path) -> None:
    views = ["plain", "flip", "crop", "flip_crop"]
    config = cached_config(folder, {"views": views})
    build_cache(config)
    source, pixels = source_of(config), config.data.train.build()
    model = config.model.build().eval()
    image_views = ImageViews(pixels, views, Collator(model.image_spec, model.text_spec), skip=False)
    cropped = 0
    for index in range(len(source)):
        plain, flip, crop, both = (by_view(source, index)[view] for view in range(4))
        sample = pixels.load(index, 0)
        height, width = sample.image.shape[:2]
        left, top, right, bottom = sample.boxes[0].tolist()
        assert (plain.phrase, plain.size) == (sample.phrases[0], (height, width))
        assert plain.box.tolist() == [left, top, right, bottom]
        assert flip.phrase == both.phrase == mirrored(plain.phrase)
        np.testing.assert_allclose(flip.box, [width - right, top, width - left, bottom], atol=1e-3)
        cropped += crop.size != plain.size
        for view in (crop, both):
            assert view.id == plain.id
            np.testing.assert_allclose(view.box[2:] - view.box[:2], [right - left, bottom - top], atol=1e-3)
            assert (view.box >= 0).all()
            assert (view.box[2:] <= view.size[::-1]).all()
        images = image_views.batch([image_views[int(image_indices(pixels)[index])]])  # V views
        with torch.no_grad():
            tokens, _ = model.encode_images(images.normalized())
            words = model.encode_text(image_views.collate.texts.arrays([flip.phrase], ["flip"]).tensors())[0][0]
        for view, wanted in zip((plain, flip, crop, both), tokens, strict=True):
            np.testing.assert_allclose(view.image, wanted, rtol=2**-10, atol=1e-4)
        np.testing.assert_allclose(flip.text, words, rtol=2**-10, atol=1e-4)
    assert cropped > len(source) / 2
    assert {sample.phrase for sample in by_view(source, 0).values()} == {"left circle again", "right circle again"}


def test_evaluation_reads_plain_views(folder: Path) -> None:
    config = cached_config(folder, {"views": ["flip", "crop"]})
    build_cache(config)
    (evaluated,) = Trainer(config).evaluator.datasets
    assert evaluated.data.source.folder.key["views"] == ["plain"]


@pytest.mark.parametrize("cache", [{}, None])
def test_evaluation_data_without_a_phrase_of_the_training_data_is_a_warning(
    cache: dict[str, Any] | None, folder: Path
) -> None:
    config = cached_config(folder, cache)
    file = folder / "data" / "val.jsonl"
    lines = map(json.loads, file.read_text().splitlines())
    file.write_text("\n".join(json.dumps(line | {"sent": "raccoon"}) for line in lines))
    if cache is not None:
        build_cache(config)
    model = config.model.build()
    evaluated = evaluation_dataset(config.data.eval_datasets()[""], config.data, model).source
    with pytest.warns(UserWarning, match=r"evaluated on 'raccoon': not one of these phrases is in the training data"):
        training_dataset(config, model, [evaluated])


def test_samples_of_an_image_share_a_view_that_varies_with_the_epoch(folder: Path) -> None:
    config = cached_config(folder, {"views": ["plain", "flip"]})
    build_cache(config)
    source = source_of(config)
    shown = []
    for epoch in range(8):
        samples = [source.load(index, epoch) for index in range(len(source))]
        assert len({sample.image_key for sample in samples}) == 5
        shown.append(tuple(sample.image_key[1] % 2 for sample in samples))
        sizes = source.image_sizes(epoch)
        assert [tuple(size) for size in sizes.tolist()] == [sample.size for sample in samples]
    assert len(set(shown)) > 4
    other = cached_config(folder, {"views": ["plain", "flip"]}, train={"seed": 1})
    assert [source_of(other).load(0, epoch).image_key for epoch in range(8)] != [
        source.load(0, epoch).image_key for epoch in range(8)
    ]


def test_sharing_images_in_a_batch_does_not_change_the_gradients(folder: Path) -> None:
    config = cached_config(folder, {}, data={"batch_size": 6, "expressions_per_image": 3})
    assert config.data.cache is not None
    build_cache(config)
    model, source = config.model.build(), source_of(config)
    order = list(training_sampler(config, source))
    assert sorted(order) == list(range(15))
    batch = collate_encoded([source.load(index, 0) for index in order[:6]])
    assert len(batch.features.image) == 2
    assert len(batch) == len(batch.features.text) == 6

    def gradients(batches: list[Any]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for item in batches:
            (sum(model.loss(model(item), item).values()) * len(item) / 6).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    single = [collate_encoded([source.load(index, 0)]) for index in order[:6]]
    torch.testing.assert_close(gradients([batch]), gradients(single), rtol=1e-3, atol=1e-6)


class GroupedByImage(Source):
    """Seven samples of a first image, one of a second, four of a third."""

    provenance = Provenance("grouped", "train")

    def __len__(self) -> int:
        return 12

    def load(self, index: int, epoch: int) -> Sample:
        raise NotImplementedError

    def image_groups(self, epoch: int) -> np.ndarray:
        return np.array([0, 0, 2, 0, 1, 2, 0, 0, 2, 0, 0, 2])


def test_samples_of_an_image_are_grouped(tmp_path: Path) -> None:
    sampler = ImageGroupedSampler(GroupedByImage(), seed=3, group_size=4)
    images = GroupedByImage().image_groups(0)
    orders = []
    for epoch in range(6):
        sampler.begin_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(12))
        assert order == list(sampler)
        shown = images[order]
        assert 3 <= np.count_nonzero(np.diff(shown)) + 1 <= 4  # 7 = 4 + 3, 1, 4; the two may be neighbors
        orders.append(tuple(order))
    assert len(set(orders)) == 6
    with pytest.raises(DataError, match=r"does not group its samples by image, as data\.expressions_per_image"):
        ImageGroupedSampler(CocoConfig.miniature(tmp_path).build(), seed=0, group_size=2)


def test_bad_samples_are_recorded(folder: Path) -> None:
    (folder / "data" / "train3.png").write_bytes(b"not an image")
    config = cached_config(folder, {})
    with pytest.raises(BadSampleError, match=r"train3\.png cannot be read"):
        build_cache(config)
    config = cached_config(folder, {}, data={"bad_samples": "skip", "workers": 1})
    build_cache(config)
    data = cached_data(config)
    ids = {data[index].id for index in range(len(data))}
    assert len(ids) == 12
    assert data.bad.sum() == 3
    config.data.bad_samples = "error"
    data = cached_data(config)
    with pytest.raises(BadSampleError, match=r"unusable when the cache was written; fix it.*data\.bad_samples=skip"):
        [data[index] for index in range(15)]


def test_too_long_an_expression_is_found_before_anything_is_encoded(folder: Path) -> None:
    config = cached_config(folder, {})
    lengths = [len(config.data.train.build().load(index, 0).phrases[0]) for index in range(15)]
    assert max(lengths) > min(lengths)
    config.model.max_tokens = 6  # type: ignore[union-attr]
    with pytest.raises(BadSampleError, match=r"train.*the expression has \d+ tokens"):
        build_cache(config)
    config.data.bad_samples = "skip"
    build_cache(config)
    data = cached_data(config)
    ids = {data[index].id for index in range(len(data))}
    assert len(ids) + data.bad.sum() == 15
    assert 0 < data.bad.sum() < 15


def test_a_mixture_reads_a_cache_of_each_dataset(folder: Path) -> None:
    datasets = [{"name": "refcoco", "path": str(folder / "data"), "split": split} for split in ("train", "val")]
    mixture = {"name": "mixture", "datasets": datasets, "weights": [1, 2]}
    config = cached_config(folder, {}, data={"train": mixture, "expressions_per_image": 3})
    build_cache(config)
    assert len(list((folder / "cache").iterdir())) == 2  # the evaluation reads that of the second dataset
    source = source_of(config)
    assert len(source) == 15 + 12
    order = list(training_sampler(config, source))
    images = source.image_groups(0)[order]
    assert np.count_nonzero(np.diff(images)) + 1 == 5 + 2 * 2
    assert source.load(order[0], 0).id.startswith("data/")
    Trainer(config).fit()


def test_a_sample_without_exactly_one_box_is_an_error(folder: Path) -> None:
    scenes = {"name": "shapes", "split": "val", "size": 3, "view": "detection"}
    with pytest.raises(DataError, match=r"has \d phrases and \d+ boxes; a feature cache is for models"):
        build_cache(cached_config(folder, {}, data={"train": scenes}))


def test_images_that_change_cause_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    scenes = {"name": "shapes", "split": "train", "size": 3}
    config = cached_config(folder, {}, data={"train": scenes})
    build_cache(config)
    assert "has new images in every epoch; the cache keeps those of the first" in caplog.text
    assert source_of(config).load(0, 1).id == "shapes/train/000000/0"
    caplog.clear()
    build_cache(cached_config(folder, {"folder": str(folder / "other")}))
    assert not caplog.text


def test_features_beyond_half_precision_are_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vg.models.rec.model import RecModel

    encode = RecModel.encode_images
    monkeypatch.setattr(
        RecModel, "encode_images", lambda self, images: (encode(self, images)[0] * 1e6, encode(self, images)[1])
    )
    with pytest.raises(CacheError, match="which exceeds the range of float16"):
        build_cache(cached_config(folder, {}))


def test_a_spawned_worker_opens_the_files_itself(folder: Path) -> None:
    config = cached_config(folder, {})
    build_cache(config)
    source = source_of(config)
    copy = pickle.loads(pickle.dumps(source))
    assert not copy._arrays
    np.testing.assert_array_equal(copy.load(4, 0).image, source.load(4, 0).image)


def test_two_processes_write_what_one_writes(folder: Path) -> None:
    config = cached_config(folder, {})
    build_cache(config)
    other = cached_config(folder, {"folder": str(folder / "other")})
    (folder / "config.yaml").write_text(dump_config(other))
    (folder / "build.py").write_text(
        f"from vg.cache import format\nformat.FORMAT.update({cache_format.FORMAT})\n{BUILD}"
    )
    result = run_script(folder, "build.py")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("to be written") == 1
    files = sorted((folder / "cache").rglob("*.npy"))
    assert len(files) == (3 + 2) + (1 + 2)  # images and expressions of both datasets
    for file in files:
        ours = np.load(folder / "other" / file.relative_to(folder / "cache"))
        np.testing.assert_allclose(ours, np.load(file), rtol=2e-3, atol=1e-4)
    assert len(source_of(other)) == 15


def test_the_key_of_a_cache_does_not_change_with_the_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that exist are found by this digest; a renamed setting or entry would make all of them stale."""
    for name, value in (("images", 256), ("expressions", 4096)):
        monkeypatch.setitem(cache_format.FORMAT, name, value)
    monkeypatch.chdir(folder)
    config = cached_config(Path(), {"views": ["plain", "flip"]})
    model = config.model.build()
    key = {"vision": {"id": "v", "revision": "None", "weights": "1"}, "text": {"id": "t", "tokenizer": "2"}}
    monkeypatch.setattr(type(model), "feature_key", lambda self: key)
    cache = config.data.cache
    assert cache is not None
    source: Any = config.data.train.build()
    source.image_keys = lambda: ["image"] * 15  # those of files are absolute paths
    of_paths = Path("cache/data_train-64acc3381295aeeb")  # of a second version of the same images
    for path in (Path("cache/data_train-adb6704fe166355d"), of_paths):
        assert cache_folder(config.data.train, source, cache, cache.views, model).path == path  # type: ignore[arg-type]
        of_paths.mkdir(parents=True, exist_ok=True)
