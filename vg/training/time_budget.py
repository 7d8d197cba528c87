"""Training for a given time: `train.minutes` determines the number of steps, and the schedule is fitted to it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from vg.training.optim import fit_schedule
from vg.training.report import TIMED, WARM_UP, print_above_bar, synchronized_time
from vg.training.settings import TrainConfig

if TYPE_CHECKING:
    from vg.training.trainer import Trainer

logger = logging.getLogger(__name__)

SHARE = 0.1  # stop timing steps after this fraction of the budget (an evaluation before the first step not counted)
EVALUATION = 0.5  # time per sample relative to a training step, until the first evaluation is measured


def planned_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Return the steps of a run, sys.maxsize if `minutes` will determine them."""
    steps = sys.maxsize if config.minutes else config.epochs * steps_per_epoch
    return min(steps, config.max_steps or steps)


class TimeBudget:
    """Fits the number of steps and the learning rates of a run to `train.minutes`; without it, nothing changes.

    The number follows from the time of the first steps, and once more from the first evaluation with its checkpoint. It
    is saved with the progress, so a resumed run has the same. The main process decides for all.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.seconds = 60 * (trainer.config.train.minutes or 0)
        self.first_step = trainer.progress.step
        self.timed: tuple[int, float] | None = None  # step, and seconds of all steps, when the timed steps began
        self.limit = SHARE * self.seconds  # seconds after which no more steps are timed
        self.paused, self.evaluations = 0.0, 0  # seconds of evaluations and checkpoints, number of evaluations
        self.final = not self.seconds or trainer.progress.fitted_steps > 0
        if self.seconds and trainer.progress.fitted_steps:  # resumed
            self._use(trainer.progress.fitted_steps)
            before, now = trainer.progress.minutes, trainer.config.train.minutes
            if before != now and trainer.accelerator.is_main_process:
                logger.warning(
                    "train.minutes=%g has no effect: the interrupted run was fitted to %g minutes, %d steps; "
                    "train.max_steps makes it shorter",
                    *(now, before, trainer.progress.fitted_steps),
                )

    @property
    def total(self) -> int | None:
        """Steps of the run; None until they are determined."""
        return None if self.trainer.num_steps == sys.maxsize else self.trainer.num_steps

    def begin(self, bar: tqdm) -> None:
        """Start the clock; call it before the first step and evaluation."""
        self.bar = bar
        if self.seconds:
            self.started = self._now()

    def step(self) -> None:
        """Determine the number of steps as soon as enough of them are timed; call it after every step."""
        if self.final or self.trainer.progress.fitted_steps:
            return
        step, now = self.trainer.progress.step, self._now()
        slow = now - self.started >= self.limit
        ready = self.timed is not None and (slow or step - self.timed[0] == TIMED)
        if self.timed is None and (slow or step - self.first_step == WARM_UP):
            self.timed = step, now - self.started - self.paused
        self._decide(ready)

    @contextmanager
    def pause(self, evaluates: bool, saves: bool) -> Iterator[None]:
        """Within the context are evaluations and checkpoints; the first evaluation corrects the number of steps."""
        if not self.seconds or not (evaluates or saves):
            yield
            return
        began = self._now()
        yield
        seconds = self._now() - began
        self.paused += seconds
        self.evaluations += evaluates
        if self.trainer.progress.step == self.first_step:
            self.limit += seconds
        if evaluates and not self.final and self.trainer.progress.fitted_steps > self.trainer.progress.step:
            self._decide(ready=True)

    def _decide(self, ready: bool) -> None:
        """Use the number of steps that the main process calculates, if it is ready to."""
        trainer, found = self.trainer, [0]
        if ready and trainer.accelerator.is_main_process:
            assert self.timed is not None
            config, step, elapsed = trainer.config, trainer.progress.step, self._now() - self.started
            per_step = (elapsed - self.paused - self.timed[1]) / (step - self.timed[0])
            evaluated = sum(map(len, trainer.evaluator.sources))
            evaluation = EVALUATION * per_step * evaluated / trainer.data.samples_per_step
            if self.evaluations:
                evaluation = self.paused / self.evaluations
            every = config.train.eval_every or trainer.steps_per_epoch
            number = last_step(self.seconds - elapsed, step, per_step, evaluation, every)
            found, steps = [number], min(number, config.train.max_steps or number)
            limit = "" if steps == number else " (train.max_steps)"
            print_above_bar(
                f"{steps:,} steps{limit} in train.minutes={config.train.minutes:g}: {1000 * per_step:.0f} ms per "
                f"step, about {evaluation:.1f} s per evaluation"
            )
            if config.optim.warmup_steps >= steps:
                print_above_bar(f"optim.warmup_steps={config.optim.warmup_steps} is longer than the run: lower it")
        broadcast_object_list(found)
        if found[0]:
            self.final = self.evaluations > 0
            trainer.progress.minutes = trainer.config.train.minutes
            self._use(found[0])
            self.bar.total = self.total
            self.bar.refresh()

    def _use(self, num_steps: int) -> None:
        trainer = self.trainer
        trainer.progress.fitted_steps = num_steps  # without train.max_steps, which may change when a run is resumed
        trainer.num_steps = min(num_steps, trainer.config.train.max_steps or num_steps)
        fit_schedule(trainer.schedule, trainer.config.optim, trainer.num_steps, trainer.steps_per_epoch)

    def _now(self) -> float:
        return synchronized_time(self.trainer.accelerator.device)


def last_step(seconds: float, step: int, per_step: float, evaluation: float, every: int) -> int:
    """Return the step at which a run ends if it continues for `seconds` after `step`.

    Args:
        per_step: seconds per step.
        evaluation: seconds per evaluation.
        every: steps between evaluations; another one follows the last step.
    """
    boundary = step // every * every  # the last step with the evaluations counted so far
    while True:
        seconds -= evaluation
        last = max(step, boundary, step + int(seconds / per_step))
        boundary += every
        if last <= boundary:
            return max(last, 1)
