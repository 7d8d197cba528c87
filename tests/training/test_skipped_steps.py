"""`train.on_nan: skip`: a non-finite loss skips one step and does not end the run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from tests.conftest import history
from tests.models.rec.test_model import TINY_RESNET
from tests.training.test_distributed import launch
from vg.config import RunConfig, dump_config
from vg.distributed import new_accelerator
from vg.errors import TrainingError
from vg.training.trainer import Trainer
from vg.types import Batch

MakeConfig = Callable[..., RunConfig]


def configured(make: MakeConfig, **train: Any) -> RunConfig:
    return make(train={"on_nan": "skip", "log_every": 1, "ema": 0.9, "epochs": 3, **train})


def poison(trainer: Trainer, *steps: int, how: float = float("nan")) -> None:
    """Make the loss of these steps non-finite."""
    loss = trainer.unwrapped_model.loss

    def poisoned(output: Any, batch: Any) -> dict[str, Tensor]:
        terms = loss(output, batch)
        return {name: term * (how if trainer.progress.step + 1 in steps else 1) for name, term in terms.items()}

    trainer.unwrapped_model.loss = poisoned  # type: ignore[method-assign]


def recorded(trainer: Trainer) -> list[dict[str, Tensor]]:
    """Record weights, averages and optimizer moments after every step."""
    step, seen = trainer.step, []

    def remember(batches: Sequence[Batch]) -> dict[str, Tensor] | None:
        terms = step(batches)
        assert trainer.state.ema is not None
        moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
        values = [*trainer.unwrapped_model.state_dict().values(), *trainer.state.ema.averages, *moments]
        seen.append({str(index): value.clone() for index, value in enumerate(values)})
        return terms

    trainer.step = remember  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("how", [float("nan"), float("inf")])
def test_the_step_is_skipped_and_the_run_continues(
    tiny_config: MakeConfig, caplog: pytest.LogCaptureFixture, how: float
) -> None:
    config = configured(tiny_config)
    trainer = Trainer(config)
    poison(trainer, 3, 4, how=how)
    seen = recorded(trainer)
    with caplog.at_level(logging.WARNING):
        trainer.fit()
    for before, after in ((1, 2), (1, 3)):
        assert all(seen[after][name].equal(value) for name, value in seen[before].items())
    assert any(not seen[4][name].equal(value) for name, value in seen[3].items())
    assert "the loss or its gradient is not finite at step 3: step skipped (1 so far)" in caplog.text
    assert "at step 4: step skipped (2 so far)" in caplog.text
    losses = [row for row in history(config) if "loss" in row]
    assert [row["step"] for row in losses] == [1, 2, *range(5, 16)]
    assert [row.get("skipped") for row in losses] == [None, None, *[2] * 11]
    assert trainer.progress.step == 15
    assert trainer.progress.skipped_in_a_row == 0
    assert all(weights.isfinite().all() for weights in trainer.unwrapped_model.state_dict().values())


def test_a_non_finite_gradient_of_a_finite_loss(tiny_config: MakeConfig) -> None:
    for clip_norm in (1.0, None):
        config = configured(tiny_config, max_steps=4)
        config.optim.clip_norm = clip_norm
        trainer = Trainer(config, overwrite=True)
        weight = next(trainer.unwrapped_model.head.parameters())
        weight.register_hook(lambda x, run=trainer: x * float("nan") if run.progress.step == 1 else x)
        trainer.fit()
        assert trainer.progress.skipped == 1
        assert all(weights.isfinite().all() for weights in trainer.unwrapped_model.state_dict().values())


def test_ten_consecutive_skips_end_the_run(tiny_config: MakeConfig) -> None:
    config = configured(tiny_config, save_every=2, max_steps=15)
    trainer = Trainer(config)
    poison(trainer, *range(6, 99))
    with pytest.raises(TrainingError, match=r"not finite at step 15, nor at the 9 steps before.*optim\.lr"):
        trainer.fit()
    assert trainer.folder.checkpoints()[-1].name == "step_000014"
    resumed = Trainer(config, resume=True)
    assert resumed.progress.skipped_in_a_row == 9
    resumed.fit()
    assert resumed.progress.step == 15
    assert resumed.progress.skipped_in_a_row == 0


def break_weights(trainer: Trainer, after_step: int) -> None:
    """Make a weight infinite after a step whose loss and gradients are finite."""
    step = trainer.step

    def broken(batches: Sequence[Batch]) -> dict[str, Tensor] | None:
        terms = step(batches)
        if trainer.progress.step + 1 == after_step:
            with torch.no_grad():
                next(trainer.unwrapped_model.head.parameters()).fill_(float("inf"))
        return terms

    trainer.step = broken  # type: ignore[method-assign]


@pytest.mark.parametrize("save_every", [3, 5], ids=["detected at the next loss", "detected before saving"])
def test_non_finite_weights_are_restored_from_the_last_checkpoint(
    tiny_config: MakeConfig, caplog: pytest.LogCaptureFixture, save_every: int
) -> None:
    config = configured(tiny_config, save_every=save_every, eval_every=99, keep=9)
    trainer = Trainer(config)
    break_weights(trainer, after_step=10)
    trainer.fit()
    saved = "step_000009" if save_every == 3 else "step_000005"
    assert f"not finite after step {11 if save_every == 3 else 10}: restored from" in caplog.text
    assert saved in caplog.text
    assert trainer.progress.step == 15
    assert trainer.progress.restored == 1
    for folder in trainer.folder.checkpoints():
        state = torch.load(folder / "training.pt", weights_only=True)
        assert all(value.isfinite().all() for value in state["weights"].values())
        assert all(value.isfinite().all() for value in state["ema"]["averages"])
    rates = [row["lr"] for row in history(config) if "lr" in row]
    assert len(rates) >= 14
    assert all(later < earlier for earlier, later in pairwise(rates)), "the schedule continued"


def test_non_finite_weights_without_a_checkpoint_end_the_run(tiny_config: MakeConfig) -> None:
    trainer = Trainer(configured(tiny_config))
    break_weights(trainer, after_step=2)
    with pytest.raises(TrainingError, match=r"the weights head\..* are not finite after step 3"):
        trainer.fit()


SCRIPT = """
import sys
from vg.config import load_config
from vg.distributed import shut_down
from vg.training.trainer import Trainer

