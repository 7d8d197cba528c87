"""What a run prints: its plan, the remaining time, one line per evaluation, and where the results are.

Also writes the two files for people: epochs.md and curves.png.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from vg.config import eval_key
from vg.distributed import raise_on_all_processes
from vg.errors import printable
from vg.evaluation.curves import curves
from vg.files import write_bytes
from vg.training.data import NUM_EXAMPLES, describe_source, example_phrases
from vg.training.fsdp import describe
from vg.training.run_folder import CURVES, EPOCHS

if TYPE_CHECKING:
    from vg.evaluation.results import EvaluationResult
    from vg.training.trainer import Trainer

WARM_UP, TIMED = 5, 20  # steps: the first ones are slower, the next ones give the time of a step
MIN_GAIN = 0.03  # of the best metric, which is 0..1; smaller ones may be chance on a few hundred samples
LONGER = "a longer run (train.minutes, or train.epochs and train.max_steps) would probably gain more"


class Report:
    """Prints the course of a run in the main process, above the progress bar."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.clock: tuple[int, float] | None = None  # step and time at which the timed steps began
        self.estimated = False
        self.phrases: list[str] = []  # examples from the training data

    def begin(self) -> None:
        """Print the plan: model, data with example phrases, steps and device."""
        trainer = self.trainer
        self.first_step = trainer.progress.step
        if not trainer.accelerator.is_main_process:
            return
        config, model, total = trainer.config, trainer.unwrapped_model, trainer.budget.total
        self.phrases = trainer.data.phrases
        lines = [
            f"{config.model.name}, {model.num_parameters(trainable_only=True):,} trainable parameters",
            _dataset("train", trainer.data.description, self.phrases),
        ]
        for dataset in trainer.evaluator.datasets:
            source = dataset.data.source
            lines.append(_dataset(eval_key(dataset.name), describe_source(source), example_phrases(source)))
        epochs = f"epochs of {_count(trainer.steps_per_epoch, 'step')}"
        if total:
            steps, epochs = _count(total, "step"), f"{total / trainer.steps_per_epoch:.3g} {epochs}"
        else:
            steps = f"{config.train.minutes:g} minutes of steps"
        count = trainer.accelerator.num_processes
        device = f"{trainer.accelerator.device.type} ({count} process{'es' * (count != 1)})"
        precision = {"no": "float32"}.get(config.train.precision, config.train.precision)
        per_step = min(trainer.data.samples_per_step, trainer.data.size)
        lines.append(f"{steps} of {_count(per_step, 'sample')} ({epochs}) on {device}, {precision}")
        lines += filter(None, [describe(trainer.model, count), trainer.data.plan])
        lines.append(f"results go to {trainer.folder.path}")
        if self.first_step:
            lines.append(f"continues after step {self.first_step:,}")
        print_above_bar("\n".join(lines))

    def step(self) -> None:
        """Estimate the remaining time once, from the first steps of this program; call it after every step."""
        progress, first = self.trainer.progress, self.first_step + WARM_UP
        if self.estimated or progress.step < first or not self.trainer.accelerator.is_main_process:
            return
        left = self.trainer.num_steps - progress.step
        if not self.clock or progress.evaluated_step >= self.clock[0]:  # an evaluation takes no part in the estimate
            self.clock = (progress.step, self._now())
        elif progress.step - self.clock[0] == TIMED and left:
            self.estimated = True
            seconds = (self._now() - self.clock[1]) / TIMED * left
            print_above_bar(f"remaining: about {_duration(seconds)} for {left:,} steps, without evaluations")

    def evaluation(self, result: EvaluationResult, improved: bool) -> None:
        """Print an evaluation in one line, and write the table of all evaluations; call it after logging the result."""
        trainer = self.trainer
        if not trainer.accelerator.is_main_process:
            return
        step, rows = trainer.progress.step, trainer.folder.history.rows()
        line = f"step {step:,} (epoch {step / trainer.steps_per_epoch:.3g}): "
        line += trainer.evaluator.in_one_line(result.flat_metrics()) + " (best so far)" * improved
        earlier = [row for row in rows if row["step"] < step]
        if change := trainer.evaluator.change_since_first(earlier, result):
            line += f"; since the first evaluation: {change}"
        print_above_bar(line)
        if table := epoch_table(rows, trainer.steps_per_epoch):
            write_bytes(trainer.folder.path / EPOCHS, table.encode())

    @contextmanager
    def plotting(self) -> Iterator[None]:
        """Plot the history after the block, even if it raises."""
        try:
            yield
        except BaseException:
            with suppress(Exception):  # it would hide the first error
                self._plot()  # without waiting for other processes, which may not have failed
            raise
        with raise_on_all_processes():
            self._plot()

    def _plot(self) -> None:
        folder = self.trainer.folder
        if self.trainer.accelerator.is_main_process and (rows := folder.history.rows()):
            curves(rows, folder.path / CURVES)

    def end(self, best: Mapping[str, Any]) -> None:
        """Print the best evaluation and the files of the run.

        Args:
            best: results of the best evaluation, as in validation.json.
        """
        trainer = self.trainer
        if not trainer.accelerator.is_main_process:
            return
        folder = trainer.folder.path
        rows = trainer.folder.history.rows()
        table = epoch_table(rows, trainer.steps_per_epoch)
        metric = trainer.evaluator.best_metric
        gain = last_gain([row[metric] for row in rows if metric in row])
        lines = [
            *([table] if table else []),
            f"best: step {best['step']:,}, {trainer.evaluator.in_one_line(best)}",
            *([f"the last evaluation still gained {100 * gain:.1f} points of {metric}: {LONGER}"] if gain else []),
            f"results in {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}",
        ]
        print_above_bar("\n".join(lines))

    def print_next_command(self) -> None:
        """Print the command that uses the model."""
        if self.trainer.accelerator.is_main_process:
            phrase = shlex.quote(self.phrases[0]) if self.phrases else "PHRASE"
            print_above_bar(f"next: vg predict {shlex.quote(str(self.trainer.folder.path))} IMAGE {phrase}")

    def _now(self) -> float:
        return synchronized_time(self.trainer.accelerator.device)


