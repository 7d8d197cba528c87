"""Training from a stream: exact resume with the same processes and data workers, a refusal with others."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import history
from tests.training.test_elastic import launch
from tests.training.test_resume import assert_same, configured, interrupt, stop_in_step
from vg.config import RunConfig, parse_config
from vg.data.shards.write import write_shards
from vg.data.synthetic.shapes import ShapesConfig
from vg.errors import CheckpointError, ConfigError
from vg.models.saved import read_weights
from vg.training.stream import StreamedData
from vg.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twenty samples in five files."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(ShapesConfig(split="val", image_size=64, size=20), folder, "parquet", samples_per_shard=4)
    return str(folder / "*.parquet")


def make_config(make: MakeConfig, files: str, output: Path, **data: Any) -> RunConfig:
    """Two epochs of three steps, of two batches of four samples, so that a run begins the third pass over the files."""
    stream = {"name": "stream", "path": "parquet", "data_files": files, "samples": 26, "window": 3}
    return configured(make, output, {"train": stream, **data})


def test_torchdata_is_named(
    tiny_config: MakeConfig, files: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchdata.stateful_dataloader", None)
    config = make_config(tiny_config, files, tmp_path / "run")
    with pytest.raises(ConfigError, match="stream needs the package torchdata: pip install torchdata"):
        StreamedData(config, config.model.build(), Accelerator())


@pytest.mark.parametrize(
    "setting",
    [
        {"cache": {"folder": "cache"}, "augment": {}},
        {"drop_overlap": True},
        {"group_by_aspect_ratio": True},
        {"expressions_per_image": 2},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_that_need_all_samples_are_refused(tiny_config: MakeConfig, setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"a stream cannot be used with {next(iter(setting))}"):
        make_config(tiny_config, "*.parquet", Path("run"), **setting)


def test_a_stream_is_no_evaluation_data(tiny_config: MakeConfig, files: str, tmp_path: Path) -> None:
    config = tiny_config(data={"eval": {"name": "stream", "path": "parquet", "data_files": files, "samples": 5}})
    with pytest.raises(ConfigError, match=r"is a stream, which can be data\.train of vg train only"):
        Trainer(config)
    with pytest.raises(ConfigError, match=r"data\.train\.datasets\.0\.name: 'stream' is unknown"):
        parse_config({"data": {"train": {"name": "mixture", "datasets": [{"name": "stream"}]}}})


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_twice(tiny_config: MakeConfig, files: str, tmp_path: Path, workers: int) -> None:
    """Stopped within a window of the first pass, and at the end of an epoch, which is not the end of a pass."""
    pytest.importorskip("torchdata", reason="needs the extra `streaming`")
    straight = make_config(tiny_config, files, tmp_path / "straight", workers=workers)
    Trainer(straight).fit()
    config = make_config(tiny_config, files, tmp_path / "stopped", workers=workers)
    for step in (1, 3, 5):
        trainer = Trainer(config, resume=step > 1)
        stop_in_step(trainer, step, interrupt)
        with pytest.raises(SystemExit):
            trainer.fit()
    Trainer(config, resume=True).fit()
    assert history(config) == history(straight)
    states = []
    for run in (straight, config):
        (last,) = Path(run.train.output, "checkpoints").glob("*6")
        states.append(torch.load(last / "training.pt", weights_only=True))
        states[-1].pop("data")  # the state of StatefulDataLoader counts batches since the start of the program
    assert_same(*states)


def test_two_processes(tiny_config: MakeConfig, files: str, tmp_path: Path) -> None:
    """They read different files; a killed process restarts with the others where the checkpoint was written."""
    pytest.importorskip("torchdata", reason="needs the extra `streaming`")
    data = {"batch_size": 2, "workers": 1}
    weights = []
    for name, kills in (("quiet", []), ("killed", [(1, "step", 3)])):
        config = make_config(tiny_config, files, tmp_path / name, **data)
        config.train.save_every = 2
        result = launch(config, tmp_path, kills=kills, restarts=len(kills))
        assert result.returncode == 0, result.stderr
        assert ("continues after step 2" in result.stdout) == bool(kills)
        weights.append(read_weights(next((tmp_path / name / "checkpoints").glob("*6"))))
    assert_same(*weights)
    with pytest.raises(CheckpointError, match="with 2 processes, 1 workers, 5 files, now there are 1 processes"):
        Trainer(config, resume=True)


def test_other_workers_and_other_data_are_refused(tiny_config: MakeConfig, files: str, tmp_path: Path) -> None:
    pytest.importorskip("torchdata", reason="needs the extra `streaming`")
    config = make_config(tiny_config, files, tmp_path / "run", workers=1)
    Trainer(config).fit()
    for workers, found in ((0, "0 workers"), (2, "2 workers")):
        config.data.workers = workers
        with pytest.raises(CheckpointError, match=f"with 1 processes, 1 workers, 5 files, now there are .*{found}"):
            Trainer(config, resume=True)
    config.data.workers = 1
    for section, name, value in ((config.data.train, "window", 5), (config.train, "seed", 7)):
        before = getattr(section, name)
        setattr(section, name, value)
        with pytest.raises(CheckpointError, match=r"another stream, or with another window or train\.seed: it had "):
            Trainer(config, resume=True)
        setattr(section, name, before)
    drawn = configured(tiny_config, tmp_path / "run")
    with pytest.raises(CheckpointError, match="the run to resume read a stream"):
        Trainer(drawn, resume=True)
    drawn.train.output = str(tmp_path / "drawn")
    Trainer(drawn).fit()
    config.train.output = drawn.train.output
    with pytest.raises(CheckpointError, match="the run to resume did not read a stream"):
        Trainer(config, resume=True)


def test_more_workers_than_files(
    tiny_config: MakeConfig, files: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("torchdata", reason="needs the extra `streaming`")
    trainer = Trainer(make_config(tiny_config, files, tmp_path / "run", workers=6))
    assert "data.workers=6, but each process has 5 files: 5 are used" in caplog.text
    trainer.fit()
