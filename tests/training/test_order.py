"""The samples of every global batch are the same for any number of processes and data workers, and after resuming."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator

from tests.training.test_resume import configured, interrupt, stop_in_step
from vg.config import RunConfig
from vg.data import samplers
from vg.data.mixture import Mixture
from vg.data.source import Provenance, Source
from vg.training.data import TrainingData
from vg.training.trainer import Trainer
from vg.types import Sample

MakeConfig = Callable[..., RunConfig]
Step = list[list[str]]  # ids of the samples of each batch of an optimizer step, in all processes


@dataclass
class Scenes(Source[Sample]):
    """Samples with images of different sizes; several share one."""

    name: str
    shard_sizes: list[int]

    def __post_init__(self) -> None:
        self.provenance = Provenance(self.name, "train")

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def image_groups(self, epoch: int) -> np.ndarray:
        return np.arange(len(self)) // 3

    def image_sizes(self, epoch: int) -> np.ndarray:
        group = self.image_groups(epoch)
        return np.stack([20 + group % 5, 20 + group % 7], axis=1)

    def load(self, index: int, epoch: int) -> Sample:
        height, width = self.image_sizes(epoch)[index]
        image = np.full((height, width, 3), zlib.crc32(f"{index} {epoch}".encode()) % 256, np.uint8)
        box = np.array([[1, 1, 9, 9]], np.float32)
        return Sample(f"{self.name}{index}", image, ("red square",), box, np.zeros(1, np.int64))


class ShardedScenes(Scenes):
    def shard_ends(self) -> np.ndarray:
        return np.cumsum(self.shard_sizes)


class Process(Accelerator):
    """One of several processes, which do not run."""

    def __init__(self, index: int, count: int):
        super().__init__(cpu=True)
        self.index, self.count = index, count

    num_processes = property(lambda self: self.count)
    process_index = property(lambda self: self.index)


@dataclass
class Built:
    """Settings of a dataset that is made by a test."""

    source: Source

    def build(self) -> Source:
        return self.source


SHARDS = [4, 1, 7, 0, 5, 3, 6, 2, 5, 4, 8]  # 45 samples in eleven shards, a prime


def mixture(*weights: float) -> Mixture:
    return Mixture([ShardedScenes("a", SHARDS), Scenes("b", [14])], weights)


CASES: dict[str, tuple[Callable[[], Source], dict[str, Any]]] = {
    "one shard": (lambda: Scenes("a", [45]), {}),
    "shards": (lambda: ShardedScenes("a", SHARDS), {}),
    "mixture": (lambda: mixture(1, 1), {}),
    "weights": (lambda: mixture(1.3, 0.4), {}),
    "aspect ratios": (lambda: mixture(1, 2.5), {"group_by_aspect_ratio": True}),
    "images": (lambda: mixture(0.7, 1), {"expressions_per_image": 3}),
}


@pytest.fixture
def make(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> MakeConfig:
    monkeypatch.setattr(samplers, "BLOCK", 3)

    def make(source: Source, processes: int, workers: int, **data: Any) -> RunConfig:
        config = tiny_config(data={"batch_size": 2, "workers": workers} | data, train={"accumulate": 4 // processes})
        config.data.train = Built(source)  # type: ignore[assignment]
        return config

    return make


def steps(config: RunConfig, processes: int, position: tuple[int, int], count: int) -> tuple[list[Step], Any]:
    """Return the next steps of a run of several processes, and the position after them: epoch and samples."""
    data = [TrainingData(config, config.model.build(), Process(index, processes), []) for index in range(processes)]
    found: list[Step] = []
    epoch, samples = position
    while True:
        for parts in zip(*(part.steps(epoch, samples) for part in data), strict=True):
            if len(found) == count:
                return found, (epoch, samples)
            batches = [batch for turn in zip(*parts, strict=True) for batch in turn]
            found.append([[target.id for target in batch.targets] for batch in batches])
            samples += data[0].samples_per_step
        epoch, samples = epoch + 1, 0


@pytest.mark.parametrize("name", CASES)
def test_ids_of_every_global_batch(make: MakeConfig, name: str) -> None:
    build, data = CASES[name]
    per_epoch = len(build()) // 8
    count = 2 * per_epoch + 2
    straight, end = steps(make(build(), 1, 0, **data), 1, (0, 0), count)
    assert [[len(batch) for batch in step] for step in straight] == [[2] * 4] * count
    for epoch in range(2):
        ids = [id for step in straight[epoch * per_epoch :][:per_epoch] for batch in step for id in batch]
        if name in ("one shard", "shards", "mixture"):
            assert len(set(ids)) == len(ids), "no sample twice in an epoch"
    assert straight[:per_epoch] != straight[per_epoch : 2 * per_epoch]

    assert steps(make(build(), 2, 2, **data), 2, (0, 0), count) == (straight, end)

    resumed: list[Step] = []
    position = (0, 0)
    for processes, workers, number in ((1, 2, per_epoch - 2), (4, 0, 5), (2, 1, count - per_epoch - 3)):
        part, position = steps(make(build(), processes, workers, **data), processes, position, number)
        resumed += part
    assert (resumed, position) == (straight, end)


def test_less_data_than_a_step(make: MakeConfig) -> None:
    """Full batches if there are any, otherwise repeated samples in several processes; one step per epoch."""
    seven = Scenes("a", [7])
    for processes, sizes in ((1, [2, 2, 2]), (2, [2, 2]), (4, [2, 2, 2, 2])):
        found, position = steps(make(seven, processes, 0), processes, (0, 0), 3)
        assert [[len(batch) for batch in step] for step in found] == [sizes] * 3
        assert position == (3, 0)


def test_a_changed_step_continues_at_the_sample(
    tiny_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """24 of 26 samples are steps of 8; after the first one, 18 samples are four steps of 4."""
    config = configured(tiny_config, tmp_path / "run")
    trainer = Trainer(config)
    seen = [target.id for step in trainer.data.steps(0, 0) for batch in step for target in batch.targets]
    stop_in_step(trainer, 1, interrupt)
    with pytest.raises(SystemExit):
        trainer.fit()
    config.train.accumulate = 1
    resumed = Trainer(config, resume=True)
    assert "a run with 8 samples per step, now there are 4 (data.batch_size x processes x train.acc" in caplog.text
    assert resumed.progress.samples == 8
    left = [target.id for step in resumed.data.steps(0, 8) for batch in step for target in batch.targets]
    assert left[:16] == seen[8:]
    assert len(left) == 16
