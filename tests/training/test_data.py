"""What training reads: without pictures of the evaluation, grouped by shape, and the same after a stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tests.data.detection.detection_files import CATEGORIES, annotation, write_image
from tests.models.grounding_dino.tiny import tiny_config as tiny_grounding_dino
from tests.training.test_resume import assert_same_runs, interrupt, stop_in_step
from vg.config import RunConfig
from vg.errors import DataError
from vg.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]


def write_set(folder: Path, split: str, ids: range) -> str:
    """Pictures called as COCO calls them, of many shapes, each with a cat."""
    images = [{"id": i, "file_name": f"{i:012d}.png", "height": 40 + i % 5 * 9, "width": 60 - i % 3 * 8} for i in ids]
    for image in images:
        write_image(folder / str(image["file_name"]), image["height"], image["width"])  # type: ignore[arg-type]
    boxes = [annotation(i, i, 3, [5, 10, 20, 10 + i]) for i in ids]
    file = folder / f"instances_{split}.json"
    file.write_text(json.dumps({"images": images, "annotations": boxes, "categories": CATEGORIES}))
    return str(file)


@pytest.fixture
def make(tiny_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    """Training on pictures 1 to 14, evaluation on 13 to 16."""
    train = write_set(tmp_path / "set", "train", range(1, 15))
    judged = write_set(tmp_path / "set", "val", range(13, 17))

    def make(output: str = "run", accumulate: int = 1, **data: Any) -> RunConfig:
        values = {"train": {"name": "coco", "path": train}, "eval": {"name": "coco", "path": judged}, "batch_size": 2}
        config = tiny_config(
            data=values | data,
            train={"output": str(tmp_path / output), "accumulate": accumulate, "eval_every": 99, "save_every": 2},
        )
        config.model = tiny_grounding_dino()
        return config

    return make


def ids(trainer: Trainer, epoch: int) -> list[list[str]]:
    """What each batch of an epoch shows."""
    return [[target.id for target in batch.targets] for step in trainer.data.steps(epoch, 0) for batch in step]


def test_pictures_of_the_evaluation_are_told_or_left_out(make: MakeConfig) -> None:
    with pytest.warns(UserWarning, match=r"2 of 14 training samples .* data\.drop_overlap=true"):
        trainer = Trainer(make())
    both = {name for batch in ids(trainer, 0) for name in batch}
    with pytest.warns(UserWarning, match="they are left out of training"):
        trainer = Trainer(make(drop_overlap=True), overwrite=True)
    left = {name for batch in ids(trainer, 0) for name in batch}
    assert (len(both), len(left)) == (14, 12)
    assert left < both
    config = make(drop_overlap=True)
    config.data.train = config.data.eval  # type: ignore[assignment]
    told, lost = pytest.warns(UserWarning, match="4 of 4"), pytest.raises(DataError, match="every picture is also in")
    with told, lost:
        Trainer(config, overwrite=True)


@pytest.mark.filterwarnings("ignore:.*training samples")
def test_batches_of_similar_shapes(make: MakeConfig) -> None:
    def spread(trainer: Trainer) -> float:
        batches = [batch for epoch in range(3) for step in trainer.data.steps(epoch, 0) for batch in step]
        aspects = [[width / height for height, width in (target.size for target in b.targets)] for b in batches]
        return sum(max(batch) - min(batch) for batch in aspects)

    mixed, similar = Trainer(make()), Trainer(make(similar_shapes=True), overwrite=True)
    assert spread(similar) < 0.5 * spread(mixed)
    assert sorted(chain(*ids(similar, 0))) == sorted(chain(*ids(mixed, 0)))
    assert ids(similar, 0) != ids(similar, 1)
    scenes = {"name": "shapes", "view": "detection", "image_size": 64}
    with pytest.raises(DataError, match="does not know how large its pictures are"):
        Trainer(make(train=scenes | {"size": 4}, eval=scenes, similar_shapes=True), overwrite=True)


@pytest.mark.filterwarnings("ignore:.*training samples")
def test_a_stopped_run_goes_on_bit_for_bit(make: MakeConfig) -> None:
    """Six batches of what is left make steps of 4 and 2; the stop comes in the middle of the second epoch."""
    settings: dict[str, Any] = {"drop_overlap": True, "similar_shapes": True, "augment": {"flip": 0.5}, "accumulate": 4}
    straight, stopped = make("straight", **settings), make("stopped", **settings)
    Trainer(straight).fit()
    trainer = Trainer(stopped)
    assert trainer.num_steps == 4
    stop_in_step(trainer, 3, interrupt)
    with pytest.raises(SystemExit):
        trainer.fit()
    resumed = Trainer(stopped, resume=True)
    assert (resumed.progress.epoch, resumed.progress.batch) == (1, 4)
    resumed.fit()
    assert_same_runs(Path(straight.train.output), Path(stopped.train.output))
