"""The folder of a run, consistent at every moment.

runs/demo/
    config.yaml               the resolved configuration
    history.jsonl             losses and evaluations, one row each
    logs/                     output of trackers (TensorBoard)
    best/                     the checkpoint with the best evaluation so far, and its results in validation.json
    checkpoints/step_000500/  the newest checkpoints, with the state that training needs to continue
    interpolated/             the best interpolation between the initial weights and `best` (`train.interpolate`)
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
from vg.files import write_bytes, write_json
from vg.training.history import History

VALIDATION = "validation.json"
KEPT = ("best", "checkpoints", "interpolated")


class RunFolder:
    """Files of a run. All processes call these methods; the main one writes, and if it fails all processes raise."""

    def __init__(self, config: RunConfig, accelerator: Accelerator):
        self.path = Path(config.train.output)
        self.keep = config.train.keep
        self.config = config
        self.accelerator = accelerator
        self.history = History(self.path / "history.jsonl")

    def claim(self, resume: bool, overwrite: bool) -> None:
        """Check that this run may use the folder; nothing is removed yet.

        Raises:
            CheckpointError: the folder contains another run, or there is no checkpoint to resume.
        """
        self._on_main(self._recover)
        found = self.checkpoints()
        if resume and not found:
            raise CheckpointError(f"nothing to resume: no checkpoint in {self.path / 'checkpoints'}")
        kept = [path for name in KEPT for path in sorted(self.path.glob(f"{name}/*"))]
        if kept and not (resume or overwrite):
            raise CheckpointError(
                f"{self.path} already contains a run ({kept[-1].relative_to(self.path)}): continue it with --resume, "
                "replace it with --overwrite, or choose another train.output"
            )

    def begin(self, resume: bool) -> None:
        """Create the folder and write the configuration; remove an earlier run unless it is resumed."""
        self._on_main(lambda: self._prepare(resume))

    def checkpoints(self) -> list[Path]:
        """Complete, resumable checkpoints, oldest first."""
        found = [path.parent for path in self.path.glob(f"checkpoints/step_*[0-9]/{TRAINING}")]
        return sorted(found, key=lambda folder: int(folder.name.removeprefix("step_")))

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Write the checkpoint of a step with `write`, then remove the oldest ones beyond `train.keep`."""
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

    def _recover(self) -> None:
        """Restore folders that a crash between the two renames of `vg.files.replacing` left as *.old."""
        for old in [*self.path.glob("*.old"), *self.path.glob("checkpoints/*.old")]:
            if not old.with_suffix("").exists():
                old.rename(old.with_suffix(""))

    def _prepare(self, resume: bool) -> None:
        if not resume:
            for name in (*KEPT, "logs/vg"):  # trackers log under the project name vg
                shutil.rmtree(self.path / name, ignore_errors=True)
            self.history.path.unlink(missing_ok=True)
        write_bytes(self.path / CONFIG, dump_config(self.config).encode())

    def _on_main(self, action: Callable[[], None]) -> None:
        failure: list[Exception | None] = [None]
        if self.accelerator.is_main_process:
            try:
                action()
            except (CheckpointError, OSError) as error:
                failure = [error]
        broadcast_object_list(failure)  # other processes wait here
        if failure[0] is not None:
            raise failure[0]
