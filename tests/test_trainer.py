"""The training loop: it learns, it keeps what it promises to keep, and trouble is loud."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel

from tests.conftest import HEAD, TEXT, VISION
from vg.checkpoint import CheckpointError, read_model
from vg.config import ConfigError, RunConfig
from vg.history import History
from vg.trainer import Trainer, TrainingError

MakeConfig = Callable[..., RunConfig]
NO_DROPOUT = {
    "text": {"frozen": False, "architecture": TEXT | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}},
    "head": HEAD | {"dropout": 0.0},
}


def no_dropout(model: dict[str, Any] | None = None) -> dict[str, Any]:
    vision = {"frozen": False, "architecture": VISION}
    return {"name": "rec", "image_size": 32, "vision": vision, **NO_DROPOUT, **(model or {})}


def history(config: RunConfig) -> list[dict[str, Any]]:
    return History(Path(config.train.output) / "history.jsonl").rows()


def checkpoints(config: RunConfig) -> list[str]:
    return sorted(path.name for path in Path(config.train.output, "checkpoints").iterdir())


def scripted(trainer: Trainer, scores: list[float]) -> Trainer:
    """Evaluations return these numbers, one after the other."""
    values = iter(scores)
    trainer.evaluator.run = lambda model: {"miou": next(values), "data": "script", "split": "val"}  # type: ignore[method-assign]
    return trainer


def poison(trainer: Trainer, at_step: int, term: str) -> None:
    """Makes one loss term NaN at a step."""
    loss = trainer.core.loss

    def poisoned(output: Any, batch: Any) -> dict[str, Tensor]:
        terms = loss(output, batch)
        return terms | ({term: terms[term] * float("nan")} if trainer.progress.step + 1 == at_step else {})

    trainer.core.loss = poisoned  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("head", "epochs"),
    [
        (HEAD | {"dropout": 0.0}, 200),
        ({"name": "pooled", "width": 64, "layers": 2, "heads": 2, "feedforward": 128, "dropout": 0.0}, 500),
    ],
    ids=["dense", "pooled"],
)
def test_four_samples_overfit(tiny_config: MakeConfig, head: dict[str, Any], epochs: int) -> None:
    four = {"name": "shapes", "split": "val", "image_size": 64, "size": 4}
    config = tiny_config(
        model=no_dropout({"head": head}),
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


def test_what_a_run_leaves_behind(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"trackers": ["tensorboard"]})
    results = Trainer(config).fit()
    folder = Path(config.train.output)
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "history.jsonl", "logs", "best", "checkpoints"}
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


def test_evaluations_and_checkpoints_come_when_they_are_due(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"eval_every": 3, "save_every": 4, "keep": 9, "max_steps": 8, "log_every": 100})
    trainer = scripted(Trainer(config), [0.1, 0.2, 0.3])
    trainer.fit()
    assert trainer.progress.step == 8
    assert [row["step"] for row in history(config) if "miou" in row] == [3, 6, 8]
    assert checkpoints(config) == ["step_000004", "step_000008"]
    assert history(config)[-2]["lr"] == pytest.approx(0, abs=1e-12), "the schedule ends with max_steps"


def test_the_oldest_checkpoints_go(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"save_every": 2, "keep": 2})
    trainer = Trainer(config)
    assert trainer.num_steps == 10
    trainer.fit()
    assert checkpoints(config) == ["step_000008", "step_000010"]


def test_checkpoints_are_in_the_order_of_their_steps(tiny_config: MakeConfig) -> None:
    folder = Trainer(tiny_config()).folder
    for step in (999_999, 1_000_000, 5):
        (folder.path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
        (folder.path / "checkpoints" / f"step_{step:06d}" / "training.pt").touch()
    assert [path.name for path in folder.checkpoints()] == ["step_000005", "step_999999", "step_1000000"]


def test_best_holds_the_best_and_not_the_last(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"eval_every": 2, "keep": 9})
    results = scripted(Trainer(config), [0.1, 0.5, 0.5, 0.4, 0.2]).fit()
    assert (results["step"], results["miou"]) == (4, 0.5), "the first of two equals"
    best = Path(config.train.output) / "best"
    assert json.loads((best / "validation.json").read_text())["step"] == 4

    def weights(name: str) -> bytes:
        return (Path(config.train.output) / name / "model.safetensors").read_bytes()

    assert weights("best") == weights("checkpoints/step_000004") != weights("checkpoints/step_000010")


def test_an_unknown_best_metric_is_named(tiny_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"train\.best_metric: 'iou' is none of .*acc@0\.5"):
        Trainer(tiny_config(train={"best_metric": "iou"})).fit()


def test_patience_ends_a_run_and_a_resumed_one_stays_ended(tiny_config: MakeConfig) -> None:
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
    assert resumed.progress.step == 6, "with more patience it goes on"


def test_a_run_is_never_overwritten_by_accident(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"max_steps": 1})
    with pytest.raises(CheckpointError, match=r"nothing to resume: no checkpoint in .*checkpoints"):
        Trainer(config, resume=True)
    Trainer(config).fit()
    before = history(config)
    with pytest.raises(
        CheckpointError, match=r"holds a run already \(step_000001\): go on with --resume, .*--overwrite"
    ):
        Trainer(config)
    assert history(config) == before
    Trainer(config, overwrite=True)
    assert history(config) == []
    assert not Path(config.train.output, "checkpoints").exists()


def test_a_loss_that_is_no_number_is_named_and_never_saved(tiny_config: MakeConfig) -> None:
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


def test_the_first_bad_step_is_named_not_the_last(tiny_config: MakeConfig) -> None:
    trainer = Trainer(tiny_config(train={"log_every": 8, "eval_every": 8}))
    poison(trainer, 3, "giou")
    with pytest.raises(TrainingError, match=r"not finite at step 3: .*giou = nan"):
        trainer.fit()


def test_a_gradient_that_is_no_number_behind_a_finite_loss_is_never_saved(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"save_every": 1})
    trainer = Trainer(config)
    weight = next(trainer.core.head.parameters())
    weight.register_hook(lambda gradient: gradient * float("nan") if trainer.progress.step == 2 else gradient)
    with pytest.raises(TrainingError, match=r"the weights .* are not finite after step 3"):
        trainer.fit()
    assert checkpoints(config) == ["step_000001", "step_000002"]


def test_accumulated_batches_equal_the_big_batch(tiny_config: MakeConfig) -> None:
    """Twelve samples: three steps of four, as one batch each or as two batches of two."""
    data = {"train": {"name": "shapes", "split": "val", "image_size": 64, "size": 12}}
    moments, losses = [], []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        config = tiny_config(
            model=no_dropout(),
            data=data | {"batch_size": batch_size},
            train={"accumulate": accumulate, "epochs": 1, "log_every": 1, "eval_every": 99},
        )
        trainer = scripted(Trainer(config, overwrite=True), [0.5])
        trainer.fit()
        assert trainer.progress.step == 3
        losses.append([row["loss"] for row in history(config) if "loss" in row])
        # Means of the gradients: the weights themselves differ where AdamW blows up the rounding of a zero gradient.
        moments.append([state["exp_avg"] for state in trainer.optimizer.state.values()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert sum(moment.abs().sum() for moment in moments[0]) > 0.1
    for whole, accumulated in zip(*moments, strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=1e-5, atol=1e-6)


def test_the_last_batches_of_an_epoch_weigh_as_much_as_a_whole_step(tiny_config: MakeConfig) -> None:
    """Three batches, two of them to a step: the second step has one batch, which must not count half."""
    data = {"train": {"name": "shapes", "split": "val", "image_size": 64, "size": 6}, "batch_size": 2}
    config = tiny_config(model=no_dropout(), data=data, train={"accumulate": 2, "epochs": 1})
    trainer = scripted(Trainer(config), [0.5])
    gradients = []
    zero_grad = trainer.optimizer.zero_grad

    def record() -> None:
        if trainer.accelerator.sync_gradients:
            gradients.append([p.grad.clone() for p in trainer.core.parameters() if p.grad is not None])
        zero_grad()

    config.optim.clip_norm = None
    trainer.optimizer.zero_grad = record  # type: ignore[method-assign]
    batches, step = [], trainer.step
    weights = {}

    def remember(batch: Any) -> dict[str, Tensor]:
        weights[len(batches)] = {name: value.clone() for name, value in trainer.core.state_dict().items()}
        batches.append(batch)
        return step(batch)

    trainer.step = remember  # type: ignore[method-assign]
    trainer.fit()
    assert len(gradients) == 2
    for group, members in enumerate(([0, 1], [2])):
        trainer.core.load_state_dict(weights[members[0]])
        trainer.core.zero_grad()
        losses = [sum(trainer.core.loss(trainer.core(batches[i]), batches[i]).values()) for i in members]
        (sum(losses) / len(losses)).backward()
        expected = [p.grad for p in trainer.core.parameters() if p.grad is not None]
        for found, wanted in zip(gradients[group], expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_rates_of_groups_reach_the_optimizer(tiny_config: MakeConfig) -> None:
    config = tiny_config(optim={"lr": 1e-3, "warmup_steps": 1, "groups": {"text": {"lr": 0.0}}}, train={"max_steps": 2})
    trainer = Trainer(config)
    before = {name: value.clone() for name, value in trainer.core.state_dict().items()}
    trainer.fit()
    changed = {name for name, value in trainer.core.state_dict().items() if not value.equal(before[name])}
    assert any(name.startswith("head.") for name in changed)
    assert any(name.startswith("vision.") for name in changed)
    assert not any(name.startswith("text.") for name in changed)


def test_the_average_is_evaluated_and_published(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"ema": 0.9, "max_steps": 3})
    trainer = Trainer(config)
    evaluated = {}

    def run(model: Any) -> dict[str, Any]:
        evaluated.update({name: value.clone() for name, value in model.state_dict().items()})
        return {"miou": 0.5}

    trainer.evaluator.run = run  # type: ignore[method-assign]
    trainer.fit()
    assert trainer.ema is not None
    trained = trainer.core.state_dict()
    published, _ = read_model(config.train.output)
    for name, value in published.state_dict().items():
        assert value.equal(evaluated[name])
    assert any(not value.equal(trained[name]) for name, value in evaluated.items())


@pytest.fixture
def new_accelerator() -> Iterator[None]:
    """Accelerate allows one precision per process, unless its memory is wiped."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("new_accelerator")
