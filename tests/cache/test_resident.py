"""Features in the memory of the device: the same batches, weights and resumed runs as by the loader of files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.cache.feature_data import cached_config
from tests.conftest import HEAD, run_script
from tests.training.synchronizations import synchronizations
from tests.training.test_resume import assert_same, assert_same_runs, interrupt, stop_in_step
from vg.cache import format as cache_format
from vg.cache import resident
from vg.cache.build import build_cache
from vg.cache.resident import ResidentFeatures, resident_features
from vg.config import RunConfig, dump_config
from vg.errors import BadSampleError, CacheError, ConfigError
from vg.training.data import TrainingData
from vg.training.trainer import Trainer
from vg.types import EncodedBatch

VIEWS = ["plain", "flip", "crop"]
SCRIPT = """
import sys
from vg.config import load_config
from vg.distributed import shut_down
from vg.training.trainer import Trainer

for name in sys.argv[1:]:
    Trainer(load_config(name)).fit()
shut_down()
"""


def mixture(folder: Path, weights: list[float]) -> dict[str, Any]:
    datasets = [
        {"name": "refcoco", "path": str(folder / "data"), "split": split} for split in ("train", "val", "train")
    ]
    return {"name": "mixture", "datasets": datasets, "weights": weights}


def training_data(config: RunConfig, is_resident: bool, evaluations: Sequence[Any] = ()) -> TrainingData:
    assert config.data.cache
    config.data.cache.resident = is_resident
    data = TrainingData(config, config.model.build(), Accelerator(), evaluations)
    assert isinstance(data.dataset, ResidentFeatures) == is_resident
    return data


def as_values(value: Any) -> Any:
    """Return the content of a batch as nested dictionaries and lists."""
    if hasattr(value, "_asdict"):
        return as_values(value._asdict())
    if isinstance(value, (list, tuple)):
        return [as_values(entry) for entry in value]
    if isinstance(value, dict) or hasattr(value, "__dataclass_fields__"):
        return {key: as_values(entry) for key, entry in (value if isinstance(value, dict) else vars(value)).items()}
    return value


def assert_resident_equals_loader(config: RunConfig) -> None:
    batches = []
    for is_resident in (False, True):
        data = training_data(config, is_resident)
        batches.append([as_values(batch) for epoch in range(3) for step in data.steps(epoch, 0) for batch in step])
    assert_same(*batches)


@pytest.mark.parametrize("expressions_per_image", [1, 3])
@pytest.mark.parametrize("views", [["plain"], VIEWS])
@pytest.mark.parametrize("weights", [None, [1, 2, 0.4]])
def test_batches_equal_those_of_the_loader(
    folder: Path, expressions_per_image: int, views: list[str], weights: list[float] | None
) -> None:
    data: dict[str, Any] = {"train": mixture(folder, weights)} if weights else {}
    data["expressions_per_image"] = expressions_per_image
    config = cached_config(folder, {"views": views}, data=data)
    build_cache(config)
    batches: list[list[Any]] = [
        [
            as_values(batch)
            for epoch, done in ((0, 0), (1, 0), (1, 8), (2, 4), (3, 0))
            for step in loaded.steps(epoch, done)
            for batch in step
        ]
        for loaded in (training_data(config, False), training_data(config, True))
    ]
    assert len(batches[0]) >= 5 * 3 - 3
    assert_same(batches[0], batches[1])


def test_samples_that_share_an_image_with_the_evaluation_are_dropped(folder: Path) -> None:
    config = cached_config(folder, {}, data={"drop_overlap": True})
    build_cache(config)
    evaluated = config.data.train.build()
    keys = evaluated.image_keys()[:1]  # type: ignore[union-attr]
    evaluated.image_keys = lambda: keys  # type: ignore[union-attr]
    found = []
    for is_resident in (False, True):
        with pytest.warns(UserWarning, match="they are dropped from training"):
            data = training_data(config, is_resident, [evaluated])
        found.append([as_values(batch) for step in data.steps(1, 0) for batch in step])
        assert len(data.dataset) == 15 - 3
    assert_same(found[0], found[1])


def test_bad_samples_are_skipped_as_by_the_loader(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "data" / "train3.png").write_bytes(b"not an image")
    data = {"bad_samples": "skip", "train": mixture(folder, [1, 1, 0.5])}
    config = cached_config(folder, {}, data=data)
    build_cache(config)
    found, warned = [], []
    for is_resident in (False, True):
        caplog.clear()
        loaded = training_data(config, is_resident)
        found.append([as_values(batch) for epoch in range(3) for step in loaded.steps(epoch, 0) for batch in step])
        warned.append((loaded.dataset.bad.tolist(), len(caplog.records)))
    assert_same(found[0], found[1])
    assert warned[0] == warned[1]
    assert any(warned[0][0])
    config.data.bad_samples = "error"
    with pytest.raises(BadSampleError, match=r"data \(train\), sample \d+: was unusable when the cache was written"):
        list(training_data(config, True).steps(0, 0))


SETTINGS: dict[str, Any] = {
    "plain": {},
    "shared images, views, accumulated": {
        "data": {"expressions_per_image": 3},
        "cache": {"views": VIEWS},
        "train": {"accumulate": 2},
        "model": {"head": HEAD},
    },
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_twenty_steps_and_a_resumed_run_equal_those_of_the_loader(
    folder: Path, settings: dict[str, Any], workers: int
) -> None:
    train = {"epochs": 99, "max_steps": 20, "eval_every": 10, "save_every": 5, "ema": 0.9} | settings.get("train", {})

    def configured(name: str, is_resident: bool) -> RunConfig:
        return cached_config(
            folder,
            settings.get("cache", {}) | {"resident": is_resident},
            data={"workers": workers} | settings.get("data", {}),
            train=train | {"output": str(folder / name), "trackers": [], "log_every": 1},
            model=settings.get("model", {}),
        )

    build_cache(configured("loader", False))
    Trainer(configured("loader", False)).fit()
    stopped = configured("stopped", True)
    trainer = Trainer(stopped)
    assert isinstance(trainer.data.dataset, ResidentFeatures)
    stop_in_step(trainer, 8, interrupt)
    with pytest.raises(SystemExit):
        trainer.fit()
    resumed = Trainer(stopped, resume=True)
    assert resumed.progress.samples > 0  # within an epoch
    resumed.fit()
    assert_same_runs(folder / "loader", folder / "stopped")


def test_two_processes_equal_the_loader(folder: Path) -> None:
    build_cache(cached_config(folder, {"views": VIEWS}))
    (folder / "train.py").write_text(SCRIPT)
    for is_resident in (False, True):
        config = cached_config(
            folder,
            {"views": VIEWS, "resident": is_resident},
            data={"batch_size": 2},
            train={"epochs": 3, "output": str(folder / f"run_{is_resident}"), "trackers": [], "accumulate": 2},
        )
        (folder / f"{is_resident}.yaml").write_text(dump_config(config))
    (folder / "train.py").write_text(
        f"from vg.cache import format\nformat.FORMAT.update({cache_format.FORMAT})\n{SCRIPT}"
    )
    result = run_script(folder, "train.py", "False.yaml", "True.yaml")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("read from files (data.cache.resident=false)") == 1
    assert result.stdout.count("that are free in the memory of the CPU") == 1
    assert_same_runs(folder / "run_False", folder / "run_True")


def test_auto_depends_on_the_free_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = cached_config(folder, {})
    build_cache(config)
    cache = config.data.cache
    assert cache
    assert cache.resident == "auto"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    source = training_data(config, False).dataset.source
    needed = source.num_bytes  # type: ignore[union-attr]
    assert needed == sum(file.stat().st_size - 128 for file in source.folder.path.rglob("*.npy"))  # type: ignore[union-attr]
    for free, resident_setting, fits in (
        (8 * needed, "auto", True),
        (8 * needed - 2, "auto", False),
        (2 * needed, True, True),
        (80 * needed, False, False),
    ):
        monkeypatch.setattr(resident, "available_ram", lambda free=free: free)
        cache.resident = resident_setting  # type: ignore[assignment]
        trainer = Trainer(config, overwrite=True)
        assert isinstance(trainer.data.dataset, ResidentFeatures) == fits
        trainer.report.begin()
        printed = capsys.readouterr().out
        assert f"features: {needed / 1e6:.2f} MB" in printed
        assert ("read from files" in printed) != fits
        assert ("more than 0.25 of the" in printed) == (not fits and resident_setting == "auto")
    cache.resident = True
    monkeypatch.setattr(resident, "available_ram", lambda: 2 * needed - 2)
    with pytest.raises(ConfigError, match=r"data\.cache\.resident=true: the features take .* set it to auto or false"):
        Trainer(config, overwrite=True)


def test_a_gpu_is_filled_by_half(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = cached_config(folder, {})
    build_cache(config)
    data = training_data(config, False).dataset
    cache, needed = config.data.cache, data.source.num_bytes  # type: ignore[union-attr]
    assert cache
    cache.resident = "auto"
    monkeypatch.setattr(resident, "ResidentFeatures", lambda data, device, texts: device)
    for free, fits in ((2 * needed, True), (2 * needed - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * free))
        found, plan = resident_features(data, cache, SimpleNamespace(device=torch.device("cuda")))  # type: ignore[arg-type]
        assert (found is not data) == fits
        assert "in the memory of the GPU" in plan


def batch_without_values(config: RunConfig) -> EncodedBatch:
    """Return a batch of six samples on a device without values, which cannot be waited for."""
    data = training_data(config, True).dataset
    assert isinstance(data, ResidentFeatures)
    for owner, name in ((data, "image"), (data, "boxes"), (data, "phrase_ids"), *((x, "values") for x in data.texts)):
        setattr(owner, name, getattr(owner, name).to("meta"))
    data.device = torch.device("meta")
    with synchronizations() as found:
        batch = data.batch([data._load(index, 0) for index in range(6)])
    assert found == []
    assert all(tensor.is_meta for tensor in batch.tensors())
    return batch


def test_a_batch_is_made_without_waiting_for_the_device(folder: Path) -> None:
    config = cached_config(folder, {}, data={"expressions_per_image": 3})
    build_cache(config)
    batch = batch_without_values(config)
    assert len(batch.tensors()) == 4 + 2 * 6


def test_damaged_features_are_found_when_they_are_loaded(folder: Path) -> None:
    config = cached_config(folder, {})
    build_cache(config)
    cache = next((folder / "cache").glob("*train*"))
    for name in ("images/00001.npy", "texts/00001.npy"):
        file = cache / name
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CacheError, match=r"00001\.npy: the checksum of these features is wrong"):
            training_data(config, True)
        file.write_bytes(content)
    training_data(config, True)
