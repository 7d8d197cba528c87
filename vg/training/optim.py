"""Optimizer, learning-rate schedule and moving average of the weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from vg.errors import ConfigError, closest
from vg.settings import Settings
from vg.training.lora import LoraConfig, add_adapters

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vg.config import RunConfig
    from vg.models.base import GroundingModel

logger = logging.getLogger(__name__)

Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass
class GroupConfig(Settings):
    """Overrides for the parameters of one module; null uses the value of `optim`."""

    lr: NonNegativeFloat | None = None
    weight_decay: NonNegativeFloat | None = None


@dataclass
class OptimConfig(Settings):
    """Optimizer with linear warm-up and a schedule; trainable modules and per-module settings."""

    algorithm: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the weights of linear layers and convolutions, AdamW for everything else, with the same learning
    rate and weight decay. Networks that start from random weights learn in fewer steps."""
    lr: NonNegativeFloat = 1e-4
    batch_size: PositiveInt | None = None
    """Samples per optimizer step (processes x data.batch_size x train.accumulate) that the learning rates are meant
    for; another number is logged. null: not checked."""
    scale_lr: bool = False
    """Multiply all learning rates by the actual number of samples per step / `batch_size`."""
    weight_decay: NonNegativeFloat = 0.01
    """Not applied to biases, norm weights and other vectors, unless `decay_vectors`."""
    decay_vectors: bool = False
    """Apply weight decay to all parameters, as in the training of DETR and Grounding DINO."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    clip_norm: PositiveFloat | None = 1.0
    """Maximum norm of the gradient; null disables clipping."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    milestones: list[PositiveFloat] = field(default_factory=list)
    """Epochs after which `schedule: step` multiplies the learning rate by `decay`."""
    decay: PositiveFloat = 0.1
    freeze: list[str] = field(default_factory=list)
    """Modules to freeze, for example [text, backbone]. Their dropout stays active, as in published recipes."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the weights; they are merged in checkpoints, which load like any other."""
    groups: dict[str, GroupConfig] = field(default_factory=dict)
    """Module name -> its overrides, for example `vision: {lr: 1e-5}`; the longest matching name applies."""

    def __post_init__(self) -> None:
        if self.lora and self.algorithm == "muon":
            raise ValueError("lora trains matrices of low rank, which muon is not meant for: use algorithm: adamw")
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError(
                "milestones, such as [11] of 12 epochs, are required by schedule: step and allowed by no other, which "
                "needs milestones: []"
            )
        if self.milestones != sorted(self.milestones):
            raise ValueError(f"milestones ({self.milestones}) must be in ascending order")
        if self.scale_lr and self.batch_size is None:
            raise ValueError("scale_lr needs batch_size, the samples per step that the learning rates are meant for")


