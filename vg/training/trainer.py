"""The training loop: it knows a GroundingModel and samples, and neither a network nor a data set by name."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from vg.config import RunConfig
from vg.distributed import (
    StopSignal,
    mean_over_processes,
    new_accelerator,
    progress_bar,
    random_state,
    restore_random_state,
    seed_everything,
)
from vg.errors import ConfigError, TrainingError
from vg.evaluation.evaluator import Evaluator
from vg.training.data import TrainingData
from vg.training.interpolation import Interpolation, Sweep
from vg.training.loss_log import REMEDY, LossLog
from vg.training.optim import build_optimizer, build_schedule, choose_trained
from vg.training.run_folder import RunFolder
from vg.training.state import TrainingState
from vg.types import Batch

logger = logging.getLogger(__name__)

MAX_SKIPPED = 10  # steps in a row; more are no accident


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0  # optimiser steps done
    epoch: int = 0
    batch: int = 0  # batches of this epoch done, in each process
    evaluated_step: int = 0
    best: float = -math.inf
    evaluations_since_best: int = 0
    skipped: int = 0  # steps that were not taken, for their loss or gradient was no number
    skipped_in_a_row: int = 0
    restored: int = 0  # times that the weights were no numbers and came back from a checkpoint


class Trainer:
    """Trains what a RunConfig describes.

    Args:
        resume: go on from the newest checkpoint in `train.output`.
        overwrite: start anew where `train.output` holds a run already.

    Raises:
        CheckpointError: `train.output` holds a run and neither argument is given, or nothing is there to resume.
    """

    def __init__(self, config: RunConfig, resume: bool = False, overwrite: bool = False):
        self.config = config
        self.accelerator = new_accelerator(
            mixed_precision=config.train.precision,
            log_with=config.train.trackers or None,
            project_dir=Path(config.train.output) / "logs",
        )
        self.folder = RunFolder(config, self.accelerator)
        self.folder.claim(resume, overwrite)
        seed_everything(config.train.seed)

        self.unwrapped_model = config.model.build()  # the network itself; self.model may be a wrapper around it
        self.evaluator = Evaluator(config.data, self.unwrapped_model, self.accelerator)
        self.best_metric = self.evaluator.resolve_best_metric(config.train.best_metric)
        self.data = TrainingData(config, self.unwrapped_model, self.accelerator, self.evaluator.sources)
        choose_trained(self.unwrapped_model, config.optim)
        self.model, self.optimizer = self.accelerator.prepare(
            self.unwrapped_model, build_optimizer(self.unwrapped_model, config.optim)
        )

        self.steps_per_epoch = self.data.steps_per_epoch
        self.num_steps = config.train.epochs * self.steps_per_epoch
        if config.train.max_steps:
            self.num_steps = min(self.num_steps, config.train.max_steps)
        # Not prepared: Accelerate would step the schedule once for every process.
        self.schedule = build_schedule(self.optimizer.optimizer, config.optim, self.num_steps, self.steps_per_epoch)
        self.state = TrainingState(config, self.unwrapped_model, self.optimizer, self.schedule, self.accelerator)

        self.progress = Progress()
        self.stop = StopSignal(self.accelerator)
        self.losses = LossLog(self.accelerator)
        self.folder.begin(resume)  # not before everything else has worked: it removes an overwritten run
        if resume:
            self.restore(self.folder.checkpoints()[-1])

    def fit(self) -> dict[str, Any]:
        """Train to the end and return the results of the best evaluation.

        Raises:
            TrainingError: a loss or a weight is not finite.
            CheckpointError: a checkpoint could not be written (earlier ones are intact).
            SystemExit: SIGTERM or Ctrl-C came; the state is saved and the message says how to go on.
        """
        self._start_trackers()
        self.model.train()
        with (
            self.stop.listening(),
            progress_bar(self.accelerator, total=self.num_steps, initial=self.progress.step, desc="train") as bar,
        ):
            if self.config.train.eval_first and not self.progress.step:
                self.evaluate()
            finished = self._after_step(bar) if self.progress.step else False
            while not finished:
                for batches in self.data.steps(self.progress.epoch, self.progress.batch):
                    terms = self.step(batches)
                    self.progress.batch += len(batches)
                    self.progress.step += 1
                    self._count(terms)
                    bar.update()
                    finished = self._after_step(bar)
                    if finished:
                        break
                else:
                    self.progress.epoch, self.progress.batch = self.progress.epoch + 1, 0
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.stop:
            raise SystemExit(
                f"stopped at step {self.progress.step}, saved in {self.folder.path}; "
                "the same command with --resume goes on"
            )
        if self.config.train.interpolate:
            self.interpolate(self.config.train.interpolate)
        return self.folder.best_results()

    def step(self, batches: Sequence[Batch]) -> dict[str, Tensor] | None:
        """One optimiser step; how its samples are cut into batches and processes makes no difference.

        Returns:
            The terms of the loss; None where the step was not taken (`train.on_nan: skip`).
        """
        weights = [self.unwrapped_model.batch_weight(batch) for batch in batches]
        divisor = self._mean_weight(sum(weights))
        terms: dict[str, Tensor] = {}
        for place, (batch, weight) in enumerate(zip(batches, weights, strict=True), start=1):
            with self.accelerator.no_sync(self.model) if place < len(batches) else nullcontext():
                output = self.model(batch)
                # A loss is a sum over what the batch weighs, divided by the weight: the sum counts, not the batch.
                losses = {
                    name: x * (max(1, weight) / divisor) for name, x in self.unwrapped_model.loss(output, batch).items()
                }
                self.accelerator.backward(torch.stack(list(losses.values())).sum())
            terms = {name: terms.get(name, 0) + loss.detach() for name, loss in losses.items()}
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm or math.inf)
        taken = self.config.train.on_nan == "stop" or self._is_finite(terms, norm)
        if taken:
            self.optimizer.step()
            if not self.accelerator.optimizer_step_was_skipped:  # fp16: the gradients overflowed
                self.schedule.step()
            if self.state.ema:
                self.state.ema.update()
        elif self.accelerator.scaler:
            self.accelerator.scaler.update()  # it has seen these gradients, and waits for the end of the step
        self.optimizer.zero_grad()
        return terms if taken else None

    def evaluate(self) -> None:
        """Judge the weights to be published, and keep them in `best` where they are the best so far."""
        progress, name = self.progress, self.best_metric
        with self.state.evaluated_weights():
            results = self.evaluator.run(self.unwrapped_model)
            if name not in results:
                raise ConfigError(f"train.best_metric: {name!r} is none of {', '.join(results)}")
            progress.evaluated_step = progress.step
            progress.evaluations_since_best += 1
            if results[name] > progress.best:
                progress.best, progress.evaluations_since_best = results[name], 0
                self.folder.save_best({"step": progress.step, **results}, self.state.export)
        change = self.evaluator.change(self.folder.history.rows(), results)
        if change and self.accelerator.is_main_process:
            logger.info("since the first evaluation: %s", change)
        self._log(results)

    def interpolate(self, weights: Sequence[float]) -> None:
        """Judge mixtures of the weights that training began with and the best ones; keep the best mixture."""
        seed_everything(self.config.train.seed)
        model = self.config.model.build()  # as it was before the first step
        mixtures = Interpolation(model.own_state_dict(), self.folder.best_weights())
        sweep = Sweep(model.to(self.accelerator.device), mixtures, weights, self.evaluator, self.best_metric)
        tokenizer = self.unwrapped_model.text_spec.tokenizer
        self.folder.save_interpolated(lambda folder: sweep.write(folder, self.config, tokenizer))
        if self.accelerator.is_main_process:
            logger.info("between the initial weights (0) and the best ones (1):\n%s", sweep)

    def save(self) -> None:
        """Write a checkpoint to resume from; the same folder can be loaded as a model."""
        processes = gather_object([{"random": random_state(), "unlogged": self.losses.state()}])
        more = {"progress": asdict(self.progress), "processes": processes}
        self.folder.save(self.progress.step, lambda folder: self.state.save(folder, more))

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint as if the run had never stopped."""
        state = self.state.load(folder)
        self.schedule.load_state_dict(state["schedule"])
        self.progress = Progress(**state["progress"])
        processes = state["processes"]
        if len(processes) != self.accelerator.num_processes:
            logger.warning("%s was saved by %d processes: the run goes on, not bit for bit", folder, len(processes))
        own = processes[self.accelerator.process_index % len(processes)]
        restore_random_state(own["random"])
        self.losses.load_state(own["unlogged"])
        self.folder.cut_history(self.progress.step)

    def _mean_weight(self, weight: float) -> Tensor:
        """Mean over the processes, as DDP takes the mean of gradients; what weighs nothing anywhere is divided by 1."""
        mean = mean_over_processes(self.accelerator, torch.tensor(float(weight), device=self.accelerator.device))
        return mean.clamp(min=1 / self.accelerator.num_processes)

    def _is_finite(self, terms: dict[str, Tensor], norm: Tensor) -> bool:
        """Whether loss and gradient are numbers, in all processes; a GPU waits for the answer."""
        finite = torch.stack(list(terms.values())).isfinite().all()
        if not self.accelerator.scaler:  # which finds its scale by gradients that overflow, and skips them itself
            finite = finite & norm.isfinite()
        return mean_over_processes(self.accelerator, finite.float()).item() == 1

    def _count(self, terms: dict[str, Tensor] | None) -> None:
        """Remember the loss of a step, or that it was not taken."""
        progress = self.progress
        if terms is not None:
            progress.skipped_in_a_row = 0
            self.losses.add(progress.step, terms)
            return
        progress.skipped, progress.skipped_in_a_row = progress.skipped + 1, progress.skipped_in_a_row + 1
        trouble = f"the loss or its gradient is not finite at step {progress.step}"
        if progress.skipped_in_a_row == MAX_SKIPPED:
            raise TrainingError(f"{trouble}, nor at the {MAX_SKIPPED - 1} steps before. {REMEDY}")
        logger.warning("%s: the step is not taken (%d so far)", trouble, progress.skipped)
        self._check_weights()

    def _after_step(self, bar: tqdm) -> bool:
        """Log, evaluate and save where it is due; returns True where the run ends here."""
        config, step = self.config.train, self.progress.step
        stop = bool(self.stop)
        finished = stop or step == self.num_steps
        evaluation_due = step % (config.eval_every or self.steps_per_epoch) == 0 or step == self.num_steps
        evaluation_due = evaluation_due and step > self.progress.evaluated_step and not stop
        save_due = finished or (step % config.save_every == 0 if config.save_every else evaluation_due)
        if evaluation_due or save_due or step % config.log_every == 0:
            self._flush(bar, log=not stop)  # a stop is no reason for a row that the straight run does not have
        if evaluation_due or save_due:
            self._check_weights()
        if evaluation_due:
            self.evaluate()
        if config.patience and self.progress.evaluations_since_best >= config.patience:
            logger.info("no better %s in %d evaluations: stopped early", self.best_metric, config.patience)
            save_due = finished = True
        if save_due:
            self.save()
        return finished

    def _flush(self, bar: tqdm, log: bool) -> None:
        """Look whether the losses since the last time are numbers, and log their mean."""
        means = self.losses.means()
        if not means or not log:
            return
        self.losses.clear()
        loss = sum(means.values())
        shown = {"loss": loss} | {name: mean for name, mean in means.items() if "_" not in name}  # not those of layers
        bar.set_postfix({name: f"{mean:.3f}" for name, mean in shown.items()}, refresh=False)
        skipped = {"skipped": self.progress.skipped} if self.progress.skipped else {}
        lr = max(self.schedule.get_last_lr())
        self._log({"loss": loss} | {f"loss/{name}": mean for name, mean in means.items()} | {"lr": lr} | skipped)

    def _check_weights(self) -> None:
        """A finite loss can have a gradient that is none, which the loss shows only one step later."""
        bad = self.state.non_finite_weight()
        if bad is None:
            return
        trouble, saved = f"the weights {bad} are not finite after step {self.progress.step}", self.folder.checkpoints()
        if self.config.train.on_nan == "stop" or not saved or self.progress.restored == MAX_SKIPPED:
            raise TrainingError(f"{trouble}. {REMEDY}")
        self.state.load(saved[-1])
        for group, lr in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = lr  # of now, not of then
        self.progress.restored += 1
        logger.warning("%s: training goes on with those of %s", trouble, saved[-1])

    def _log(self, values: dict[str, Any]) -> None:
        numbers = {key: value for key, value in values.items() if not isinstance(value, str)}
        self.folder.log({"step": self.progress.step, **numbers})
        self.accelerator.log(numbers, step=self.progress.step)

    def _start_trackers(self) -> None:
        parts = asdict(self.config).items()
        flat = {f"{part}.{key}": str(value) for part, keys in parts for key, value in keys.items()}
        self.accelerator.init_trackers("vg", config=flat)
