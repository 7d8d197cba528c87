"""State of training (position, weights, their average, optimizer): saving and restoring."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from vg import checkpoint
from vg.config import RunConfig
from vg.errors import CheckpointError, DamagedCheckpointError
from vg.models.base import GroundingModel
from vg.training.fsdp import gather_full
from vg.training.lora import merged_weights
from vg.training.optim import Ema
from vg.training.sharded_state import files_of, read_shards, split, write_shards

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Position and counters of a run; saved with every checkpoint."""

    samples_per_step: int
    best_metric: str  # flat key
    step: int = 0  # completed optimizer steps
    epoch: int = 0
    fitted_steps: int = 0  # of the whole run without `train.max_steps`; 0 until `train.minutes` has determined it
    minutes: float | None = None  # the `train.minutes` that did
    samples: int = 0  # of this epoch that all processes together have used
    evaluated_step: int = 0
    best: float = -math.inf
    evaluations_since_best: int = 0
    skipped: int = 0  # steps skipped because of a non-finite loss or gradient
    skipped_in_a_row: int = 0
    restored: int = 0  # how often non-finite weights were restored from a checkpoint

    def continued(self, config: RunConfig, samples_per_step: int, best_metric: str) -> Progress:
        """Return the progress at which a resumed run begins.

        Warns if the steps had another number of samples, or if the best score is that of another metric and is reset.
        """
        before = self.samples_per_step
        if before != samples_per_step and PartialState().is_main_process:
            position = "at the same sample"
            if config.data.group_by_aspect_ratio:
                position = "after as many samples of this epoch, some of which occur twice or never"
            logger.warning(
                "the checkpoint of step %d is from a run with %d samples per step, now there are %d (data.batch_size x "
                "processes x train.accumulate): it continues %s, but with other steps and another schedule than "
                "without an interruption",
                *(self.step, before, samples_per_step, position),
            )
        continued = replace(self, samples_per_step=samples_per_step, best_metric=best_metric)
        if self.best_metric == best_metric:
            return continued
        if PartialState().is_main_process:
            logger.warning(
                "the best score of the checkpoint of step %d is of %s, but train.best_metric is %s now: the next "
                "evaluation replaces the best checkpoint",
                *(self.step, self.best_metric, best_metric),
            )
        return replace(continued, best=-math.inf, evaluations_since_best=0)


class TrainingState:
    """Everything that an optimizer step changes."""

    def __init__(
        self, config: RunConfig, model: GroundingModel, optimizer: AcceleratedOptimizer, accelerator: Accelerator
    ):
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.scaler = accelerator.scaler
        self.is_main_process = accelerator.is_main_process
        self.ema = Ema(model, config.train.ema) if config.train.ema else None

    def evaluated_weights(self) -> AbstractContextManager[None]:
        """Within the context, the model has the weights to evaluate and export: the EMA weights, if enabled."""
        return self.ema.applied() if self.ema else nullcontext()

    def export(self) -> Callable[[Path], None]:
        """Return what writes the evaluated weights as a plain checkpoint; all processes must call `export`.

        Adapters are merged into the layers they adapt.
        """
        weights = {}
        with self.evaluated_weights():
            for name, value in merged_weights(self.model, self.config.optim.lora).items():
                value = gather_full(value)  # one after another: the main process alone keeps them
                if self.is_main_process:
                    weights[name] = value.detach().to("cpu", copy=True)
        model = self.model
        return lambda folder: checkpoint.write_weights(folder, weights, self.config, model.text_spec, model.classes)

    def snapshot(self, extra: dict[str, Any]) -> dict[str, Any]:
        """Return functions that write the exported model and the state that training needs to continue.

        They are arguments of RunFolder.save; all processes must call it.

        Args:
            extra: further entries of the state.
        """
        exported = self.ema is None and self.config.optim.lora is None
        state = {
            "weights": None if exported else self.model.own_state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "ema": self.ema.state_dict() if self.ema else None,
        }
        export, (state, shards) = self.export(), split(state)

        def write(folder: Path) -> None:
            export(folder)
            checkpoint.write_training_state(folder, state | {"shards": files_of(folder)} | extra)

        return {"write": write, "write_shards": partial(write_shards, shards)} if shards else {"write": write}

    def load(self, folder: Path) -> dict[str, Any]:
        """Restore weights, average, optimizer and gradient scaler, and return all that `snapshot` wrote.

        Processes may be others than those that wrote it, with or without FSDP2.

        Raises:
            DamagedCheckpointError: a file is missing or damaged; nothing was restored.
            CheckpointError: it does not match the configuration.
        """
        state = checkpoint.read_training_state(folder)
        names = {field.name for field in fields(Progress)}
        if not isinstance(state["progress"], dict) or state["progress"].keys() != names:
            raise DamagedCheckpointError(
                f"cannot resume from {folder / checkpoint.TRAINING}: its progress must have {', '.join(sorted(names))}"
            )
        state = read_shards(folder, state, self._layouts())
        if state["weights"] is None or self.config.optim.lora is None:
            checkpoint.load_weights(self.model, folder, self.config)
        try:
            if state["weights"] is not None:
                self.model.load_own_state_dict(state["weights"])
            self._load_optimizer(state["optimizer"])
        except ValueError as error:
            path = folder / checkpoint.TRAINING
            raise CheckpointError(
                f"{path} does not match the configuration (model, optim.algorithm, optim.lora, optim.groups, or an "
                f"optim.lr or optim.weight_decay that merges or splits groups): {error}"
            ) from error
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema and state["ema"]:
            self.ema.load_state_dict(state["ema"])
        elif self.ema:  # enabled since the checkpoint: the average starts from the restored weights
            self.ema.restart()
        return state

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Restore the state of the optimizer, but keep the configured weight decay and betas.

        Learning rates are those of the checkpoint: `vg.training.optim.restore_schedule` adapts them.
        """
        configured = self.optimizer.param_groups
        self.optimizer.load_state_dict(state)
        for group, own in zip(self.optimizer.param_groups, configured, strict=True):
            group |= {key: own[key] for key in ("initial_lr", "weight_decay", "betas") if key in own}

    def _layouts(self) -> dict[str, Tensor]:
        """Return the weight like which a tensor of the state is distributed, by the beginning of its name."""
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        averages = self.ema.parameters if self.ema else ()
        return (
            {f"weights.{name}": value for name, value in self.model.own_state_dict().items()}
            | {f"optimizer.state.{index}": parameter for index, parameter in enumerate(parameters)}
            | {f"ema.averages.{index}": parameter for index, parameter in enumerate(averages)}
        )