def synchronized_time(device: torch.device) -> float:
    """Return the time in seconds after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def last_gain(scores: Sequence[float]) -> float | None:
    """Return what the last evaluation gained, or None unless a longer run would probably gain more.

    It must be the best one, gain MIN_GAIN or more, and at least half of what the evaluation before it gained, although
    the learning rate has decayed.

    Args:
        scores: of all evaluations, 0..1.
    """
    if len(scores) < 3 or scores[-1] < max(scores):
        return None
    before, gain = scores[-2] - scores[-3], scores[-1] - scores[-2]
    return gain if gain >= max(MIN_GAIN, before / 2) else None


def print_above_bar(text: str) -> None:
    """Print to standard output without breaking a progress bar in the terminal; see `printable`."""
    tqdm.write("\n".join(map(printable, text.split("\n"))))


def epoch_table(rows: Sequence[Mapping[str, Any]], steps_per_epoch: int) -> str:
    """Return a Markdown table with a row per evaluation: mean loss and IoU of training since the last one, and its own.

    Args:
        rows: of history.jsonl; without "train_iou" (models with several boxes) the table is empty.
    """
    lines = []
    step, window = 0, []  # of the last row, (steps, loss, IoU) of each row since the last evaluation
    for row in rows:
        if "loss" in row and "train_iou" in row:
            window.append((row["step"] - step, row["loss"], row["train_iou"]))
            step = row["step"]
        elif "eval_loss" in row and "miou" in row and window:
            count = sum(steps for steps, _, _ in window)
            values = [sum(entry[0] * entry[i] for entry in window) / count for i in (1, 2)]
            values += [row["eval_loss"], row["miou"]]
            lines.append([f"{row['step'] / steps_per_epoch:.3g}", *(f"{value:.4f}" for value in values)])
            window = []
    if not lines:
        return ""
    header = ["epoch", "train loss", "train IoU", "val loss", "val IoU"]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, ["---:"] * len(header), *lines])


def _dataset(name: str, description: str, phrases: Sequence[str]) -> str:
    examples = ", ".join(map(repr, phrases[:NUM_EXAMPLES]))
    return f"{name}: {description}{f', such as {examples}' if examples else ''}"


def _count(number: int, unit: str) -> str:
    return f"{number:,} {unit}{'s' * (number != 1)}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
