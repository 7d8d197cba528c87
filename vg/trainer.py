"""The training loop: it knows a GroundingModel and samples, and neither a network nor a data set by name."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from vg import checkpoint
from vg.config import RunConfig
from vg.data.collate import Collator
from vg.data.dataset import GroundingDataset
from vg.distributed import (
    StopSignal,
    mean_over_processes,
    new_accelerator,
    random_state,
    restore_random_state,
    seed_everything,
)
from vg.evaluation import Evaluator, progress_bar
from vg.inputs import build_model, training_order, training_source
from vg.optim import Ema, build_optimizer, build_schedule
from vg.run_folder import RunFolder
from vg.types import Batch, ConfigError

logger = logging.getLogger(__name__)

REMEDY = (
    "The newest checkpoint is from before; a lower optim.lr or optim.clip_norm, or train.precision=no, usually helps"
)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says since which step, and why."""


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0  # optimiser steps done
    epoch: int = 0
    batch: int = 0  # batches of this epoch done, in each process
    evaluated_step: int = 0
    best: float = -math.inf
    evaluations_since_best: int = 0


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
            gradient_accumulation_steps=config.train.accumulate,
            mixed_precision=config.train.precision,
            log_with=config.train.trackers or None,
            project_dir=Path(config.train.output) / "logs",
        )
        self.folder = RunFolder(config, self.accelerator)
        self.folder.claim(resume, overwrite)
        seed_everything(config.train.seed)

        self.core = build_model(config)  # the network itself; self.model may be a wrapper around it
        source = training_source(config, self.core)
        self.data = GroundingDataset(source, config.data.augment.build(), config.train.seed, config.data.bad_samples)
        self.sampler = training_order(config, source)
        self.model, self.optimizer = self.accelerator.prepare(self.core, build_optimizer(self.core, config.optim))
        self.loader = self.accelerator.prepare_data_loader(self._loader())
        self.evaluator = Evaluator(config.data, self.core, self.accelerator)
        self.best_metric = self.evaluator.deciding_number(config.train.best_metric)

        self.steps_per_epoch = math.ceil(len(self.loader) / config.train.accumulate)
        self.num_steps = config.train.epochs * self.steps_per_epoch
        if config.train.max_steps:
            self.num_steps = min(self.num_steps, config.train.max_steps)
        # Not prepared: Accelerate would step the schedule once for every process.
        self.schedule = build_schedule(self.optimizer.optimizer, config.optim, self.num_steps)
        self.ema = Ema(self.core, config.train.ema) if config.train.ema else None

        self.progress = Progress()
        self.stop = StopSignal(self.accelerator)
        self._unlogged: list[tuple[int, dict[str, Tensor]]] = []  # step and loss terms of batches not logged yet
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
                for batch in self._rest_of_epoch():
                    with self.accelerator.accumulate(self.model):
                        self._unlogged.append((self.progress.step + 1, self.step(batch)))
                    self.progress.batch += 1
                    if self.accelerator.sync_gradients:
                        self.progress.step += 1
                        bar.update()
                        finished = self._after_step(bar)
                        if finished:
                            break
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.stop:
            raise SystemExit(
                f"stopped at step {self.progress.step}, saved in {self.folder.path}; "
                "the same command with --resume goes on"
            )
        return self.folder.best_results()

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One forward and backward pass; with the last batch of an accumulation also the optimiser's step."""
        output = self.model(batch)
        terms = self.core.loss(output, batch)
        self.accelerator.backward(torch.stack(list(terms.values())).sum() * self._accumulation_share())
        if self.accelerator.sync_gradients and self.config.optim.clip_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            if not self.accelerator.optimizer_step_was_skipped:  # fp16: the gradients overflowed
                self.schedule.step()
            if self.ema:
                self.ema.update()
        return {name: term.detach() for name, term in terms.items()}

    def evaluate(self) -> None:
        """Judge the weights to be published, and keep them in `best` where they are the best so far."""
        progress, name = self.progress, self.best_metric
        with self._published_weights():
            results = self.evaluator.run(self.core)
            if name not in results:
                raise ConfigError(f"train.best_metric: {name!r} is none of {', '.join(results)}")
            progress.evaluated_step = progress.step
            progress.evaluations_since_best += 1
            if results[name] > progress.best:
                progress.best, progress.evaluations_since_best = results[name], 0
                self.folder.save_best(
                    {"step": progress.step, **results},
                    lambda folder: checkpoint.write_model(folder, self.core, self.config),
                )
        change = self.evaluator.change(self.folder.history.rows(), results)
        if change and self.accelerator.is_main_process:
            logger.info("since the first evaluation: %s", change)
        self._log(results)

    def save(self) -> None:
        """Write a checkpoint to resume from; the same folder can be loaded as a model."""
        unlogged = [(step, {name: term.cpu() for name, term in terms.items()}) for step, terms in self._unlogged]
        processes = gather_object([{"random": random_state(), "unlogged": unlogged}])
        self.folder.save(self.progress.step, lambda folder: self._write(folder, processes))

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint as if the run had never stopped."""
        state = checkpoint.read_training_state(folder)
        checkpoint.load_weights(self.core, folder)
        if state["weights"] is not None:
            self.core.load_own_state_dict(state["weights"])  # they fit, as the published ones above did
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            message = f"{folder / checkpoint.TRAINING} does not fit the configuration (model, optim.groups): {error}"
            raise checkpoint.CheckpointError(message) from error
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema and state["ema"]:
            self.ema.load_state_dict(state["ema"])
        elif self.ema:  # switched on now: the average begins here, not at the random start
            self.ema = Ema(self.core, self.ema.decay)
        self.progress = Progress(**state["progress"])
        processes = state["processes"]
        if len(processes) != self.accelerator.num_processes:
            logger.warning("%s was saved by %d processes: the run goes on, not bit for bit", folder, len(processes))
        own = processes[self.accelerator.process_index % len(processes)]
        restore_random_state(own["random"])
        device = self.accelerator.device
        self._unlogged = [(step, {name: t.to(device) for name, t in terms.items()}) for step, terms in own["unlogged"]]
        self.folder.cut_history(self.progress.step)

    def _loader(self) -> DataLoader[Any]:
        config = self.config.data
        return DataLoader(
            self.data,
            batch_size=config.batch_size,
            sampler=self.sampler,
            num_workers=config.workers,
            collate_fn=Collator(self.core.image_spec, self.core.text_spec),
            drop_last=len(self.data) >= config.batch_size * self.accelerator.num_processes,
            pin_memory=self.accelerator.device.type == "cuda",
            generator=torch.Generator(),  # else a resumed run would draw once more from the generator of dropout
            persistent_workers=config.workers > 0,
        )

    def _rest_of_epoch(self) -> Iterator[Batch]:
        """The batches of the present epoch that are still to come; afterwards the next epoch begins."""
        progress = self.progress
        self.data.begin_epoch(progress.epoch)
        self.sampler.begin_epoch(progress.epoch)
        start = progress.batch
        yield from self.accelerator.skip_first_batches(self.loader, start) if start else self.loader
        progress.epoch, progress.batch = progress.epoch + 1, 0

    def _accumulation_share(self) -> float:
        """Accelerate divides by `accumulate`; the last batches of an epoch may be fewer and then weigh more."""
        size, num_batches = self.config.train.accumulate, len(self.loader)
        in_last_group = self.progress.batch >= num_batches - num_batches % size
        return size / (num_batches % size) if in_last_group else 1.0

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
        """Log the mean of the loss terms since the last time, after a look for numbers that are none.

        Looking at every step would make a GPU wait for each; nothing is saved or evaluated before a look.
        """
        if not self._unlogged:
            return
        names = list(self._unlogged[0][1])
        rows = [torch.stack([terms[name] for name in names]) for _, terms in self._unlogged]
        values = mean_over_processes(self.accelerator, torch.stack(rows).float()).cpu()  # [batches, terms]
        for (step, _), row in zip(self._unlogged, values, strict=True):
            if not row.isfinite().all():
                terms = ", ".join(f"{name} = {value:.4g}" for name, value in zip(names, row.tolist(), strict=True))
                raise TrainingError(f"the loss is not finite at step {step}: {terms}. {REMEDY}")
        if not log:
            return
        self._unlogged = []
        means = dict(zip(names, values.mean(dim=0).tolist(), strict=True))
        loss = sum(means.values())
        bar.set_postfix({"loss": f"{loss:.3f}"} | {name: f"{mean:.3f}" for name, mean in means.items()}, refresh=False)
        lr = max(self.schedule.get_last_lr())
        self._log({"loss": loss} | {f"loss/{name}": mean for name, mean in means.items()} | {"lr": lr})

    def _check_weights(self) -> None:
        """A finite loss can have a gradient that is none, which the loss shows only one step later."""
        for name, parameter in self.core.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                raise TrainingError(f"the weights {name} are not finite after step {self.progress.step}. {REMEDY}")

    def _log(self, values: dict[str, Any]) -> None:
        numbers = {key: value for key, value in values.items() if not isinstance(value, str)}
        self.folder.log({"step": self.progress.step, **numbers})
        self.accelerator.log(numbers, step=self.progress.step)

    def _start_trackers(self) -> None:
        parts = asdict(self.config).items()
        flat = {f"{part}.{key}": str(value) for part, keys in parts for key, value in keys.items()}
        self.accelerator.init_trackers("vg", config=flat)

    def _published_weights(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that are evaluated and published: the average, if there is one."""
        return self.ema.applied() if self.ema else nullcontext()

    def _write(self, folder: Path, processes: list[dict[str, Any]]) -> None:
        with self._published_weights():
            checkpoint.write_model(folder, self.core, self.config)
        state = {
            "weights": self.core.own_state_dict() if self.ema else None,  # else they are the published ones
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "ema": self.ema.state_dict() if self.ema else None,
            "progress": asdict(self.progress),
            "processes": processes,
        }
        checkpoint.write_training_state(folder, state)
