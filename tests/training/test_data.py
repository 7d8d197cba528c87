"""Training data: images shared with evaluation, grouping by aspect ratio, and resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.data.detection.detection_files import CATEGORIES, annotation, write_image
from tests.models.grounding_dino.tiny import tiny_config as tiny_grounding_dino
from tests.training.test_resume import assert_same_runs, interrupt, stop_in_step
from vg.config import RunConfig, parse_config
from vg.data.mixture import MixtureConfig
from vg.errors import ConfigError, DataError
from vg.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]


def write_coco(folder: Path, split: str, ids: range) -> str:
    """Write images of many shapes with file names as in COCO, each with a cat; returns the annotation file."""
    images = [{"id": i, "file_name": f"{i:012d}.png", "height": 40 + i % 5 * 9, "width": 60 - i % 3 * 8} for i in ids]
    for image in images:
        write_image(folder / str(image["file_name"]), image["height"], image["width"])  # type: ignore[arg-type]
    boxes = [annotation(i, i, 3, [5, 10, 20, 10 + i]) for i in ids]
    file = folder / f"instances_{split}.json"
    file.write_text(json.dumps({"images": images, "annotations": boxes, "categories": CATEGORIES}))
    return str(file)


@pytest.fixture
def make(tiny_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    """Training on images 1 to 14, evaluation on 13 to 16."""
    train = write_coco(tmp_path / "data", "train", range(1, 15))
    evaluated = write_coco(tmp_path / "data", "val", range(13, 17))

    def make(output: str = "run", accumulate: int = 1, **data: Any) -> RunConfig:
        values = {
            "train": {"name": "coco", "path": train},
            "eval": {"name": "coco", "path": evaluated},
            "batch_size": 2,
        }
        config = tiny_config(
            data=values | data,
            train={"output": str(tmp_path / output), "accumulate": accumulate, "eval_every": 99, "save_every": 2},
        )
        config.model = tiny_grounding_dino()
        return config

    return make


ORIGINAL = '"bbox": [5, 10, 20, 11]'
CHANGES = {
    "a box is moved": (ORIGINAL, ORIGINAL.replace("20", "21"), "12 images of data (train), but other annotations"),
    "a class is renamed": ('"cat"', '"lynx"', "12 images of data (train), but other annotations"),
    "an image is added": (
        '"images": [',
        '"images": [{"id": 99, "file_name": "000000000001.png", "height": 49, "width": 52}, ',
        "12 images of data (train), now 13 images of data (train)",
    ),
}


def ids(trainer: Trainer, epoch: int) -> list[list[str]]:
    """Return the sample ids of each batch of an epoch."""
    return [[target.id for target in batch.targets] for step in trainer.data.steps(epoch, 0) for batch in step]


def test_images_of_the_evaluation_cause_a_warning_or_are_dropped(make: MakeConfig) -> None:
    with pytest.warns(UserWarning, match=r"2 of 14 training samples .* data\.drop_overlap=true"):
        trainer = Trainer(make())
    both = {name for batch in ids(trainer, 0) for name in batch}
    with pytest.warns(UserWarning, match="they are dropped from training"):
        trainer = Trainer(make(drop_overlap=True), overwrite=True)
    kept = {name for batch in ids(trainer, 0) for name in batch}
    assert (len(both), len(kept)) == (14, 12)
    assert kept < both
    config = make(drop_overlap=True)
    config.data.train = config.data.eval  # type: ignore[assignment]
    warning, error = pytest.warns(UserWarning, match="4 of 4"), pytest.raises(DataError, match="every image is also in")
    with warning, error:
        Trainer(config, overwrite=True)


@pytest.mark.filterwarnings("ignore:.*training samples")
def test_batches_have_similar_aspect_ratios(make: MakeConfig) -> None:
    def spread(trainer: Trainer) -> float:
        batches = [batch for epoch in range(3) for step in trainer.data.steps(epoch, 0) for batch in step]
        aspects = [[width / height for height, width in (target.size for target in b.targets)] for b in batches]
        return sum(max(batch) - min(batch) for batch in aspects)

    mixed, similar = Trainer(make()), Trainer(make(group_by_aspect_ratio=True), overwrite=True)
    assert spread(similar) < 0.5 * spread(mixed)
    assert sorted(chain(*ids(similar, 0))) == sorted(chain(*ids(mixed, 0)))
    assert ids(similar, 0) != ids(similar, 1)
    scenes = {"name": "shapes", "view": "detection", "image_size": 64}
    with pytest.raises(DataError, match=r"provides no image sizes, which data\.group_by_aspect_ratio needs"):
        Trainer(make(train=scenes | {"size": 4}, eval=scenes, group_by_aspect_ratio=True), overwrite=True)


@pytest.mark.filterwarnings("ignore:.*training samples")
def test_one_size_makes_a_batch_one_pass_of_the_backbone(make: MakeConfig) -> None:
    def passes(**data: Any) -> list[int]:
        """Return how often the backbone runs for each batch of an epoch."""
        trainer = Trainer(make(batch_size=4, group_by_aspect_ratio=True, **data), overwrite=True)
        backbone, counts = trainer.unwrapped_model.backbone, []
        with patch.object(backbone, "forward", wraps=backbone.forward) as run:
            for step in trainer.data.steps(0, 0):
                trainer.step(step)
                counts.append(run.call_count)
                run.reset_mock()
        return counts

    assert min(passes()) > 1
    assert passes(one_size=True) == [1, 1, 1]
    with pytest.raises(ConfigError, match=r"one_size would distort .* group_by_aspect_ratio=true"):
        parse_config({"data": asdict(make().data) | {"one_size": True}, "model": {"name": "rec"}})


@pytest.mark.filterwarnings("ignore:.*training samples")
def test_resume_equals_uninterrupted_run(make: MakeConfig) -> None:
    """Twelve images that are not dropped make three steps; the stop is in the middle of the second epoch."""
    settings: dict[str, Any] = {
        "drop_overlap": True,
        "group_by_aspect_ratio": True,
        "augment": {"flip": 0.5},
        "accumulate": 2,
    }
    straight, stopped = make("straight", **settings), make("stopped", **settings)
    Trainer(straight).fit()
    trainer = Trainer(stopped)
    assert trainer.num_steps == 6
    stop_in_step(trainer, 5, interrupt)
    with pytest.raises(SystemExit):
        trainer.fit()
    resumed = Trainer(stopped, resume=True)
    assert (resumed.progress.epoch, resumed.progress.samples) == (1, 8)
    resumed.fit()
    assert_same_runs(Path(straight.train.output), Path(stopped.train.output))


@pytest.mark.filterwarnings("ignore:.*training samples")
@pytest.mark.parametrize("change", CHANGES)
def test_resuming_with_changed_annotations_warns_once(
    make: MakeConfig, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = make(drop_overlap=True)
    config.train.max_steps = 1
    Trainer(config).fit()
    Trainer(config, resume=True)
    assert "changed since" not in caplog.text
    old, new, message = CHANGES[change]
    file = Path(config.data.train.path)  # type: ignore[union-attr]
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    config.train.max_steps = 2
    Trainer(config, resume=True).fit()
    assert f"data.train changed since step 1: {message}; the run continues at the same position" in caplog.text
    assert "data.eval changed" not in caplog.text
    caplog.clear()
    Trainer(config, resume=True)
    assert "changed since" not in caplog.text


@pytest.mark.filterwarnings("ignore:.*training samples")
def test_resuming_with_changed_evaluation_data_warns(make: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    config = make()
    config.train.max_steps = 1
    config.data.train = MixtureConfig(datasets=[config.data.train, config.data.eval])  # type: ignore[list-item]
    Trainer(config).fit()
    file = Path(config.data.eval.path)  # type: ignore[union-attr]
    file.write_text(file.read_text().replace("[5, 10, 20, 23]", "[6, 10, 20, 23]"))
    Trainer(config, resume=True)
    assert "data.eval changed since step 1: 4 images of data (val), but other annotations; earlier" in caplog.text
    assert "data.train changed since step 1" in caplog.text, "the second dataset of the mixture"
    path = Path(config.train.output, "checkpoints", "step_000001", "training.pt")
    torch.save({key: value for key, value in torch.load(path).items() if key != "digests"}, path)
    caplog.clear()
    Trainer(config, resume=True)
    assert "changed since" not in caplog.text, "the checkpoint is from before they were compared"
