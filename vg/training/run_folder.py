"""The folder of a run, consistent at every moment.

runs/demo/
    config.yaml               the resolved configuration
    history.jsonl             losses and evaluations, one row each
    epochs.md                 loss and IoU in training and validation per epoch, for models that predict one box
    logs/                     output of trackers (TensorBoard)
    best/                     the checkpoint with the best evaluation so far, and its results in validation.json
    checkpoints/step_000500/  the newest checkpoints, with the state that training needs to continue
    interpolated/             the best interpolation between the initial weights and `best` (`train.interpolate`)
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from vg.checkpoint import CONFIG, TRAINING, new_checkpoint
from vg.config import RunConfig, dump_config
from vg.errors import CheckpointError
from vg.files import write_bytes, write_json

VALIDATION = "validation.json"
EPOCHS = "epochs.md"
CHECKPOINTS = ("best", "checkpoints", "interpolated")


def in_main_process(method: Callable[..., None]) -> Callable[..., None]:
    """Run a method of RunFolder in the main process only; if it fails, all processes raise."""

    @functools.wraps(method)
    def run(self: RunFolder, *args: Any) -> None:
        failure: list[Exception | None] = [None]
        if self.accelerator.is_main_process:
            try:
                method(self, *args)
            except (CheckpointError, OSError) as error:
                failure = [error]
        broadcast_object_list(failure)  # other processes wait here
        if failure[0] is not None:
            raise failure[0]

    return run


class RunFolder:
    """Files of a run; all processes call the methods, the main process writes.

    Raises:
        CheckpointError: the folder contains another run, or there is no checkpoint to resume.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, resume: bool, overwrite: bool):
        self.path = Path(config.train.output)
        self.best = self.path / "best"
        self.history = self.path / "history.jsonl"
        self.config = config
        self.accelerator = accelerator
        self._recover()
        if resume and not self.checkpoints():
            raise CheckpointError(f"nothing to resume: no checkpoint in {self.path / 'checkpoints'}")
        found = [path for name in CHECKPOINTS for path in sorted(self.path.glob(f"{name}/*"))]
        if found and not (resume or overwrite):
            raise CheckpointError(
                f"{self.path} already contains a run ({found[-1].relative_to(self.path)}): continue it with --resume, "
                "replace it with --overwrite, or choose another train.output"
            )

    @in_main_process
    def _recover(self) -> None:
        """Restore folders that a crash between the two renames of `vg.files.replacing` left as *.old."""
        for old in [*self.path.glob("*.old"), *self.path.glob("checkpoints/*.old")]:
            if not old.with_suffix("").exists():
                old.rename(old.with_suffix(""))

    @in_main_process
    def begin(self, resume: bool) -> None:
        """Create the folder and write the configuration; remove an earlier run unless it is resumed."""
        if not resume:
            for name in (*CHECKPOINTS, "logs/vg"):  # trackers log under the project name vg
                shutil.rmtree(self.path / name, ignore_errors=True)
            for file in (self.history, self.path / EPOCHS):
                file.unlink(missing_ok=True)
        write_bytes(self.path / CONFIG, dump_config(self.config).encode())

    def checkpoints(self) -> list[Path]:
        """Complete, resumable checkpoints, oldest first."""
        found = [path.parent for path in self.path.glob(f"checkpoints/step_*[0-9]/{TRAINING}")]
        return sorted(found, key=lambda folder: int(folder.name.removeprefix("step_")))

    @in_main_process
    def save(self, folder: Path, write: Callable[[Path], None], results: dict[str, Any] | None = None) -> None:
        """Write a checkpoint and its evaluation results; remove the oldest resumable ones beyond `train.keep`."""
        with new_checkpoint(folder) as partial:
            write(partial)
            if results is not None:
                write_json(partial / VALIDATION, results)
        for old in self.checkpoints()[: -self.config.train.keep]:
            shutil.rmtree(old)

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to the history, such as {"step": 20, "loss": 1.2, "loss/l1": 0.4, "lr": 1e-4}.

        Keys of evaluations are those of vg.evaluation.results.EvaluationResult.flat_metrics.
        """
        if self.accelerator.is_main_process:
            with self.history.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        if not self.history.exists():
            return []
        lines = self.history.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]  # a crash may truncate the last one

    @in_main_process
    def cut_history(self, step: int) -> None:
        """Remove the rows after a step, because a resumed run logs them again."""
        rows = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step]
        write_bytes(self.history, "".join(rows).encode())
