"""`train.minutes`: a run ends after that time with a learning rate of zero, also after it was interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import scripted_result
from vg.config import RunConfig, load_config
from vg.errors import ConfigError
from vg.training import report
from vg.training.time_budget import last_step
from vg.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still unless `timed` moves it."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(report, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def timed(trainer: Trainer, clock: SimpleNamespace, step: float, evaluation: float, first: float = 10.0) -> Trainer:
    """Let steps and evaluations take these seconds, and each of the first three steps `first`."""
    own, scores = trainer.step, iter(x / 1000 for x in range(1000))

    def slow_step(batches: Any) -> Any:
        clock.now += first if trainer.progress.step < 3 else step
        return own(batches)

    def slow_evaluation(model: Any) -> Any:
        clock.now += evaluation
        return scripted_result(miou=next(scores))

    trainer.step = slow_step  # type: ignore[method-assign]
    trainer.evaluator.run = slow_evaluation  # type: ignore[method-assign]
    return trainer


@pytest.mark.parametrize("evaluation", [0.5, 15.0])
@pytest.mark.parametrize("eval_every", [10, 40, 1000])
def test_a_run_takes_the_time_and_ends_with_a_learning_rate_of_zero(
    tiny_config: MakeConfig, clock: SimpleNamespace, evaluation: float, eval_every: int
) -> None:
    config = tiny_config(train={"minutes": 5, "eval_every": eval_every, "epochs": 1})
    trainer = timed(Trainer(config), clock, 2.0, evaluation)
    trainer.fit()
    seconds = clock.now - 1000
    assert 0.9 * 300 <= seconds <= 1.1 * 300
    assert trainer.progress.step == trainer.num_steps == trainer.progress.fitted_steps == trainer.budget.bar.total
    assert max(trainer.schedule.get_last_lr()) == 0
    assert trainer.progress.evaluated_step == trainer.num_steps


def test_few_slow_steps_are_enough(tiny_config: MakeConfig, clock: SimpleNamespace) -> None:
    trainer = timed(Trainer(tiny_config(train={"minutes": 5, "eval_every": 99})), clock, 20.0, 5.0, first=20.0)
    trainer.fit()
    assert 0.9 * 300 <= clock.now - 1000 <= 1.1 * 300


def test_an_evaluation_that_takes_all_the_time_is_the_last(tiny_config: MakeConfig, clock: SimpleNamespace) -> None:
    config = tiny_config(train={"minutes": 5, "eval_every": 30, "save_every": 1000})
    trainer = timed(Trainer(config), clock, 2.0, 400.0, first=2.0)
    trainer.fit()
    assert trainer.progress.step == trainer.num_steps == 30
    assert clock.now - 1000 == 30 * 2 + 400
    assert [path.name for path in trainer.folder.checkpoints()] == ["step_000030"]


def test_a_long_evaluation_before_the_first_step_does_not_shorten_the_timing(
    tiny_config: MakeConfig, clock: SimpleNamespace
) -> None:
    train = {"minutes": 5, "eval_every": 1000, "eval_first": True}
    trainer = timed(Trainer(tiny_config(train=train)), clock, 2.0, 40.0, first=8.0)
    trainer.fit()
    assert 0.9 * 300 <= clock.now - 1000 <= 1.1 * 300


def test_the_lower_limit_applies(
    tiny_config: MakeConfig, clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = timed(Trainer(tiny_config(train={"minutes": 5, "max_steps": 30})), clock, 1.0, 0.0)
    trainer.fit()
    assert trainer.progress.step == trainer.num_steps == 30
    assert "30 steps (train.max_steps) in train.minutes=5: 1000 ms per step" in capsys.readouterr().out


def test_the_plan_names_the_minutes(tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(tiny_config(train={"minutes": 1.5}))
    trainer.report.begin()
    assert "1.5 minutes of steps of 4 samples (epochs of 5 steps) on cpu" in capsys.readouterr().out


@pytest.mark.parametrize("stop_at", [7, 30, 60])
def test_a_resumed_run_is_the_same(
    tiny_config: MakeConfig, clock: SimpleNamespace, tmp_path: Path, stop_at: int
) -> None:
    """Interrupted before the number of steps is known, before its correction, and after it."""
    train = {"minutes": 3, "eval_every": 40}
    straight = timed(Trainer(tiny_config(train=train | {"output": str(tmp_path / "straight")})), clock, 2.0, 4.0, 2.0)
    straight.fit()
    config = tiny_config(train=train | {"output": str(tmp_path / "resumed")})
    interrupted = timed(Trainer(config), clock, 2.0, 4.0, 2.0)
    interrupted.stop.requested = lambda: interrupted.progress.step == stop_at  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        interrupted.fit()
    clock.now += 10_000
    resumed = timed(Trainer(config, resume=True), clock, 2.0, 4.0, 2.0)
    if stop_at > 25:
        assert resumed.num_steps == interrupted.num_steps == resumed.budget.total
    else:
        assert resumed.budget.total is None
    resumed.fit()
    assert max(resumed.schedule.get_last_lr()) == 0
    if stop_at == 60:
        assert resumed.progress.step == straight.progress.step
        weights = [load_file(tmp_path / name / "best" / "model.safetensors") for name in ("straight", "resumed")]
        assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])


def test_a_run_that_is_killed_after_the_correction_keeps_it(
    tiny_config: MakeConfig, clock: SimpleNamespace, tmp_path: Path
) -> None:
    """Although the checkpoint of the first evaluation, whose time is part of the correction, is written before it."""
    config = tiny_config(train={"minutes": 3, "eval_every": 40, "output": str(tmp_path / "run")})
    killed = timed(Trainer(config), clock, 2.0, 4.0, 2.0)

    def kill() -> bool:
        if killed.progress.step == 60:
            raise SystemExit
        return False

    killed.stop.requested = kill  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        killed.fit()
    resumed = Trainer(config, resume=True)
    assert resumed.progress.step == 40
    assert resumed.num_steps == killed.num_steps


def test_a_limit_also_applies_to_a_resumed_run(tiny_config: MakeConfig, clock: SimpleNamespace, tmp_path: Path) -> None:
    train = {"minutes": 3, "eval_every": 1000, "output": str(tmp_path / "run")}
    interrupted = timed(Trainer(tiny_config(train=train)), clock, 2.0, 4.0, 2.0)
    interrupted.stop.requested = lambda: interrupted.progress.step == 30  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        interrupted.fit()
    assert interrupted.num_steps > 40
    resumed = timed(Trainer(tiny_config(train=train | {"max_steps": 40}), resume=True), clock, 2.0, 4.0, 2.0)
    resumed.fit()
    assert resumed.progress.step == 40
    assert max(resumed.schedule.get_last_lr()) == 0


def test_other_minutes_of_a_resumed_run_are_announced(
    tiny_config: MakeConfig, clock: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = {"minutes": 3, "eval_every": 1000, "output": str(tmp_path / "run")}
    interrupted = timed(Trainer(tiny_config(train=train)), clock, 2.0, 4.0, 2.0)
    interrupted.stop.requested = lambda: interrupted.progress.step == 30  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        interrupted.fit()
    Trainer(tiny_config(train=train), resume=True)
    assert "train.minutes" not in caplog.text
    resumed = Trainer(tiny_config(train=train | {"minutes": 6}), resume=True)
    assert resumed.num_steps == interrupted.num_steps
    assert (
        f"train.minutes=6 has no effect: the interrupted run was fitted to 3 minutes, {interrupted.num_steps} steps"
        in caplog.text
    )


def test_last_step_against_a_simulation() -> None:
    def duration(end: int, step: int, per_step: float, evaluation: float, every: int) -> float:
        seconds = 0.0
        for number in range(step + 1, end + 1):
            seconds += per_step + evaluation * (number % every == 0 or number == end)
        return seconds

    for seconds in (0.0, 3.0, 29.5, 100.0, 333.25):
        for arguments in ((0, 1.0, 0.0, 5), (7, 0.5, 3.0, 10), (10, 2.0, 9.0, 10), (25, 0.25, 20.0, 1000)):
            end, step = last_step(seconds, *arguments), arguments[0]
            assert end == max(step, 1) or duration(end, *arguments) <= seconds
            assert all(duration(later, *arguments) > seconds for later in range(max(end, step) + 1, end + 200))


def test_milestones_are_refused(tiny_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"optim\.milestones are epochs, which train\.minutes replaces") as caught:
        tiny_config(train={"minutes": 5}, optim={"schedule": "step", "milestones": [1]})
    _, advice = str(caught.value).split(": use ")
    recipe = Path(__file__).parents[2] / "configs" / "grounding_dino" / "finetune_coco_swin_t.yaml"
    load_config(recipe, ["train.minutes=5", *advice.split(" and ")])
