"""Parameter groups, the learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from vg.config import RunConfig
from vg.errors import ConfigError
from vg.training.optim import (
    Ema,
    GroupConfig,
    OptimConfig,
    build_optimizer,
    build_schedule,
    lr_factor,
    select_trainable,
)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        self.vision_projection = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)


def settings(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter, by name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}


def test_groups_by_module_name() -> None:
    model = Network()
    groups = {"vision": GroupConfig(lr=1e-5), "vision.0": GroupConfig(weight_decay=0.5), "head": GroupConfig(lr=1.0)}
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, weight_decay=0.1, groups=groups))
    assert settings(model, optimizer) == {
        "vision.0.weight": (1e-3, 0.5),  # the longest matching name applies, and it has no lr
        "vision.0.bias": (1e-3, 0.0),
        "vision.1.weight": (1e-5, 0.0),
        "vision.1.bias": (1e-5, 0.0),
        "vision_projection.weight": (1e-3, 0.1),  # "vision" is a module, not a prefix of its name
        "vision_projection.bias": (1e-3, 0.0),
        "head.weight": (1.0, 0.1),
        "head.bias": (1.0, 0.0),
    }
    assert optimizer.defaults["betas"] == (0.9, 0.999)


def test_learning_rates_are_for_a_number_of_samples_per_step(caplog: pytest.LogCaptureFixture) -> None:
    assert lr_factor(OptimConfig(), 3) == lr_factor(OptimConfig(batch_size=32), 32) == 1
    assert not caplog.records
    assert lr_factor(OptimConfig(batch_size=32), 8) == 1
    assert lr_factor(OptimConfig(batch_size=32, scale_lr=True), 8) == 0.25
    unscaled, scaled = (record.getMessage() for record in caplog.records)
    assert unscaled.startswith("a step has 8 samples (processes x data.batch_size x train.accumulate), the learning")
    assert unscaled.endswith(
        "meant for 32: change train.accumulate or processes, or set optim.scale_lr=true, which multiplies them by 0.25"
    )
    assert scaled.endswith("meant for 32: the learning rates are multiplied by 0.25")
    model = Network()
    config = OptimConfig(lr=0.4, groups={next(model.named_children())[0]: GroupConfig(lr=0.04)})
    plain, quarter = build_optimizer(model, config), build_optimizer(model, config, 0.25)
    assert [group["lr"] / 4 for group in plain.param_groups] == [group["lr"] for group in quarter.param_groups]
    with pytest.raises(ValueError, match="scale_lr needs batch_size"):
        OptimConfig(scale_lr=True)


def test_learning_rate_of_zero() -> None:
    model = Network()
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, groups={"head": GroupConfig(lr=0.0, weight_decay=0.0)}))
    assert settings(model, optimizer)["head.weight"] == (0.0, 0.0)


def test_unknown_names_of_groups() -> None:
    model = Network()
    with pytest.raises(ValueError, match=r"optim\.groups\.visoin: no trainable parameter there; near names: vision"):
        build_optimizer(model, OptimConfig(groups={"visoin": GroupConfig(lr=1e-5)}))
    with pytest.raises(ValueError, match=r"near names: head, vision, vision_projection"):
        build_optimizer(model, OptimConfig(groups={"zzz": GroupConfig(lr=1e-5)}))
    model.vision.requires_grad_(False)
    with pytest.raises(ValueError, match=r"optim\.groups\.vision: no trainable parameter"):
        build_optimizer(model, OptimConfig(groups={"vision": GroupConfig(lr=1e-5)}))


def test_frozen_parameters_are_excluded() -> None:
    model = Network()
    model.vision.requires_grad_(False)
    assert not any(name.startswith("vision.") for name in settings(model, build_optimizer(model, OptimConfig())))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter is frozen"):
        build_optimizer(model, OptimConfig())


def rates(config: OptimConfig, num_steps: int, steps_per_epoch: int = 1) -> list[float]:
    """Learning rate of every step, and the one after the last step."""
    optimizer = build_optimizer(nn.Linear(1, 1), config)
    schedule = build_schedule(optimizer, config, num_steps, steps_per_epoch)
    values = []
    for _ in range(num_steps + 1):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


def test_cosine_with_warmup() -> None:
    values = rates(OptimConfig(lr=1.0, warmup_steps=4), 104)
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert values[4 + 50] == pytest.approx(0.5), "halfway down the cosine"
    assert all(later < earlier for earlier, later in pairwise(values[4:]))
    assert 0 < values[103] < 1e-3
    assert values[104] == pytest.approx(0, abs=1e-12)


def test_constant_schedule_and_a_warmup_longer_than_the_run() -> None:
    assert rates(OptimConfig(lr=1.0, warmup_steps=1, schedule="constant"), 5) == pytest.approx([0.5, 1, 1, 1, 1, 1])
    assert rates(OptimConfig(lr=1.0, warmup_steps=9), 3) == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_step_decay_at_milestones() -> None:
    """Four steps per epoch; published recipes combine step decay with warm-up."""
    config = OptimConfig(lr=1.0, warmup_steps=2, schedule="step", milestones=[1, 2.5])
    expected = [1 / 3, 2 / 3, 1, 1, *[0.1] * 6, *[0.01] * 2, 0.01]
    assert rates(config, 12, steps_per_epoch=4) == pytest.approx(expected)
    halved = OptimConfig(lr=1.0, schedule="step", milestones=[1], decay=0.5)
    assert rates(halved, 3, steps_per_epoch=2) == pytest.approx([1, 1, 0.5, 0.5])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "step"}, "are required by schedule: step"),
        ({"milestones": [3]}, r"are required by schedule: step and allowed by no other, which needs milestones: \[\]$"),
        ({"schedule": "step", "milestones": [3, 2]}, r"milestones \(\[3, 2\]\) must be in ascending order"),
    ],
)
def test_milestones_require_schedule_step(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**settings)


@pytest.mark.parametrize("betas", [[1.5, 0.9], [0.9, 1.0], [-0.1, 0.9]])
def test_betas_are_decay_rates(tiny_config: Callable[..., RunConfig], betas: list[float]) -> None:
    with pytest.raises(
        ConfigError, match=r"optim\.betas\.[01]: Input should be (less than 1|greater than or equal to 0)"
    ):
        tiny_config(optim={"betas": betas})


def test_weight_decay_of_vectors() -> None:
    model = Network()
    found = settings(model, build_optimizer(model, OptimConfig(lr=1.0, weight_decay=0.1, decay_vectors=True)))
    assert set(found.values()) == {(1.0, 0.1)}


def test_frozen_modules_by_name() -> None:
    model = Network()
    select_trainable(model, OptimConfig(freeze=["vision", "head.bias"]))  # type: ignore[arg-type]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"vision_projection.weight", "vision_projection.bias", "head.weight"}


def test_the_schedule_scales_every_group() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=1, groups={"head": GroupConfig(lr=0.1)})
    optimizer = build_optimizer(Network(), config)
    build_schedule(optimizer, config, 10)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5, 0.05}


def test_ema_equals_a_plain_loop() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    ema = Ema(model, 0.5)
    expected = model.weight.detach().clone()
    for step in range(1, 20):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.averages, [expected])


def test_ema_weights_are_applied_and_removed() -> None:
    model = Network()
    ema = Ema(model, 0.9)
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for average in ema.averages:
            average.zero_()
    with ema.applied():
        assert all(p.eq(0).all() for p in model.parameters())
    with pytest.raises(KeyboardInterrupt), ema.applied():
        raise KeyboardInterrupt
    for name, parameter in model.named_parameters():
        assert parameter.equal(own[name])
        assert parameter.requires_grad


def test_ema_continues_from_its_state() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    uninterrupted = Ema(model, 0.9)
    uninterrupted.update()
    resumed = Ema(nn.Linear(3, 2), 0.9)
    resumed.parameters = uninterrupted.parameters
    resumed.load_state_dict(uninterrupted.state_dict())
    for ema in (uninterrupted, resumed):
        with torch.no_grad():
            model.weight.fill_(2)
        ema.update()
    assert all(a.equal(b) for a, b in zip(uninterrupted.averages, resumed.averages, strict=True))
