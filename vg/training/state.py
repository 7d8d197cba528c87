"""What training changes - weights, their average, the optimiser - and its way to a checkpoint and back."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim.lr_scheduler import LambdaLR

from vg import checkpoint
from vg.config import RunConfig
from vg.errors import CheckpointError
from vg.models.base import GroundingModel
from vg.training.lora import merged_weights
from vg.training.optim import Ema


class TrainingState:
    """The moving parts of a run."""

    def __init__(
        self,
        config: RunConfig,
        model: GroundingModel,
        optimizer: AcceleratedOptimizer,
        schedule: LambdaLR,
        accelerator: Accelerator,
    ):
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.scaler = accelerator.scaler
        self.ema = Ema(model, config.train.ema) if config.train.ema else None

    def evaluated_weights(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that are evaluated and published: the average, if there is one."""
        return self.ema.applied() if self.ema else nullcontext()

    def export(self, folder: Path) -> None:
        """Write the model as anyone can read it: adapters are added to the weights that they adapt."""
        with self.evaluated_weights():
            weights = merged_weights(self.model)
        checkpoint.write_weights(folder, weights, self.config, self.model.text_spec.tokenizer)

    def save(self, folder: Path, more: dict[str, Any]) -> None:
        """Write the model, and beside it all that training needs to go on, `more` included."""
        self.export(folder)
        published = self.ema is None and self.config.optim.lora is None
        state = {
            "weights": None if published else self.model.own_state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "ema": self.ema.state_dict() if self.ema else None,
        }
        checkpoint.write_training_state(folder, state | more)

    def load(self, folder: Path) -> dict[str, Any]:
        """Take everything but the place on the schedule; returns all that `save` wrote.

        Raises:
            CheckpointError: a file is damaged, or does not fit the configuration.
        """
        state = checkpoint.read_training_state(folder)
        trouble = f"{folder / checkpoint.TRAINING} does not fit the configuration"
        if state["weights"] is None or self.config.optim.lora is None:
            checkpoint.load_weights(self.model, folder)
        if state["weights"] is not None:
            try:
                self.model.load_own_state_dict(state["weights"])
            except ValueError as error:
                raise CheckpointError(f"{trouble} (model, optim.lora): {error}") from error
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise CheckpointError(f"{trouble} (model, optim.groups): {error}") from error
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema and state["ema"]:
            self.ema.load_state_dict(state["ema"])
        elif self.ema:  # switched on now: the average begins here, not at the random start
            self.ema.restart()
        return state

    def non_finite_weight(self) -> str | None:
        """The name of the first parameter that is not finite; None where all are."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                return name
        return None
