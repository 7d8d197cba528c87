"""The folder of a run, complete at every moment.

runs/demo/
    config.yaml               the resolved configuration
    history.jsonl             losses and evaluations, one row each
    logs/                     what trackers write (TensorBoard)
    best/                     a checkpoint with the best evaluation so far, and its validation.json
    checkpoints/step_000500/  the newest checkpoints, with what training needs to go on
    interpolated/             a checkpoint between the initial weights and `best`, if `train.interpolate` asks for it
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from vg.checkpoint import CONFIG, TRAINING, new_checkpoint, read_weights
from vg.config import RunConfig, dump_config
from vg.errors import CheckpointError
from vg.files import write_json
from vg.training.history import History

VALIDATION = "validation.json"
KEPT = ("best", "checkpoints", "interpolated")


class RunFolder:
    """Every process calls these methods; the main one writes, and where it fails every process raises."""

    def __init__(self, config: RunConfig, accelerator: Accelerator):
        self.path = Path(config.train.output)
        self.keep = config.train.keep
        self.config = config
        self.accelerator = accelerator
        self.history = History(self.path / "history.jsonl")

    def claim(self, resume: bool, overwrite: bool) -> None:
        """See whether this run may have the folder; nothing is removed yet.

        Raises:
            CheckpointError: another run lives here, or there is none to resume.
        """
        self._on_main(self._mend)
        found = self.checkpoints()
        if resume and not found:
            raise CheckpointError(f"nothing to resume: no checkpoint in {self.path / 'checkpoints'}")
        kept = [name for part in KEPT for name in sorted(self.path.glob(f"{part}/*"))]
        if kept and not (resume or overwrite):
            raise CheckpointError(
                f"{self.path} holds a run already ({kept[-1].relative_to(self.path)}): go on with --resume, begin anew "
                "with --overwrite, or choose another train.output"
            )

    def begin(self, resume: bool) -> None:
        """Make the folder ready, and remove what an earlier run left in it."""
        self._on_main(lambda: self._prepare(resume))

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints that training can go on from, oldest first."""
        found = [path.parent for path in self.path.glob(f"checkpoints/step_*[0-9]/{TRAINING}")]
        return sorted(found, key=lambda folder: int(folder.name.removeprefix("step_")))

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let `write` fill the checkpoint of a step, then remove the oldest ones beyond `train.keep`."""
        folder = self.path / "checkpoints" / f"step_{step:06d}"

        def action() -> None:
            with new_checkpoint(folder) as partial:
                write(partial)
            for old in self.checkpoints()[: -self.keep]:
                shutil.rmtree(old)

        self._on_main(action)
        return folder

    def save_best(self, results: dict[str, Any], write: Callable[[Path], None]) -> None:
        def action() -> None:
            with new_checkpoint(self.path / "best") as partial:
                write(partial)
                write_json(partial / VALIDATION, results)

        self._on_main(action)

    def best_results(self) -> dict[str, Any]:
        return json.loads((self.path / "best" / VALIDATION).read_text(encoding="utf-8"))

    def best_weights(self) -> dict[str, Tensor]:
        return read_weights(self.path / "best")

    def save_interpolated(self, write: Callable[[Path], None]) -> None:
        def action() -> None:
            with new_checkpoint(self.path / "interpolated") as partial:
                write(partial)

        self._on_main(action)

    def log(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.history.append(row)

    def cut_history(self, step: int) -> None:
        self._on_main(lambda: self.history.cut(step))

    def _mend(self) -> None:
        """Put back what a crash between the two renames of `replacing` left under its other name."""
        for old in [*self.path.glob("*.old"), *self.path.glob("checkpoints/*.old")]:
            if not old.with_suffix("").exists():
                old.rename(old.with_suffix(""))

    def _prepare(self, resume: bool) -> None:
        if not resume:
            for part in (*KEPT, "logs/vg"):  # the trackers call the project vg
                shutil.rmtree(self.path / part, ignore_errors=True)
            self.history.path.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / CONFIG).write_text(dump_config(self.config), encoding="utf-8")

    def _on_main(self, action: Callable[[], None]) -> None:
        failure: list[Exception | None] = [None]
        if self.accelerator.is_main_process:
            try:
                action()
            except (CheckpointError, OSError) as error:
                failure = [error]
        broadcast_object_list(failure)  # also makes the others wait
        if failure[0] is not None:
            raise failure[0]
