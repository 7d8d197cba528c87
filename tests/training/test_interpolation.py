"""Weights between two checkpoints: both ends equal the checkpoints, and the best mixture is saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import scripted_result
from tests.models.grounding_dino.tiny import tiny_config as tiny_grounding_dino
from tests.training.test_resume import interrupt, stop_in_step
from vg.checkpoint import read_model
from vg.cli import main
from vg.config import RunConfig
from vg.errors import CheckpointError, ConfigError
from vg.evaluation.evaluator import Evaluator
from vg.evaluation.results import EvaluationResult
from vg.models.grounding_dino.config import DenoisingConfig
from vg.training.interpolation import Interpolation
from vg.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def runs(tiny_config: MakeConfig, tmp_path: Path) -> tuple[str, str]:
    """Folders of a run with one step and of a run with six."""
    folders = []
    for steps in (1, 6):
        config = tiny_config(train={"output": str(tmp_path / f"run_{steps}"), "max_steps": steps, "eval_every": 99})
        Trainer(config).fit()
        folders.append(config.train.output)
    return folders[0], folders[1]


def script(monkeypatch: pytest.MonkeyPatch, *scores: float) -> list[dict[str, torch.Tensor]]:
    """Make evaluations return these scores, one after another; they append their weights to the returned list."""
    values, evaluated = iter(scores), []

    def run(self: Any, model: Any) -> EvaluationResult:
        evaluated.append({name: value.clone() for name, value in model.own_state_dict().items()})
        return scripted_result(**{"miou": next(values), "acc@0.5": 0.5})

    monkeypatch.setattr(Evaluator, "run", run)
    return evaluated


def test_mixtures_interpolate_floats_and_take_the_rest_from_the_final_checkpoint() -> None:
    initial = {"a": torch.tensor([0.1, 3.0]), "count": torch.tensor(3)}
    final = {"a": torch.tensor([0.7, 1.0]), "count": torch.tensor(5), "labels": torch.tensor([2.0])}
    mixtures = Interpolation(initial, final)
    assert mixtures.added == ["labels"]
    assert mixtures.at(0)["a"].equal(initial["a"])
    assert mixtures.at(1)["a"].equal(final["a"])
    torch.testing.assert_close(mixtures.at(0.25)["a"], torch.tensor([0.25, 2.5]))
    for weight in (0, 0.5, 1):
        assert mixtures.at(weight)["count"] == 5
        assert mixtures.at(weight)["labels"].equal(final["labels"])


def test_checkpoints_of_different_models_are_rejected() -> None:
    one, other = {"a": torch.zeros(2), "b": torch.zeros(1)}, {"a": torch.zeros(3)}
    with pytest.raises(
        CheckpointError, match=r"(?s)not checkpoints of one model:.*one: b.*shape: a was \(2,\), is \(3"
    ):
        Interpolation(one, other)


def test_the_best_mixture_is_saved(
    runs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated = script(monkeypatch, 0.3, 0.6, 0.4)
    main(["interpolate", *runs, "--output", str(tmp_path / "mix"), "--weights", "0", ".25", "1", "data.eval.size=3"])
    before, after = (load_file(Path(run) / "best" / "model.safetensors") for run in runs)
    assert all(evaluated[0][name].equal(value) for name, value in before.items())
    assert all(evaluated[2][name].equal(value) for name, value in after.items())
    loaded, config = read_model(tmp_path / "mix")
    assert isinstance(config, RunConfig)
    assert config.data.eval.size == 3  # type: ignore[union-attr]
    changed = 0
    for name, value in loaded.own_state_dict().items():
        torch.testing.assert_close(value, before[name].lerp(after[name], 0.25))
        changed += not value.equal(before[name])
    assert changed > 10
    found = json.loads((tmp_path / "mix" / "interpolation.json").read_text())
    assert found["best"] == 0.25
    assert [(row["weight"], row["miou"]) for row in found["results"]] == [(0, 0.3), (0.25, 0.6), (1, 0.4)]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["weight", "miou"],
        ["0", "0.3000"],
        ["0.25", "0.6000", "best"],
        ["1", "0.4000"],
    ]


def test_sweep_over_several_evaluation_datasets(
    runs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = "data.eval={new: {name: shapes, split: val, image_size: 64, size: 5}, old: {name: shapes, size: 4}}"
    main(["interpolate", *runs, datasets, "train.best_metric=old/miou", "--output", str(tmp_path / "mix")])
    rows = json.loads((tmp_path / "mix" / "interpolation.json").read_text())["results"]
    assert [row["weight"] for row in rows] == [0, 0.25, 0.5, 0.75, 1]
    assert capsys.readouterr().out.splitlines()[0].split() == ["weight", "old/miou", "miou"]
    best = max(rows, key=lambda row: row["old/miou"])["weight"]
    assert json.loads((tmp_path / "mix" / "interpolation.json").read_text())["best"] == best
    assert len({row["miou"] for row in rows}) > 2


def test_weights_added_by_training_are_reported(
    tiny_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = {"name": "shapes", "view": "detection", "image_size": 64, "size": 4}
    folders = []
    for name, denoising in (("before", None), ("after", DenoisingConfig(num_queries=5))):
        config = tiny_config(
            data={"train": scenes, "eval": scenes},
            train={"output": str(tmp_path / name), "max_steps": 1},
        )
        config.model = tiny_grounding_dino(denoising=denoising)
        Trainer(config).fit()
        folders.append(config.train.output)
    main(["interpolate", *folders, "--weights", "0.5", "--output", str(tmp_path / "mix")])
    assert "has no denoising.labels.weight: taken from" in capsys.readouterr().out
    assert read_model(tmp_path / "mix")[0].own_state_dict().keys() == read_model(folders[1])[0].own_state_dict().keys()


def test_training_ends_with_a_sweep(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The sweep is from the weights before the first step to the best ones, also in a run that was interrupted."""
    evaluated = script(monkeypatch, 0.1, 0.2, 0.3, 0.5, 0.4)  # two evaluations during training, then three mixtures
    config = tiny_config(train={"max_steps": 4, "eval_first": True, "ema": 0.5, "eval_every": 4})
    config.train.interpolate = [0.0, 0.5, 1.0]
    folder = tmp_path / "run" / "interpolated"
    trainer = Trainer(config)
    stop_in_step(trainer, 2, interrupt)
    with pytest.raises(SystemExit):
        trainer.fit()
    assert not folder.exists(), "it is written at the end of training"
    caplog.set_level("INFO")
    assert Trainer(config, resume=True).fit()["miou"] == 0.2, "the best result of training, not of the sweep"

    first, last, *mixtures = evaluated
    for name, value in first.items():
        assert mixtures[0][name].equal(value)
        assert mixtures[2][name].equal(last[name])
        torch.testing.assert_close(mixtures[1][name], value.lerp(last[name], 0.5))
    assert sum(not value.equal(last[name]) for name, value in first.items()) > 10
    loaded, loaded_config = read_model(folder)
    assert loaded_config == config
    assert all(value.equal(mixtures[1][name]) for name, value in loaded.own_state_dict().items())
    found = json.loads((folder / "interpolation.json").read_text())
    assert (found["best"], [row["miou"] for row in found["results"]]) == (0.5, [0.3, 0.5, 0.4])
    assert [line.split()[:2] for line in caplog.messages[-1].splitlines()[1:]] == [
        ["weight", "miou"],
        ["0", "0.3000"],
        ["0.5", "0.5000"],
        ["1", "0.4000"],
    ]
    Trainer(config, overwrite=True)
    assert not folder.exists(), "it belonged to the overwritten run"