trainer = Trainer(load_config("config.yaml"))
loss = trainer.unwrapped_model.loss

def poisoned(output, batch):
    bad = trainer.progress.step == 2 and trainer.accelerator.process_index == 1
    return {name: term * (float("inf") if bad else 1) for name, term in loss(output, batch).items()}

trainer.unwrapped_model.loss = poisoned
trainer.fit()
sys.stdout.write(f"skipped {trainer.progress.skipped}\\n")  # one call, because two processes write
del trainer, loss
shut_down()
"""


def test_a_skipped_step_leaves_running_statistics(tiny_config: MakeConfig) -> None:
    config = configured(tiny_config)
    config.model.vision.architecture = TINY_RESNET  # type: ignore[union-attr]
    trainer = Trainer(config)
    poison(trainer, 1)
    trainer.model.train()
    before = {name: values.clone() for name, values in trainer.unwrapped_model.named_buffers()}
    batches = next(trainer.data.steps(0, 0))
    for step, is_equal in ((0, True), (1, False)):
        trainer.progress.step = step
        assert (trainer.step(batches) is None) == is_equal
        for name, values in trainer.unwrapped_model.named_buffers():
            if "running" in name or "tracked" in name:
                assert values.equal(before[name]) == is_equal, name


def test_all_processes_skip_the_same_step(tiny_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(configured(tiny_config, max_steps=4)))
    (tmp_path / "train.py").write_text(SCRIPT)
    assert launch(tmp_path).count("skipped 1") == 2


def test_a_gradient_scaler_continues_after_a_skipped_step(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in fp16, which needs a GPU: every step is closed for the scaler, and overflows are not counted as skips."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def with_scaler(**settings: Any) -> Accelerator:
        accelerator = new_accelerator(**settings)
        accelerator.scaler = scaler
        return accelerator

    monkeypatch.setattr("vg.training.trainer.new_accelerator", with_scaler)
    trainer = Trainer(configured(tiny_config, max_steps=6))
    assert isinstance(trainer.optimizer, AcceleratedOptimizer)
    assert trainer.optimizer.scaler is trainer.state.scaler is scaler
    monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")
    monkeypatch.setattr(trainer.accelerator, "native_amp", True)
    poison(trainer, 2)
    weight = next(trainer.unwrapped_model.head.parameters())
    weight.register_hook(lambda x: x * float("inf") if trainer.progress.step == 3 else x)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Seems like `optimizer.step")  # the schedule wraps the step that is taken
        trainer.fit()
    assert trainer.progress.step == 6
    assert trainer.progress.skipped == 1, "the overflow in step 4 does not count"
    assert trainer.schedule.last_epoch == 5, "the schedule counts it"
    assert scaler.get_scale() == 2.0**8, "both halve the scale"
    assert all(weights.isfinite().all() for weights in trainer.unwrapped_model.state_dict().values())
