"""One optimizer step: gradients, learning rates, averages, precision and frozen encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel

from tests.conftest import HEAD, NO_DROPOUT, TEXT, VISION, history, scripted, scripted_result
from vg.checkpoint import read_model
from vg.config import RunConfig
from vg.training.trainer import Trainer
from vg.types import Batch

MakeConfig = Callable[..., RunConfig]


def test_accumulated_batches_equal_one_large_batch(tiny_config: MakeConfig) -> None:
    """Twelve samples: three steps of four, as one batch each or as two batches of two."""
    data = {"train": {"name": "shapes", "split": "val", "image_size": 64, "size": 12}}
    moments, losses = [], []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        config = tiny_config(
            model=NO_DROPOUT,
            data=data | {"batch_size": batch_size},
            train={"accumulate": accumulate, "epochs": 1, "log_every": 1, "eval_every": 99},
        )
        trainer = scripted(Trainer(config, overwrite=True), [0.5])
        trainer.fit()
        assert trainer.progress.step == 3
        losses.append([row["loss"] for row in history(config) if "loss" in row])
        # Averaged gradients, because AdamW amplifies rounding errors of zero gradients in the weights.
        moments.append([state["exp_avg"] for state in trainer.optimizer.state.values()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert sum(moment.abs().sum() for moment in moments[0]) > 0.1
    for whole, accumulated in zip(*moments, strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=1e-5, atol=1e-6)


def test_a_step_with_fewer_batches_has_a_mean_gradient_too(tiny_config: MakeConfig) -> None:
    """Three batches where a step has four: their gradient must not be divided by four."""
    data = {"train": {"name": "shapes", "split": "val", "image_size": 64, "size": 6}, "batch_size": 2}
    config = tiny_config(model=NO_DROPOUT, data=data, train={"accumulate": 4, "epochs": 2})
    trainer = scripted(Trainer(config), [0.5, 0.5])
    gradients = []
    zero_grad = trainer.optimizer.zero_grad

    def record() -> None:
        gradients.append([p.grad.clone() for p in trainer.unwrapped_model.parameters() if p.grad is not None])
        zero_grad()

    config.optim.clip_norm = None
    trainer.optimizer.zero_grad = record  # type: ignore[method-assign]
    batches: list[Batch] = []
    step, weights = trainer.step, {}

    def remember(group: Sequence[Batch]) -> dict[str, Tensor] | None:
        weights[len(batches)] = {name: value.clone() for name, value in trainer.unwrapped_model.state_dict().items()}
        batches.extend(group)
        return step(group)

    trainer.step = remember  # type: ignore[method-assign]
    trainer.fit()
    assert len(gradients) == 2
    for group, members in enumerate(([0, 1, 2], [3, 4, 5])):
        trainer.unwrapped_model.load_state_dict(weights[members[0]])
        trainer.unwrapped_model.zero_grad()
        losses = [
            sum(trainer.unwrapped_model.loss(trainer.unwrapped_model(batches[i]), batches[i]).values()) for i in members
        ]
        (sum(losses) / len(losses)).backward()
        expected = [p.grad for p in trainer.unwrapped_model.parameters() if p.grad is not None]
        for found, gradient in zip(gradients[group], expected, strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


def test_learning_rates_of_groups_are_used(tiny_config: MakeConfig) -> None:
    config = tiny_config(optim={"lr": 1e-3, "warmup_steps": 1, "groups": {"text": {"lr": 0.0}}}, train={"max_steps": 2})
    trainer = Trainer(config)
    before = {name: value.clone() for name, value in trainer.unwrapped_model.state_dict().items()}
    trainer.fit()
    changed = {name for name, value in trainer.unwrapped_model.state_dict().items() if not value.equal(before[name])}
    assert any(name.startswith("head.") for name in changed)
    assert any(name.startswith("vision.") for name in changed)
    assert not any(name.startswith("text.") for name in changed)


def test_the_ema_weights_are_evaluated_and_exported(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"ema": 0.9, "max_steps": 3})
    trainer = Trainer(config)
    evaluated = {}

    def run(model: Any) -> Any:
        evaluated.update({name: value.clone() for name, value in model.state_dict().items()})
        return scripted_result(miou=0.5)

    trainer.evaluator.run = run  # type: ignore[method-assign]
    trainer.fit()
    assert trainer.state.ema is not None
    trained = trainer.unwrapped_model.state_dict()
    exported, _ = read_model(config.train.output)
    for name, value in exported.state_dict().items():
        assert value.equal(evaluated[name])
    assert any(not value.equal(trained[name]) for name, value in evaluated.items())


def test_bf16_trains_and_gives_float32_weights_and_boxes(tiny_config: MakeConfig) -> None:
    config = tiny_config(train={"precision": "bf16", "max_steps": 3})
    trainer = Trainer(config)
    results = trainer.fit()
    assert 0 <= results["miou"] <= 1
    assert {value.dtype for value in trainer.unwrapped_model.parameters()} == {torch.float32}
    assert all(torch.tensor(row["loss"]).isfinite() for row in history(config) if "loss" in row)


@pytest.fixture
def pretrained(tmp_path: Path) -> dict[str, str]:
    """Local folders with encoders in the format of the Hub."""
    folders = {}
    for name, architecture in (("vision", VISION), ("text", TEXT)):
        torch.manual_seed(len(name))
        folders[name] = str(tmp_path / name)
        AutoModel.from_config(AutoConfig.for_model(**architecture)).save_pretrained(folders[name])
    return folders


def test_frozen_encoders_do_not_change(tiny_config: MakeConfig, pretrained: dict[str, str]) -> None:
    vocabulary = str(Path(__file__).parents[2] / "vg" / "models" / "small_vocabulary.txt")
    encoders = {"vision": {"id": pretrained["vision"]}, "text": {"id": pretrained["text"], "tokenizer": vocabulary}}
    config = tiny_config(
        model={"name": "rec", "image_size": 32, "head": HEAD, **encoders}, train={"max_steps": 3, "ema": 0.9}
    )
    trainer = Trainer(config)
    for encoder in (trainer.unwrapped_model.vision, trainer.unwrapped_model.text):
        assert not encoder.is_loaded
        assert encoder.network  # loads it
    frozen = {n: p.clone() for n, p in trainer.unwrapped_model.named_parameters() if n.startswith(("vision.", "text."))}
    source = load_file(Path(pretrained["text"]) / "model.safetensors")
    assert frozen["text.network.embeddings.word_embeddings.weight"].equal(source["embeddings.word_embeddings.weight"])

    step, modes = trainer.step, []
    trainer.step = lambda batch: (
        modes.append((trainer.unwrapped_model.training, trainer.unwrapped_model.vision.training)),
        step(batch),
    )[1]  # type: ignore
    trainer.fit()
    assert set(modes) == {(True, False)}
    assert not any(
        module.training
        for encoder in (trainer.unwrapped_model.vision, trainer.unwrapped_model.text)
        for module in encoder.modules()
    )
    for name, parameter in trainer.unwrapped_model.named_parameters():
        if name in frozen:
            assert parameter.grad is None, name
            assert parameter.equal(frozen[name]), name
    optimized = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == set(trainer.unwrapped_model.head.parameters())
    saved = load_file(Path(config.train.output) / "best" / "model.safetensors")
    assert saved
    assert all(name.startswith("head.") for name in saved)
    loaded, _ = read_model(config.train.output)
    for name, parameter in loaded.named_parameters():
        assert parameter.equal(trainer.unwrapped_model.get_parameter(name)) or name.startswith("head."), name


def test_frozen_encoders_from_scratch_are_saved(tiny_config: MakeConfig) -> None:
    encoders = {"vision": {"architecture": VISION}, "text": {"architecture": TEXT}}
    config = tiny_config(model={"name": "rec", "image_size": 32, "head": HEAD, **encoders}, train={"max_steps": 1})
    trainer = Trainer(config)
    trainer.fit()
    loaded, _ = read_model(config.train.output)
    for name, value in trainer.unwrapped_model.state_dict().items():
        assert loaded.state_dict()[name].equal(value), name