def test_sweep_after_training_with_lora(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """Initial and best weights both have the names of the model without adapters."""
    pytest.importorskip("peft")
    config = tiny_config(optim={"lora": {"targets": ["text.network"], "train_also": ["head"]}}, train={"max_steps": 2})
    config.train.interpolate = [0.5]
    before = Trainer(config).unwrapped_model.state_dict()
    Trainer(config, overwrite=True).fit()
    mixed, after = (
        load_file(Path(config.train.output) / name / "model.safetensors") for name in ("interpolated", "best")
    )
    assert mixed.keys() == after.keys()
    name = "head.score.weight"
    torch.testing.assert_close(mixed[name], (before[name] + after[name]) / 2)
    assert not mixed[name].equal(after[name])


@pytest.mark.parametrize("weights", [[], [1.5], [-0.1]], ids=str)
def test_config_rejects_interpolation_weights_outside_0_to_1(tiny_config: MakeConfig, weights: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"train\.interpolate"):
        tiny_config(train={"interpolate": weights})


@pytest.mark.parametrize("weights", [["2"], ["half"], ["a=1"]], ids=" ".join)
def test_command_rejects_weights_outside_0_to_1(weights: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["interpolate", "one", "other", "--output", "mix", "--weights", *weights])
    assert "--weights" in capsys.readouterr().err


def test_an_existing_folder_is_not_overwritten(runs: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="exists; choose another path, or remove it first"):
        main(["interpolate", *runs, "--output", runs[0]])