def test_bf16_trains_and_gives_float32_weights_and_boxes(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"precision": "bf16", "max_steps": 3})
    trainer = Trainer(config)
    results = trainer.fit()
    assert 0 <= results["miou"] <= 1
    assert {value.dtype for value in trainer.core.parameters()} == {torch.float32}
    assert all(torch.tensor(row["loss"]).isfinite() for row in history(config) if "loss" in row)


@pytest.fixture
def pretrained(tmp_path: Path) -> dict[str, str]:
    """Local folders that hold encoders as the Hub does."""
    folders = {}
    for name, architecture in (("vision", VISION), ("text", TEXT)):
        torch.manual_seed(len(name))
        folders[name] = str(tmp_path / name)
        AutoModel.from_config(AutoConfig.for_model(**architecture)).save_pretrained(folders[name])
    return folders


def test_frozen_encoders_stay_as_they_are(tiny_config: MakeConfig, pretrained: dict[str, str]) -> None:
    vocabulary = str(Path(__file__).parents[1] / "vg" / "models" / "rec" / "small_vocabulary.txt")
    encoders = {"vision": {"id": pretrained["vision"]}, "text": {"id": pretrained["text"], "tokenizer": vocabulary}}
    config = tiny_config(
        model={"name": "rec", "image_size": 32, "head": HEAD, **encoders}, train={"max_steps": 3, "ema": 0.9}
    )
    trainer = Trainer(config)
    frozen = {n: p.clone() for n, p in trainer.core.named_parameters() if n.startswith(("vision.", "text."))}
    source = load_file(Path(pretrained["text"]) / "model.safetensors")
    assert frozen["text.network.embeddings.word_embeddings.weight"].equal(source["embeddings.word_embeddings.weight"])

    step, modes = trainer.step, []
    trainer.step = lambda batch: (modes.append((trainer.core.training, trainer.core.vision.training)), step(batch))[1]  # type: ignore
    trainer.fit()
    assert set(modes) == {(True, False)}
    assert not any(
        module.training for encoder in (trainer.core.vision, trainer.core.text) for module in encoder.modules()
    )
    for name, parameter in trainer.core.named_parameters():
        if name in frozen:
            assert parameter.grad is None, name
            assert parameter.equal(frozen[name]), name
    optimised = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == set(trainer.core.head.parameters())
    saved = load_file(Path(config.train.output) / "best" / "model.safetensors")
    assert saved
    assert all(name.startswith("head.") for name in saved)
    loaded, _ = read_model(config.train.output)
    for name, parameter in loaded.named_parameters():
        assert parameter.equal(trainer.core.get_parameter(name)) or name.startswith("head."), name


def test_frozen_encoders_from_scratch_are_saved(tiny_config: MakeConfig) -> None:
    encoders = {"vision": {"architecture": VISION}, "text": {"architecture": TEXT}}
    config = tiny_config(model={"name": "rec", "image_size": 32, "head": HEAD, **encoders}, train={"max_steps": 1})
    trainer = Trainer(config)
    trainer.fit()
    loaded, _ = read_model(config.train.output)
    for name, value in trainer.core.state_dict().items():
        assert loaded.state_dict()[name].equal(value), name
