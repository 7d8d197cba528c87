"""The folder of a run, consistent at every moment.

runs/demo/
    config.yaml               the resolved configuration
    history.jsonl             losses and evaluations, one row each
    curves.png                losses and metrics over the steps
    epochs.md                 loss and IoU in training and validation per epoch, for models that predict one box
    logs/                     output of trackers (TensorBoard)
    best/                     the checkpoint with the best evaluation so far, and its results in validation.json
    checkpoints/step_000500/  the newest checkpoints, with the state that training needs to continue
    checkpoints/*.damaged     checkpoints that could not be read on resume, see `RunFolder.newest`
    eval/                     results of `vg eval`, those of other settings in folders such as eval/split=testA
    metrics.json, scene.png   results of `vg demo`, with predictions.png and scene.txt
    comparison.txt            results of `vg finetune`, with predictions.png and example.png
    benchmark.json            results of `vg eval --suite`, with benchmark.html
    interpolated/             the best interpolation between the initial weights and `best` (`train.interpolate`)
    launch.json               the programs, such as torchrun, that started the processes and may restart them
    train.lock                from the construction of the trainer to the end of training
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object

from vg.checkpoint import SHARDS, TRAINING, VALIDATION, new_checkpoint
from vg.config import RunConfig, dump_config
from vg.distributed import in_main_process, launches, raise_on_all_processes
from vg.errors import CheckpointError, DamagedCheckpointError, TrainingError
from vg.files import locked, read_json, remove, write_bytes, write_json
from vg.models.saved import CONFIG, WEIGHTS
from vg.settings import changes, parse_yaml, read_yaml
from vg.training.history import History

T = TypeVar("T")

logger = logging.getLogger(__name__)

EPOCHS, CURVES = "epochs.md", "curves.png"
LAUNCH, LOCK = "launch.json", "train.lock"
CHECKPOINTS = ("best", "checkpoints", "interpolated")
WRITTEN = ("best", "interpolated", "checkpoints/step_*")  # patterns of what `vg.files.replacing` writes
EVALUATIONS = "eval"  # folder for the results of `vg eval`
RESULTS = (  # patterns of files beside the checkpoints, which are about their weights
    *("metrics.json", "predictions.png", "detections.json", "detections_*.json", "benchmark.json", "benchmark.html"),
    *("scene.png", "scene.txt", "comparison.txt", "example.png"),
)


def checkpoints_of(folder: Path) -> list[Path]:
    """Return all checkpoints of the run in a folder; none if there is no run."""
    return [path for name in CHECKPOINTS for path in sorted(folder.glob(f"{name}/*"))]


def resumable_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run that have the state of training, oldest first."""
    found = [path.parent for path in folder.glob(f"checkpoints/step_*[0-9]/{TRAINING}")]
    found = [x for x in found if (x / WEIGHTS).exists() and x.name.removeprefix("step_").isdecimal()]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step_")))


def refuse_run(folder: Path) -> None:
    """Raise CheckpointError if a folder contains a run."""
    if found := checkpoints_of(folder):
        # There is nothing to continue after a failure at step 1.
        resume = "continue it with --resume (in Python: resume=True), " if resumable_checkpoints(folder) else ""
        raise CheckpointError(
            f"{folder} already contains a run ({found[-1].relative_to(folder)}): {resume}replace it with "
            "--overwrite (overwrite=True), or choose another train.output"
        )


