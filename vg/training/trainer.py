"""The training loop, for any GroundingModel and any dataset."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vg.checkpoint import VALIDATION
from vg.config import RunConfig, checked_config
from vg.distributed import (
    StopSignal,
    mean_over_processes,
    new_accelerator,
    progress_bar,
    raise_on_all_processes,
    seed_batch,
    seed_everything,
)
from vg.errors import TrainingError
from vg.evaluation.evaluator import Evaluator
from vg.files import read_json
from vg.models.base import is_finite
from vg.training.batch_norm import RunningStatistics
from vg.training.compilation import compile_layers
from vg.training.data import training_data
from vg.training.digests import Digests
from vg.training.fsdp import check_launch, gather_full, gathered, prepare_for_training
from vg.training.interpolation import interpolate_run
from vg.training.loss_log import REMEDY, TRAIN_IOU, LossLog
from vg.training.optim import build_optimizer, build_schedule, lr_factor, restore_schedule, select_trainable
from vg.training.report import Report
from vg.training.run_folder import RunFolder
from vg.training.state import Progress, TrainingState
from vg.training.time_budget import TimeBudget, planned_steps
from vg.types import Batch, LossName

logger = logging.getLogger(__name__)

MAX_SKIPPED = 10  # consecutive steps; more mean divergence
STOP_INTERVAL = 10  # steps between checks for a stop signal with several processes, because each is a collective


class Trainer:
    """Train the model of a RunConfig on its data.

    Args:
        resume: continue from the newest checkpoint in `train.output`; a restarted run does so by itself, see RunFolder.
        overwrite: replace an existing run in `train.output`.

    Raises:
        ConfigError: not a configuration, or one with wrong values or names that were set in Python.
        CheckpointError: `train.output` contains a run and neither argument is given, or there is nothing to resume.
    """

    def __init__(self, config: RunConfig, resume: bool = False, overwrite: bool = False):
        config = checked_config(config)
        check_launch(config)
        self.config = config
        self.accelerator = new_accelerator(
            mixed_precision=config.train.precision,
            log_with=config.train.trackers or None,
            project_dir=Path(config.train.output) / "logs",
        )
        self.folder = RunFolder(config, self.accelerator, resume, overwrite)
        seed_everything(config.train.seed)

        self.unwrapped_model = model = config.model.build()  # self.model may be wrapped for DDP
        self.evaluator = Evaluator(config.data, model, self.accelerator, config.train.best_metric, with_loss=True)
        model.classes = self.evaluator.classes
        self.data = training_data(config, model, self.accelerator, self.evaluator.sources)
        self.digests = Digests(config.data, [self.data.source, *self.evaluator.sources])
        if classes := self.data.num_classes:
            self.unwrapped_model.use_classes(classes)
        select_trainable(self.unwrapped_model, config.optim)
        if config.train.compile:
            compile_layers(self.unwrapped_model)
        scale = lr_factor(config.optim, self.data.samples_per_step)
        optimizer = build_optimizer(self.unwrapped_model, config.optim, scale)
        self.steps_per_epoch = self.data.steps_per_epoch
        self.num_steps = planned_steps(config.train, self.steps_per_epoch)
        # Not prepared, because Accelerate would step the schedule once per process.
        self.schedule = build_schedule(optimizer, config.optim, self.num_steps, self.steps_per_epoch)
        self.model, self.optimizer = prepare_for_training(self.accelerator, self.unwrapped_model, optimizer)
        self.state = TrainingState(config, self.unwrapped_model, self.optimizer, self.accelerator)

        self.progress = Progress(samples_per_step=self.data.samples_per_step, best_metric=self.evaluator.best_metric)
        interval = min(STOP_INTERVAL, config.train.log_every)
        self.stop = StopSignal(self.accelerator, interval, config.train.preemption_signal)
        self.losses = LossLog(self.accelerator)
        with self.folder.claim():  # until the end of `fit`
            if self.folder.resume:
                self.restore()
            self.budget = TimeBudget(self)
            self.folder.begin()  # last, because it replaces the configuration and removes an overwritten run
        self.report = Report(self)

    def fit(self) -> dict[str, Any]:
        """Train to the end and return the results of the best evaluation; an interrupted run gets its curves, too.

        Raises:
            TrainingError: a loss or a weight is not finite.
            CheckpointError: a checkpoint could not be written (earlier ones are intact), or the folder is in use.
            SystemExit: Ctrl-C or another stop signal was received (see StopSignal); the state is saved.
        """
        self.folder.start_trackers(self.progress.step)
        self.model.train()
        self.report.begin()
        with (
            self.folder.lock,
            self.stop.listening(),
            progress_bar(self.accelerator, total=self.budget.total, initial=self.progress.step, desc="train") as bar,
            self.report.plotting(),
        ):
            self.budget.begin(bar)
            if self.config.train.eval_first and not self.progress.step:
                with self.budget.pause(evaluates=True, saves=False):
                    self.evaluate()
            # A run may have been interrupted between a step and its evaluation.
            finished = self.progress.step > 0 and self._after_step(bar)
            steps = self._steps()
            while not finished:
                batches = next(steps)
                terms = self.step(batches)
                self.progress.samples += self.data.samples_per_step
                self.progress.step += 1
                self._record_step(terms)
                bar.update()
                self.budget.step()
                self.report.step()
                finished = self._after_step(bar)
            for tracker in self.accelerator.trackers:
                tracker.finish()
            if self.stop.requested():
                raise SystemExit(
                    f"stopped at step {self.progress.step}, saved in {self.folder.path}; "
                    "repeat the command with --resume to continue (in Python: resume=True)"
                )
        if self.config.train.interpolate:
            interpolate_run(self, self.config.train.interpolate)
        best = read_json(self.folder.best / VALIDATION, dict)
        self.report.end(best)
        return best

    def step(self, batches: Sequence[Batch]) -> dict[LossName, Tensor] | None:
        """Run one optimizer step; its result does not depend on how the samples are split over batches and processes.

        Denoising is an exception: its queries are padded to the batch, and it is divided by the denoised boxes. For the
        same batches, only the order of sums of gradients depends on the number of processes: two batches give the same
        bits in one or two processes, more batches differ by rounding.

        Returns:
            The loss terms of this process, without graph; None if the step was skipped (`train.on_nan: skip`).
        """
        weights = [self.unwrapped_model.batch_weight(batch) for batch in batches]
        divisor = self._mean_weight(sum(weights))
        statistics = RunningStatistics(self.unwrapped_model, self.accelerator)
        terms: dict[LossName, Tensor] = {}
        for index, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            batch_index = self.accelerator.process_index + index * self.accelerator.num_processes  # over all processes
            seed_batch(self.config.train.seed, self.progress.step, batch_index)
            with self.accelerator.no_sync(self.model) if index + 1 < len(batches) else nullcontext():
                output = self.model(batch)
                # The model divides its sums by the weight of this batch; the step divides by the mean weight instead.
                losses = self.unwrapped_model.loss(output, batch)
                scaled = torch.stack(list(losses.values())) * (max(1, weight) / divisor)  # [terms]
                self.accelerator.backward(scaled.sum())
            statistics.collect()
            losses = dict(zip(losses, scaled.detach().unbind(), strict=True))
            if (iou := self.unwrapped_model.iou(output, batch)) is not None:
                losses[TRAIN_IOU] = iou.detach().sum() / divisor  # logged only
            terms = {name: terms[name] + loss if name in terms else loss for name, loss in losses.items()}
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm or math.inf)
        taken = self.config.train.on_nan == "stop" or self._is_finite(terms, norm)
        if taken:
            statistics.update()
            self.optimizer.step()
            self.schedule.step()  # steps of fp16 that the scaler skips are counted too
            if self.state.ema:
                self.state.ema.update()
        elif self.accelerator.scaler:
            self.accelerator.scaler.update()  # clip_grad_norm_ unscaled these gradients, so this step must be closed
        self.optimizer.zero_grad()
        return terms if taken else None

    def evaluate(self) -> None:
        """Evaluate the (EMA) weights, log the results, and save the weights to `best` on improvement."""
        progress = self.progress
        with self.state.evaluated_weights(), gathered(self.unwrapped_model):
            result = self.evaluator.run(self.unwrapped_model)
            progress.evaluated_step = progress.step
            progress.evaluations_since_best += 1
            improved = result.score > progress.best
            if improved:
                progress.best, progress.evaluations_since_best = result.score, 0
                self.folder.save(self.folder.best, self.state.export(), {"step": progress.step, **result.flat()})
        self._log(result.flat_metrics() | result.losses())
        with raise_on_all_processes():
            self.report.evaluation(result, improved)

    def save(self) -> None:
        """Write a resumable checkpoint, which can also be loaded as a model."""
        extra = {"unlogged": self.losses.state(), "data": self.data.state(), "digests": self.digests.state()}
        extra |= {"schedule": self.schedule.state_dict(), "progress": asdict(self.progress)}
        self.folder.save(self.folder.checkpoint(self.progress.step), **self.state.snapshot(extra))

    def restore(self) -> None:
        """Load the newest checkpoint; training continues bit for bit, or with other processes up to rounding."""
        _, state = self.folder.newest(self.state.load)
        restore_schedule(self.schedule, state["schedule"])
        saved = Progress(**state["progress"])
        self.progress = saved.continued(self.config, self.data.samples_per_step, self.evaluator.best_metric)
        self.losses.load_state(state["unlogged"])
        self.data.restore(state["data"])
        self.digests.warn_of_changes(state.get("digests", {}), saved.step)
        self.folder.cut_history(saved.step, saved.evaluated_step == saved.step, not self.losses.averaged)

    def _steps(self) -> Iterator[list[Batch]]:
        """The batches of every optimizer step from the current position, epoch after epoch without end."""
        while True:
            yield from self.data.steps(self.progress.epoch, self.progress.samples)
            self.progress.epoch, self.progress.samples = self.progress.epoch + 1, 0

    def _mean_weight(self, weight: float) -> Tensor:
        """Mean over the processes, because DDP averages gradients; at least 1 in total, to avoid division by 0."""
        # torch.full fills on the device; torch.tensor would copy from the host and wait for the device.
        local = torch.full((), float(weight), device=self.accelerator.device)
        return mean_over_processes(self.accelerator, local).clamp(min=1 / self.accelerator.num_processes)

    def _is_finite(self, terms: dict[LossName, Tensor], norm: Tensor) -> bool:
        """Whether loss and gradient are finite in all processes; synchronizes with the device."""
        finite = torch.stack(list(terms.values())).isfinite().all()
        if not self.accelerator.scaler:  # a scaler handles overflow of gradients itself, to find its scale
            finite = finite & gather_full(norm).isfinite()
        return mean_over_processes(self.accelerator, finite.float()).item() == 1

    def _record_step(self, terms: dict[LossName, Tensor] | None) -> None:
        """Record the loss terms of a step, or that it was skipped."""
        progress = self.progress
        if terms is not None:
            progress.skipped_in_a_row = 0
            self.losses.rows.append((progress.step, terms))
            return
        progress.skipped, progress.skipped_in_a_row = progress.skipped + 1, progress.skipped_in_a_row + 1
        problem = f"the loss or its gradient is not finite at step {progress.step}"
        if progress.skipped_in_a_row == MAX_SKIPPED:
            raise TrainingError(f"{problem}, nor at the {MAX_SKIPPED - 1} steps before. {REMEDY}")
        logger.warning("%s: step skipped (%d so far)", problem, progress.skipped)
        self._check_weights()

    def _after_step(self, bar: tqdm) -> bool:
        """Log, evaluate and save if due; return whether the run ends here."""
        config, step, planned = self.config.train, self.progress.step, self.progress.fitted_steps
        last = step >= self.num_steps
        stop = (last or step % self.stop.interval == 0) and self.stop.requested()
        finished = stop or last
        evaluation_due = step % (config.eval_every or self.steps_per_epoch) == 0 or last
        evaluation_due = evaluation_due and step > self.progress.evaluated_step and not stop
        save_due = finished or (step % config.save_every == 0 if config.save_every else evaluation_due)
        if evaluation_due or save_due or step % config.log_every == 0:
            # No row on interruption: the history must equal that of an uninterrupted run.
            self._log_losses(bar, log=not stop)
        if evaluation_due or save_due:
            self._check_weights()
        with self.budget.pause(evaluation_due, save_due):
            if evaluation_due:
                if save_due:
                    self.save()  # because a kill during the evaluation would lose everything since the last checkpoint
                self.evaluate()
            if (patience := config.patience) and self.progress.evaluations_since_best >= patience:
                logger.info("early stopping: no better %s in %d evaluations", self.evaluator.best_metric, patience)
                save_due = finished = True
            if save_due:
                self.save()
        # The end of `pause` corrects the number of steps, perhaps to this one; a resumed run would not correct it.
        finished = finished or step >= self.num_steps
        if self.progress.fitted_steps != planned and (save_due or finished):
            self.save()
        return finished

    def _log_losses(self, bar: tqdm, log: bool) -> None:
        """Check that all losses since the last log entry are finite, and log their mean."""
        means = self.losses.means()
        if not means or not log:
            return
        self.losses.clear()
        iou = {str(TRAIN_IOU): means.pop(TRAIN_IOU)} if TRAIN_IOU in means else {}
        loss = sum(means.values())
        shown = {"loss": loss} | {name.term: mean for name, mean in means.items() if name == LossName(name.term)}
        bar.set_postfix({name: f"{mean:.3f}" for name, mean in shown.items()}, refresh=False)
        skipped = {"skipped": self.progress.skipped} if self.progress.skipped else {}
        lr = max(self.schedule.get_last_lr())
        self._log({"loss": loss} | {f"loss/{name}": mean for name, mean in means.items()} | {"lr": lr} | iou | skipped)

    def _check_weights(self) -> None:
        """Raise or restore weights if any is not finite: gradients can be non-finite although the loss is finite."""
        trainable = ((name, p) for name, p in self.unwrapped_model.named_parameters() if p.requires_grad)
        if (bad := next((name for name, parameter in trainable if not is_finite(parameter)), None)) is None:
            return
        problem, saved = f"the weights {bad} are not finite after step {self.progress.step}", self.folder.checkpoints()
        if self.config.train.on_nan == "stop" or not saved or self.progress.restored == MAX_SKIPPED:
            raise TrainingError(f"{problem}. {REMEDY}")
        folder, _ = self.folder.newest(self.state.load)
        for group, lr in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = lr  # of this step, not of the checkpoint
        self.progress.restored += 1
        logger.warning("%s: restored from %s", problem, folder)

    def _log(self, values: dict[str, Any]) -> None:
        with raise_on_all_processes():
            self.folder.log({"step": self.progress.step, **values})
            self.accelerator.log(values, step=self.progress.step)
