"""The training loop: learning, evaluations, checkpoints and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import HEAD, NO_DROPOUT, history, scripted
from vg.config import RunConfig
from vg.errors import CheckpointError, ConfigError, TrainingError
from vg.training.optim import GroupConfig
from vg.training.trainer import Trainer
from vg.types import LossName

MakeConfig = Callable[..., RunConfig]


def checkpoints(config: RunConfig) -> list[str]:
    return sorted(path.name for path in Path(config.train.output, "checkpoints").iterdir())


def poison(trainer: Trainer, at_step: int, term: str) -> None:
    """Make one loss term NaN at a step."""
    loss = trainer.unwrapped_model.loss

    def poisoned(output: Any, batch: Any) -> dict[str, Tensor]:
        terms = loss(output, batch)
        name = LossName(term)
        return terms | ({name: terms[name] * float("nan")} if trainer.progress.step + 1 == at_step else {})

    trainer.unwrapped_model.loss = poisoned  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("head", "epochs"),
    [
        (HEAD | {"dropout": 0.0}, 200),
        ({"name": "pooled", "width": 64, "layers": 2, "heads": 2, "feedforward": 128, "dropout": 0.0}, 500),
    ],
    ids=["dense", "pooled"],
)
def test_overfit_four_samples(tiny_config: MakeConfig, head: dict[str, Any], epochs: int) -> None:
    four = {"name": "shapes", "split": "val", "image_size": 64, "size": 4}
    config = tiny_config(
        model=NO_DROPOUT | {"head": head},
        data={"train": four, "eval": four},
        optim={"weight_decay": 0.0, "warmup_steps": 20},
        train={"epochs": epochs, "eval_every": epochs, "log_every": 20},
    )
    results = Trainer(config).fit()
    losses = [row["loss"] for row in history(config) if "loss" in row]
    assert losses[-1] < 0.2 * losses[0]
    assert results["miou"] >= 0.9
    assert results["acc@0.75"] == 1
    assert results["data"] == "shapes (expression, seed 0)"


def test_files_and_history_of_a_run(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"trackers": ["tensorboard"]})
    results = Trainer(config).fit()
    folder = Path(config.train.output)
    files = {"config.yaml", "history.jsonl", "epochs.md", "curves.png", "logs", "best", "checkpoints"}
    assert {path.name for path in folder.iterdir()} == files
    assert list(folder.rglob("events.out.tfevents*"))
    assert not list(folder.rglob("*.partial")) + list(folder.rglob("*.old"))
    assert checkpoints(config) == ["step_000005", "step_000010"]
    rows = history(config)
    losses, evaluations = [row for row in rows if "loss" in row], [row for row in rows if "miou" in row]
    assert [row["step"] for row in losses] == [2, 4, 5, 6, 8, 10]
    assert [row["step"] for row in evaluations] == [5, 10]
    for row in losses:
        assert row["loss"] == pytest.approx(sum(value for name, value in row.items() if name.startswith("loss/")))
    assert max(row["miou"] for row in evaluations) == results["miou"]


def test_intervals_of_evaluations_and_checkpoints(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"eval_every": 3, "save_every": 4, "keep": 9, "max_steps": 8, "log_every": 100})
    trainer = scripted(Trainer(config), [0.1, 0.2, 0.3])
    trainer.fit()
    assert trainer.progress.step == 8
    assert [row["step"] for row in history(config) if "miou" in row] == [3, 6, 8]
    assert checkpoints(config) == ["step_000004", "step_000008"]
    assert history(config)[-2]["lr"] == pytest.approx(0, abs=1e-12), "the schedule ends with max_steps"


def test_the_oldest_checkpoints_are_removed(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"save_every": 2, "keep": 2})
    trainer = Trainer(config)
    assert trainer.num_steps == 10
    trainer.fit()
    assert checkpoints(config) == ["step_000008", "step_000010"]


def test_checkpoints_are_ordered_by_step(tiny_config: MakeConfig) -> None:
    folder = Trainer(tiny_config()).folder
    for step in (999_999, 1_000_000, 5):
        (folder.path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
        for name in ("training.pt", "model.safetensors"):
            (folder.path / "checkpoints" / f"step_{step:06d}" / name).touch()
    assert [path.name for path in folder.checkpoints()] == ["step_000005", "step_999999", "step_1000000"]


def test_best_contains_the_best_checkpoint_instead_of_the_last(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"eval_every": 2, "keep": 9})
    results = scripted(Trainer(config), [0.1, 0.5, 0.5, 0.4, 0.2]).fit()
    assert (results["step"], results["miou"]) == (4, 0.5), "the first of two equals"
    best = Path(config.train.output) / "best"
    assert json.loads((best / "validation.json").read_text())["step"] == 4

    def weights(name: str) -> bytes:
        return (Path(config.train.output) / name / "model.safetensors").read_bytes()

    assert weights("best") == weights("checkpoints/step_000004") != weights("checkpoints/step_000010")


def test_an_unknown_best_metric_is_named(tiny_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"train\.best_metric: 'iou' is not one of .*acc@0\.5"):
        Trainer(tiny_config(train={"best_metric": "iou"})).fit()


def test_early_stopping_persists_when_resumed(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"eval_every": 1, "patience": 3})
    trainer = scripted(Trainer(config), [0.1, 0.5, 0.4, 0.3, 0.2, 0.9])
    assert trainer.fit()["step"] == 2
    assert trainer.progress.step == 5
    assert checkpoints(config)[-1] == "step_000005"
    resumed = scripted(Trainer(config, resume=True), [])
    assert resumed.fit()["step"] == 2
    assert resumed.progress.step == 5
    config.train.patience = 4
    resumed = scripted(Trainer(config, resume=True), [0.2])
    assert resumed.fit()["step"] == 2
    assert resumed.progress.step == 6, "it continues with more patience"


def test_an_existing_run_is_not_overwritten_without_the_flag(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"max_steps": 1})
    with pytest.raises(CheckpointError, match=r"nothing to resume: no checkpoint in .*checkpoints"):
        Trainer(config, resume=True)
    folder = Path(config.train.output)
    (folder / "eval").mkdir(parents=True)
    (folder / "eval" / "metrics.json").write_text("{}")
    Trainer(config).fit()
    before = history(config)
    with pytest.raises(CheckpointError, match=r"\(checkpoints/step_000001\): continue it with --resume .*--overwrite"):
        Trainer(config)
    assert history(config) == before
    config.optim.groups = {"nowhere": GroupConfig()}
    with pytest.raises(ValueError, match="nowhere"):
        Trainer(config, overwrite=True)
    assert history(config) == before, "nothing is removed if the new run cannot start"
    config.optim.groups = {}
    assert (folder / "eval" / "metrics.json").exists(), "of the weights before training"
    (folder / "eval" / "split=testA").mkdir(parents=True)
    results = ["metrics.json", "benchmark.json", "benchmark.html", "detections.json", "detections_val.json"]
    images = ["predictions.png", "scene.png", "scene.txt", "comparison.txt", "example.png"]
    for name in [*results, *images, "mine.png"]:
        (folder / name).touch()
    trainer = Trainer(config, overwrite=True)
    left = {file.name for file in folder.iterdir()} - {"train.lock"}
    assert left == {"config.yaml", "mine.png"}, "results are of other weights"
    trainer.fit()
    assert not (folder / "train.lock").exists()


@pytest.mark.parametrize("save_every", [None, 1])
def test_resume_is_offered_only_if_it_is_possible(tiny_config: MakeConfig, save_every: int | None) -> None:
    """A run out of memory at step 1 has only evaluated the initial weights."""
    config = tiny_config(train={"eval_first": True, "save_every": save_every})
    trainer = Trainer(config)
    poison(trainer, 2, "l1")
    with pytest.raises(TrainingError):
        trainer.fit()
    advice = r"continue it with --resume \(in Python: resume=True\), replace it" if save_every else "replace it"
    with pytest.raises(CheckpointError, match=rf"already contains a run \([\w/.]+\): {advice} with --overwrite"):
        Trainer(config)
    if not save_every:
        with pytest.raises(CheckpointError, match=r"nothing to resume: .*; start again with --overwrite"):
            Trainer(config, resume=True)


def test_a_non_finite_loss_raises_and_is_never_saved(tiny_config: MakeConfig) -> None:
    config = tiny_config(data={"batch_size": 2}, train={"accumulate": 2, "save_every": 2, "log_every": 3})
    trainer = Trainer(config)
    poison(trainer, 5, "l1")
    with pytest.raises(TrainingError, match=r"the loss is not finite at step 5: .*l1 = nan"):
        trainer.fit()
    assert checkpoints(config) == ["step_000002", "step_000004"]
    for path in Path(config.train.output).rglob("model.safetensors"):
        assert all(weights.isfinite().all() for weights in load_file(path).values())
    resumed = Trainer(config, resume=True)
    resumed.fit()
    assert resumed.progress.step == resumed.num_steps == 10


def test_the_first_non_finite_step_is_named(tiny_config: MakeConfig) -> None:
    trainer = Trainer(tiny_config(train={"log_every": 8, "eval_every": 8}))
    poison(trainer, 3, "giou")
    with pytest.raises(TrainingError, match=r"not finite at step 3: .*giou = nan"):
        trainer.fit()


def test_non_finite_weights_are_never_saved(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"save_every": 1})
    trainer = Trainer(config)
    weight = next(trainer.unwrapped_model.head.parameters())
    weight.register_hook(lambda gradient: gradient * float("nan") if trainer.progress.step == 2 else gradient)
    with pytest.raises(TrainingError, match=r"the weights .* are not finite after step 3"):
        trainer.fit()
    assert checkpoints(config) == ["step_000001", "step_000002"]


def test_foreign_files_in_the_folder_are_kept(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"max_steps": 1})
    mine = [Path(config.train.output, *parts) for parts in (("logs", "mine"), ("checkpoints", "mine"), ("notes.txt",))]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with pytest.raises(CheckpointError, match=r"already contains a run \(checkpoints/mine\)"):
        Trainer(config)
    mine[1].unlink()
    Trainer(config).fit()
    assert mine[0].exists()
    assert mine[2].exists()


def test_configurations_changed_in_python_are_validated(tiny_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"expected the configuration that vg\.load_config returns, got 'x\.yaml'"):
        Trainer("x.yaml")  # type: ignore[arg-type]
    config = tiny_config()
    assert Trainer(config).config is config
    config.optim.lr = "1e-3"  # type: ignore[assignment]
    assert Trainer(config).config.optim.lr == 1e-3
    config.optim.lr = "abc"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"optim\.lr: Input should be a valid number"):
        Trainer(config)
    config = tiny_config()
    config.data.batch_size = 4.0  # type: ignore[assignment]
    config.train.output = Path(config.train.output)  # type: ignore[assignment]
    checked = Trainer(config, overwrite=True).config
    assert (type(checked.data.batch_size), type(checked.train.output)) == (int, str)
    config.train.max_stesp = 2  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"train\.max_stesp: unknown key; did you mean `max_steps`\?"):
        Trainer(config)