class RunFolder:
    """Files of a run; all processes call the methods, the main process writes.

    A group of processes that torchrun restarts (`--max-restarts`) resumes the run that it began before, whatever it was
    started with, because torchrun repeats the command. Another run in the folder is never taken for that one.

    Attributes:
        resume: whether to continue from the newest checkpoint.

    Raises:
        CheckpointError: the folder contains another run, or there is no checkpoint to resume.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, resume: bool, overwrite: bool):
        self.path = Path(config.train.output)
        self.best = self.path / "best"
        self.history = History(self.path / "history.jsonl")
        self.config = config
        self.accelerator = accelerator
        self.launches = launches()
        self.lock = ExitStack()  # see `claim`
        with self._locked():
            self._recover()
        before = self._begun_by()
        is_restart = any(attempt > before.get(launch, attempt) for launch, attempt in self.launches.items())
        self.resume = resume or (is_restart and bool(self.checkpoints()))
        self.replaces = overwrite or is_restart
        self._check()

    @in_main_process
    def _check(self) -> None:
        """Raise CheckpointError if the folder has no checkpoint to resume, or another run that is not replaced."""
        if self.resume and not self.checkpoints():
            again = "start again with --overwrite" if self.path.exists() else "start without --resume"
            raise CheckpointError(f"nothing to resume: no checkpoint in {self.path / 'checkpoints'}; {again}")
        if not (self.resume or self.replaces):
            refuse_run(self.path)

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Create the folder and lock it, until `lock` is closed, or to the end of the context if that raises.

        Raises:
            CheckpointError: another process is training in the folder, or has done so since the constructor looked.
        """
        with ExitStack() as stack:
            stack.enter_context(self._locked(create=True))
            self._check()
            yield
            self.lock = stack.pop_all()

    @contextmanager
    def _locked(self, create: bool = False) -> Iterator[None]:
        """Refuse other runs in the folder within the context; raises CheckpointError if there is one already."""
        is_main = self.accelerator.is_main_process
        with ExitStack() as stack:
            with raise_on_all_processes():
                if is_main and create:
                    self.path.mkdir(parents=True, exist_ok=True)
                if is_main and self.path.is_dir() and not stack.enter_context(locked(self.path / LOCK)):
                    raise CheckpointError(
                        f"another process is training in {self.path}; wait for its end, or choose another train.output"
                    )
            yield

    @in_main_process
    def _recover(self) -> None:
        """Restore folders that a crash between the two renames of `vg.files.replacing` left as *.old."""
        for old in self._left(".old"):
            if not old.with_suffix("").exists():
                old.rename(old.with_suffix(""))

    def _left(self, *suffixes: str) -> list[Path]:
        """Return the unfinished or outdated folders that a crash left."""
        return [path for name in WRITTEN for suffix in suffixes for path in self.path.glob(name + suffix)]

    def _begun_by(self) -> dict[str, int]:
        """The launches of the processes that began or resumed the run in the folder, and their number of restarts."""
        file = self.path / LAUNCH
        return read_json(file, dict) if file.exists() else {}

    @in_main_process
    def begin(self) -> None:
        """Write the configuration into the claimed folder; remove an earlier run unless it is resumed."""
        if not self.resume:
            replaced = bool(checkpoints_of(self.path))  # then its evaluations are of weights that are removed
            for name in (*CHECKPOINTS, *[EVALUATIONS] * replaced, "logs/vg"):  # trackers log under the project name vg
                shutil.rmtree(self.path / name, ignore_errors=True)
            for pattern in (self.history.file.name, EPOCHS, CURVES, LAUNCH, *RESULTS * replaced):
                for file in self.path.glob(pattern):
                    file.unlink()
        for leftover in self._left(".partial", ".old"):
            remove(leftover)
        for folder in {*self.path.glob("checkpoints/step_*[0-9]")}.difference(self.checkpoints()):
            logger.warning("%s is ignored: %s or %s is missing", folder, WEIGHTS, TRAINING)
        config = dump_config(self.config)
        if self.resume:
            self._warn_of_other_settings(config)
        write_bytes(self.path / CONFIG, config.encode())
        if self.launches:
            write_json(self.path / LAUNCH, self.launches)  # last: from here on, a restart may not remove anything

    def _warn_of_other_settings(self, config: str) -> None:
        """Compare a configuration with that of the run so far, of which the folder keeps nothing else."""
        before, now = None, parse_yaml(config)
        with suppress(OSError, yaml.YAMLError):  # a warning must not stop a run
            before = read_yaml(self.path / CONFIG)
        if not isinstance(before, dict):
            logger.warning("%s is missing or damaged, and is written again", self.path / CONFIG)
        elif found := [f"{name}: {old} before, {new} now" for name, old, new in changes(before, now)]:
            logger.warning("the run continues with other settings (%s)", "; ".join(found))

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step:06d}"

    def checkpoints(self) -> list[Path]:
        return resumable_checkpoints(self.path)

    def newest(self, load: Callable[[Path], T]) -> tuple[Path, T]:
        """Load the newest checkpoint; one that is damaged is renamed to *.damaged, with a warning, if there are others.

        Raises:
            CheckpointError: see `load`; DamagedCheckpointError if all checkpoints are damaged.
        """
        *older, folder = self.checkpoints()
        loaded, damage = None, None
        try:
            loaded = load(folder)
        except DamagedCheckpointError as error:
            damage = error
        # All processes have listed and read the checkpoints before one of them is renamed.
        damage = next((error for error in gather_object([damage]) if error), None)
        if damage is None:
            return folder, cast("T", loaded)
        if not older:
            raise damage
        if self.accelerator.is_main_process:
            logger.warning("%s; continuing from %s instead", damage, older[-1])
        self._set_aside(folder)
        return self.newest(load)

    @in_main_process
    def _set_aside(self, folder: Path) -> None:
        """Rename a damaged checkpoint, which would otherwise count as one of the newest `train.keep`."""
        damaged = folder.with_name(f"{folder.name}.damaged")
        remove(damaged)
        folder.rename(damaged)

    def save(
        self,
        folder: Path,
        write: Callable[[Path], None],
        results: dict[str, Any] | None = None,
        write_shards: Callable[[Path], None] | None = None,
    ) -> None:
        """Write a checkpoint and its evaluation results; remove the oldest resumable ones beyond `train.keep`.

        Args:
            write: called by the main process.
            write_shards: called by all processes, before it, with a folder that becomes SHARDS of the checkpoint.

        Raises:
            CheckpointError: in all processes, if the disk is full or cannot be written to.
        """
        shards = folder.with_name(f"{folder.name}.shards.partial") if write_shards else None
        try:
            if write_shards and shards:
                self._clear(shards)
                write_shards(shards)
            self._save(folder, write, results, shards)
        except CheckpointError as error:
            if shards:
                self._remove(shards)
            again = "resume" if self.checkpoints() else "start again with --overwrite"
            raise CheckpointError(
                f"{error}\nEarlier checkpoints are untouched; fix this, or make room if the disk is full, and {again}."
            ) from error

    @in_main_process
    def _clear(self, folder: Path) -> None:
        """Make an empty folder."""
        self._check_exists()
        remove(folder)
        folder.mkdir(parents=True)

    @in_main_process
    def _remove(self, folder: Path) -> None:
        remove(folder)

    @in_main_process
    def _save(
        self, folder: Path, write: Callable[[Path], None], results: dict[str, Any] | None, shards: Path | None
    ) -> None:
        self._check_exists()
        self.history.sync()  # a resumed run continues it
        with new_checkpoint(folder) as partial:
            if shards is not None:
                shards.rename(partial / SHARDS)
            write(partial)
            if results is not None:
                write_json(partial / VALIDATION, results)
        for old in self.checkpoints()[: -self.config.train.keep]:
            leftover = old.with_name(f"{old.name}.partial")
            remove(leftover)
            old.rename(leftover)  # first, because a crash may remove only some of its files
            remove(leftover)

    def start_trackers(self, step: int) -> None:
        """Start the trackers of the run; TensorBoard then ignores what it has from `step` on, which is logged again."""
        sections = asdict(self.config).items()
        flat = {f"{section}.{key}": str(value) for section, values in sections for key, value in values.items()}
        self.accelerator.init_trackers("vg", flat, {"tensorboard": {"purge_step": step}} if step else {})
        for row in self.history.rows() if step else ():
            if row["step"] == step:
                self.accelerator.log({key: value for key, value in row.items() if key != "step"}, step)

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to the history; only the main process does, see `raise_on_all_processes`."""
        if self.accelerator.is_main_process:
            self._check_exists()
            self.history.append(row)

    def _check_exists(self) -> None:
        if not self.path.exists():
            raise TrainingError(
                f"the folder of this run, {self.path}, was removed during training: nothing can be saved"
            )

    @in_main_process
    def cut_history(self, step: int, evaluated: bool, logged: bool) -> None:
        """Remove the rows that a resumed run logs again, see `vg.training.history.History.cut`."""
        self.history.cut(step, evaluated, logged)