def select_trainable(model: GroundingModel, config: OptimConfig) -> None:
    """Freeze the modules of `optim.freeze` and add the adapters of `optim.lora`; call it before build_optimizer.

    Raises:
        ConfigError: a name matches no trainable parameter or linear layer.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for prefix in config.freeze:
        _check_name(prefix, "freeze", parameters)
        for name, parameter in parameters.items():
            if _belongs(name, prefix):
                parameter.requires_grad_(False)
    if config.lora:
        add_adapters(model, config.lora)


def count_parameters(config: RunConfig) -> tuple[int, int]:
    """Return the number of all parameters of a run's model, and of those that it trains; both include adapters.

    Raises:
        ConfigError: an encoder cannot be loaded, or as `select_trainable`.
    """
    import torch

    with torch.device("meta"):
        model = config.model.build(pretrained=False)
        select_trainable(model, config.optim)
    return model.num_parameters(), model.num_parameters(trainable_only=True)


def lr_factor(config: OptimConfig, batch_size: int) -> float:
    """Return what all learning rates are multiplied by if a step has `batch_size` samples; log what differs."""
    if config.batch_size in (None, batch_size):
        return 1.0
    factor = batch_size / config.batch_size
    advice = (
        f"the learning rates are multiplied by {factor:.4g}"
        if config.scale_lr
        else (
            f"change train.accumulate or processes, or set optim.scale_lr=true, which multiplies them by {factor:.4g}"
        )
    )
    logger.warning(
        "a step has %d samples (processes x data.batch_size x train.accumulate), the learning rates are meant for %d: "
        "%s",
        batch_size,
        config.batch_size,
        advice,
    )
    return factor if config.scale_lr else 1.0


def build_optimizer(model: nn.Module, config: OptimConfig, factor: float = 1.0) -> torch.optim.Optimizer:
    """One parameter group per learning rate and weight decay (and algorithm); frozen parameters are excluded.

    Args:
        factor: of all learning rates, see lr_factor.

    Raises:
        ConfigError: no parameter is trainable, or a name in `optim.groups` is not in `optim.freeze` and matches no
            trainable parameter.
    """
    import torch

    from vg.training.muon import MuonWithAdamW, matrices

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ConfigError("nothing to train: every parameter is frozen")
    for prefix in config.groups:
        if not any(_belongs(prefix, frozen) for frozen in config.freeze):
            _check_name(prefix, "groups", parameters)
    use_muon = set(matrices(model)) if config.algorithm == "muon" else set()
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        prefixes = [prefix for prefix in config.groups if _belongs(name, prefix)]
        group = config.groups[max(prefixes, key=len)] if prefixes else GroupConfig()
        lr = config.lr if group.lr is None else group.lr
        weight_decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        if parameter.dim() <= 1 and not config.decay_vectors:
            weight_decay = 0.0
        groups.setdefault((lr * factor, weight_decay, parameter in use_muon), []).append(parameter)
    of_muon, of_adamw = (
        [
            {"params": params, "lr": lr, "weight_decay": decay}
            for (lr, decay, is_matrix), params in groups.items()
            if is_matrix is muon
        ]
        for muon in (True, False)
    )
    if config.algorithm == "muon":
        if not of_muon:
            raise ConfigError("optim.algorithm=muon: no matrix is trained, set optim.algorithm=adamw")
        return MuonWithAdamW(of_muon, of_adamw, config.betas)
    return torch.optim.AdamW(of_adamw, lr=config.lr * factor, betas=config.betas, fused=True)


def _belongs(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _check_name(prefix: str, setting: str, parameters: Mapping[str, nn.Parameter]) -> None:
    if not any(_belongs(name, prefix) for name in parameters):
        modules = {name[:end] for name in parameters for end, letter in enumerate(name) if letter == "."}
        near = closest(prefix, modules, limit=3, cutoff=0.6) or sorted({m for m in modules if "." not in m})
        raise ConfigError(f"optim.{setting}.{prefix}: no trainable parameter there; near names: {', '.join(near)}")


def build_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, num_steps: int, steps_per_epoch: int = 1
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up from 0, then cosine to 0 at num_steps, constant, or decay at milestones (epochs)."""
    import torch

    factor = _lr_factors(config, num_steps, steps_per_epoch)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def fit_schedule(
    schedule: torch.optim.lr_scheduler.LambdaLR, config: OptimConfig, num_steps: int, steps_per_epoch: int
) -> None:
    """Change the number of steps of a schedule; it applies from the next step of the schedule."""
    schedule.lr_lambdas = [_lr_factors(config, num_steps, steps_per_epoch)] * len(schedule.lr_lambdas)


def restore_schedule(schedule: torch.optim.lr_scheduler.LambdaLR, state: dict[str, Any]) -> None:
    """Restore the position of a schedule, after its optimizer; changed learning rates of the configuration apply."""
    configured = schedule.base_lrs
    schedule.load_state_dict({**state, "base_lrs": configured})
    for index, group in enumerate(schedule.optimizer.param_groups):
        before, now = state["base_lrs"][index], configured[index]
        if now != before:  # else the exact value of the checkpoint, which `train.minutes` may have changed
            factor = group["lr"] / before if before else schedule.lr_lambdas[index](schedule.last_epoch)
            group["lr"] = now * factor
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


def _lr_factors(config: OptimConfig, num_steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """What the learning rates are multiplied by at every step, see build_schedule."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / (config.warmup_steps + 1)
        if config.schedule == "constant":
            return 1.0
        if config.schedule == "step":
            return config.decay ** sum(step >= round(epoch * steps_per_epoch) for epoch in config.milestones)
        progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
        return (1 + math.cos(math.pi * min(1.0, progress))) / 2

    return factor


class Ema:
    """Exponential moving average of the trainable parameters.

    The decay is (1 + step) / (10 + step), at most `decay`, so the random initial weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.restart()

    def restart(self) -> None:
        """Restart the average from the current weights."""
        self.num_updates = 0
        self.averages = [p.detach().clone() for p in self.parameters]

    def update(self) -> None:
        import torch

        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, [p.data for p in self.parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context, the model has the averaged weights."""
        own = [p.detach().clone() for p in self.parameters]
        self._copy(self.averages)
        try:
            yield
        finally:
            self._copy(own)

    def _copy(self, weights: Sequence[Tensor]) -> None:
        """Change the parameters in place, because FSDP2 would not notice other tensors."""
        for parameter, values in zip(self.parameters, weights, strict=True):
            parameter.detach().copy_(values)

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_updates = state["num_updates"]
        for own, saved in zip(self.averages, state["averages"], strict=True):
            own.copy_(saved)
