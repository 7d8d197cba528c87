"""A run that was interrupted in any way and resumed equals an uninterrupted run bit for bit."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from tests.models.grounding_dino.tiny import tiny_config as tiny_grounding_dino
from vg.checkpoint import STATE
from vg.config import RunConfig, dump_config, load_config
from vg.distributed import StopSignal
from vg.errors import CheckpointError, UserError
from vg.models.grounding_dino.config import DenoisingConfig
from vg.models.rec.config import PooledHeadConfig
from vg.training.data import training_data
from vg.training.optim import GroupConfig
from vg.training.trainer import Trainer
from vg.types import Batch

MakeConfig = Callable[..., RunConfig]

EVERYTHING: dict[str, Any] = {  # three steps of two batches per epoch, and two samples that are left out; dropout is on
    "data": {
        "train": {"name": "shapes", "split": "train", "image_size": 64, "size": 26},
        "augment": {"flip": 0.5, "color": 0.2, "crop": 0.5},
    },
    "optim": {"lr": 1e-3, "warmup_steps": 2},
    "train": {"epochs": 2, "accumulate": 2, "ema": 0.9, "log_every": 4},
}


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    """Install the default Ctrl-C handler: a program that a shell starts in the background ignores Ctrl-C."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


def configured(make: MakeConfig, output: Path, data: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    return make(
        data=EVERYTHING["data"] | (data or {}),
        optim=EVERYTHING["optim"],
        train=EVERYTHING["train"] | {"output": str(output), "trackers": []} | train,
    )


def start(script: str, config: RunConfig, folder: Path, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Start a script in its own process, in a folder with the script and config.yaml."""
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "train.py").write_text(script)
    return subprocess.Popen(
        [sys.executable, "train.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


def stop_in_step(trainer: Trainer, number: int, how: Callable[[], None]) -> None:
    """Call `how` at the start of an optimizer step, before its first batch."""
    step = trainer.step

    def interrupted(batches: Sequence[Batch]) -> dict[str, Tensor] | None:
        if trainer.progress.step + 1 == number:
            how()
        return step(batches)

    trainer.step = interrupted  # type: ignore[method-assign]


def assert_same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}.{index}")
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype, where
        assert a.equal(b), where
    else:
        assert a == b, where


def assert_same_runs(uninterrupted: Path, resumed: Path) -> None:
    """Compare all but the name of the folder: weights, averages, optimizer, random state, history and best."""
    assert (resumed / "history.jsonl").read_text() == (uninterrupted / "history.jsonl").read_text()
    last = max(path.name for path in (uninterrupted / "checkpoints").iterdir())
    for folder in ("best", f"checkpoints/{last}"):
        for name in ("model.safetensors", "validation.json"):
            if (uninterrupted / folder / name).exists():
                assert (resumed / folder / name).read_bytes() == (uninterrupted / folder / name).read_bytes(), (
                    folder,
                    name,
                )
    states = [
        torch.load(run / "checkpoints" / last / "training.pt", weights_only=True) for run in (uninterrupted, resumed)
    ]
    assert_same(*states)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_at_any_step(tiny_config: MakeConfig, tmp_path: Path, workers: int) -> None:
    """Six steps; an epoch ends at step 3, and rows are logged at steps 3, 4 and 6."""
    data = {"workers": workers}
    uninterrupted = tmp_path / "uninterrupted"
    Trainer(configured(tiny_config, uninterrupted, data)).fit()
    for number in range(1, 7) if workers == 0 else (2, 3):
        config = configured(tiny_config, tmp_path / f"stopped_{number}", data)
        trainer = Trainer(config)
        stop_in_step(trainer, number, interrupt)
        with pytest.raises(SystemExit, match=f"stopped at step {number}, saved in .*with --resume to continue"):
            trainer.fit()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert (Path(config.train.output) / "curves.png").exists() == (number > 3), "if a row is logged"
        resumed = Trainer(config, resume=True)
        assert resumed.progress.step == number
        resumed.fit()
        assert_same_runs(uninterrupted, Path(config.train.output))


def test_stopped_twice_with_different_intervals_of_evaluation_and_saving(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    train = {"eval_every": 2, "save_every": 3, "log_every": 5, "accumulate": 1}
    uninterrupted = tmp_path / "uninterrupted"
    Trainer(configured(tiny_config, uninterrupted, **train)).fit()
    config = configured(tiny_config, tmp_path / "stopped", **train)
    for number in (4, 7):
        trainer = Trainer(config, resume=number > 4)
        stop_in_step(trainer, number, interrupt)
        with pytest.raises(SystemExit):
            trainer.fit()
    Trainer(config, resume=True).fit()
    assert_same_runs(uninterrupted, Path(config.train.output))


class Killed(BaseException):
    """Simulates kill -9: the trainer cannot catch it."""


def kill() -> None:
    raise Killed


def test_killed_and_resumed_from_the_last_checkpoint(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """The rows and the best model after the checkpoint are discarded and created again."""
    train = {"save_every": 2, "log_every": 1, "eval_every": 1}
    uninterrupted = tmp_path / "uninterrupted"
    Trainer(configured(tiny_config, uninterrupted, **train)).fit()
    config = configured(tiny_config, tmp_path / "killed", **train)
    trainer = Trainer(config)
    stop_in_step(trainer, 6, kill)
    with pytest.raises(Killed):
        trainer.fit()
    with (tmp_path / "killed" / "history.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing a row
    resumed = Trainer(config, resume=True)
    assert resumed.progress.step == 4
    resumed.fit()
    assert_same_runs(uninterrupted, Path(config.train.output))


def test_stopped_at_a_row_and_killed_after_it(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """The first resume logs the row of the checkpoint's step, and the second one again: from the same checkpoint."""
    train = {"log_every": 2, "save_every": 6, "eval_every": 6}
    uninterrupted = tmp_path / "uninterrupted"
    Trainer(configured(tiny_config, uninterrupted, **train)).fit()
    config = configured(tiny_config, tmp_path / "interrupted", **train)
    for how, error in ((interrupt, SystemExit), (kill, Killed)):
        trainer = Trainer(config, resume=how is kill)
        stop_in_step(trainer, 4 if how is interrupt else 5, how)
        with pytest.raises(error):
            trainer.fit()
    Trainer(config, resume=True).fit()
    assert_same_runs(uninterrupted, Path(config.train.output))


@pytest.mark.parametrize("moment", ["in the evaluation", "after its row", "in the second save"])
def test_killed_around_an_evaluation(tiny_config: MakeConfig, tmp_path: Path, moment: str) -> None:
    """The state is saved before the evaluation, which may take long; the resumed run evaluates again."""
    uninterrupted = tmp_path / "uninterrupted"
    Trainer(configured(tiny_config, uninterrupted, trackers=["tensorboard"])).fit()
    config = configured(tiny_config, tmp_path / "killed", trackers=["tensorboard"])
    trainer = Trainer(config)
    if moment == "in the evaluation":
        trainer.evaluator.run = lambda model: kill()  # type: ignore[assignment, method-assign]
    elif moment == "after its row":
        evaluate = trainer.evaluate
        trainer.evaluate = lambda: [evaluate(), kill()]  # type: ignore[assignment, method-assign]
    else:
        saves = iter([trainer.save, kill])
        trainer.save = lambda: next(saves)()  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.fit()
    time.sleep(1)  # TensorBoard orders files by the second in their name
    resumed = Trainer(config, resume=True)
    assert resumed.progress.step == 3
    resumed.fit()
    assert_same_runs(uninterrupted, Path(config.train.output))
    assert points(tmp_path / "killed") == points(uninterrupted)


def points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: step and value of the points of every tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "logs" / "vg")).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_kill_and_resume_leaves_no_point_twice(tiny_config: MakeConfig, tmp_path: Path) -> None:
    train = {"save_every": 2, "log_every": 1, "eval_every": 1, "trackers": ["tensorboard"]}
    uninterrupted = tmp_path / "uninterrupted"
    Trainer(configured(tiny_config, uninterrupted, **train)).fit()
    config = configured(tiny_config, tmp_path / "killed", **train)
    trainer = Trainer(config)
    stop_in_step(trainer, 6, kill)
    with pytest.raises(Killed):
        trainer.fit()
    time.sleep(1)  # see above
    Trainer(config, resume=True).fit()
    assert points(tmp_path / "killed") == points(uninterrupted)
    assert len(points(uninterrupted)["loss"]) == 6


REMOVED = """
import shutil, sys
from pathlib import Path
from vg.cli import main
from vg.training.trainer import Trainer

step = Trainer.step

def removing(self, batches):
    if self.progress.step == 2:
        shutil.rmtree("run")
    return step(self, batches)

Trainer.step = removing
main(["train", "config.yaml"])
"""


def test_a_removed_run_folder_ends_with_one_message(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = configured(tiny_config, Path("run"), log_every=1, trackers=["tensorboard"])
    process = start(REMOVED, config, tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert errors.strip().endswith(
        "error: the folder of this run, run, was removed during training: nothing can be saved"
    ), errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_a_finished_run_can_be_resumed_and_extended(
    tiny_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configured(tiny_config, tmp_path / "run")
    results = Trainer(config).fit()
    before = (tmp_path / "run" / "history.jsonl").read_text()
    assert Trainer(config, resume=True).fit() == results
    assert (tmp_path / "run" / "history.jsonl").read_text() == before
    assert not [message for message in caplog.messages if "other settings" in message]
    (tmp_path / "run" / "config.yaml").write_text("model: [\n")
    Trainer(config, resume=True)
    assert "config.yaml is missing or damaged, and is written again" in caplog.text
    config.train.epochs, config.train.seed = 3, 5
    longer = Trainer(config, resume=True)
    changed = [message for message in caplog.messages if "other settings" in message]
    assert changed == [
        "the run continues with other settings (train.seed: 0 before, 5 now; train.epochs: 2 before, 3 now)"
    ]
    longer.fit()
    assert longer.progress.step == 9


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "history.jsonl",
            b'{"step": 1, "loss": 1}\n[1]\n',
            r"history\.jsonl, line 2: not a row of a history",
        ),
        ("history.jsonl", b'{"step": "a"}\n', r"history\.jsonl, line 1: not a row"),
        ("history.jsonl", b"\xff\xfe\n", r"Not encoded in UTF-8 .*history\.jsonl"),
        ("best/validation.json", b"x", r"Not JSON .*validation\.json"),
        ("best/validation.json", b"[]", r"Not a JSON dict.*validation\.json"),
        ("checkpoints/step_000001/training.pt", b"", r"cannot resume from .*training\.pt"),
        ("checkpoints/step_000001/training.pt", [1], r"training\.pt: it lacks data, ema, optimizer, "),
        ("checkpoints/step_000001/training.pt", dict.fromkeys(STATE - {"ema"}), r"training\.pt: it lacks ema$"),
        ("checkpoints/step_000001/training.pt", dict.fromkeys(STATE), r"training\.pt: its progress must have best, "),
        (
            "checkpoints/step_000001/training.pt",
            dict.fromkeys(STATE) | {"progress": {"step": 1}},
            r"training\.pt: its progress must have best, best_metric, ",
        ),
    ],
)
def test_files_of_a_run_that_were_damaged(
    tiny_config: MakeConfig, tmp_path: Path, file: str, content: Any, message: str
) -> None:
    config = configured(tiny_config, tmp_path / "run", max_steps=1)
    Trainer(config).fit()
    (tmp_path / "run" / "checkpoints" / "step_1x1").mkdir()  # not of vg
    (tmp_path / "run" / "checkpoints" / "step_1x1" / "training.pt").touch()
    (tmp_path / "run" / "checkpoints" / "step_1x1" / "model.safetensors").touch()
    path = tmp_path / "run" / file
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises((UserError, OSError), match=message):
        Trainer(config, resume=True).fit()


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_resuming_with_the_pooled_head(
    tiny_config: MakeConfig, tmp_path: Path, algorithm: Literal["adamw", "muon"]
) -> None:
    head = PooledHeadConfig(width=32, layers=1, heads=2, feedforward=64, dropout=0.3)
    runs = []
    for name in ("uninterrupted", "stopped"):
        config = configured(tiny_config, tmp_path / name)
        config.model.head = head
        config.optim.algorithm = algorithm
        runs.append(Path(config.train.output))
        trainer = Trainer(config)
        if name == "stopped":
            stop_in_step(trainer, 2, interrupt)
            with pytest.raises(SystemExit):
                trainer.fit()
            trainer = Trainer(config, resume=True)
        trainer.fit()
    assert_same_runs(*runs)


def test_resuming_with_another_configuration_raises(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = configured(tiny_config, tmp_path / "run", max_steps=1)
    Trainer(config).fit()
    config.optim.groups = {"head": GroupConfig(lr=1e-5)}
    with pytest.raises(CheckpointError, match=r"step_000001.training\.pt does not match the configuration"):
        Trainer(config, resume=True)
    config.optim.groups = {}
    config.model.head.width = 64  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=r"(?s)step_000001.*shape: head"):
        Trainer(config, resume=True)


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_resuming_with_other_hyperparameters_of_the_optimizer(
    tiny_config: MakeConfig, tmp_path: Path, algorithm: Literal["adamw", "muon"]
) -> None:
    """The configured values apply from the first step; one group had a learning rate of 0."""
    config = configured(tiny_config, tmp_path / "run")
    config.optim.algorithm = algorithm
    config.optim.groups = {"vision": GroupConfig(lr=0.0)}
    trainer = Trainer(config)
    stop_in_step(trainer, 4, interrupt)
    with pytest.raises(SystemExit):
        trainer.fit()
    before = [(group["lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups]
    config.optim.lr, config.optim.weight_decay, config.optim.betas = 1e-4, 0.5, (0.8, 0.9)
    config.optim.groups = {"vision": GroupConfig(lr=3e-5)}
    resumed = Trainer(config, resume=True)
    assert resumed.schedule.last_epoch == 4
    factor = trainer.schedule.get_last_lr()[-1] / 1e-3
    assert 0 < factor < 1
    expected = [(3e-5 * factor if lr == 0 else 1e-4 * factor, 0.5 if decay else 0.0) for lr, decay in before]
    groups = resumed.optimizer.param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [pytest.approx(pair) for pair in expected]
    assert {group["betas"] for group in groups if "betas" in group} == {(0.8, 0.9)}
    assert resumed.schedule.get_last_lr() == [group["lr"] for group in groups]
    resumed.fit()


def test_resuming_with_another_best_metric(
    tiny_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Scores of two metrics are not compared."""
    config = configured(tiny_config, tmp_path / "run", max_steps=1)
    Trainer(config).fit()
    path = tmp_path / "run" / "checkpoints" / "step_000001" / "training.pt"
    state = torch.load(path, weights_only=True)
    state["progress"] |= {"best": 2.0, "evaluations_since_best": 3}
    torch.save(state, path)
    assert Trainer(config, resume=True).progress.best == 2
    config.train.best_metric, config.train.max_steps = "acc@0.5", 2
    resumed = Trainer(config, resume=True)
    assert (resumed.progress.best, resumed.progress.evaluations_since_best) == (-math.inf, 0)
    assert "the best score of the checkpoint of step 1 is of miou, but train.best_metric is acc@0.5 now" in caplog.text
    assert resumed.fit()["step"] == 2


WAITING = """
import sys, time
from pathlib import Path
from vg.config import load_config
from vg.training.trainer import Trainer

class Waiting(Trainer):
    def step(self, batches):
        if self.progress.step == 3:
            Path("waiting").touch()
            while not self.stop.received:
                time.sleep(0.01)
        return super().step(batches)

Waiting(load_config("config.yaml")).fit()
"""


SLOW_SAVE = WAITING.replace(
    "Waiting(load_config",
    """
from vg import checkpoint
write = checkpoint.write_training_state

def slow(folder, state):
    if folder.name == "step_000004.partial":
        Path("saving").touch()
        while not Path("go").exists():
            time.sleep(0.01)
    write(folder, state)

checkpoint.write_training_state = slow
Waiting(load_config""",
)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(os.name != "posix", reason="needs locks of files")
def test_two_runs_at_once_in_one_folder(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """Such as a job that is queued again while its predecessor is alive; a killed one does not block the next."""
    config = configured(tiny_config, tmp_path / "run", {"workers": 2})
    process = start(WAITING, config, tmp_path)
    wait_for(tmp_path / "waiting", process)
    before = (tmp_path / "run" / "history.jsonl").read_bytes()
    for resume, overwrite in ((True, False), (False, True), (False, False)):
        with pytest.raises(CheckpointError, match=r"another process is training in .*run; wait for its end"):
            Trainer(config, resume, overwrite)
    assert (tmp_path / "run" / "history.jsonl").read_bytes() == before
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    Trainer(config, resume=True).fit()
    assert not (tmp_path / "run" / "train.lock").exists()


BUILT = """
import time
from pathlib import Path
from vg.config import load_config
from vg.training.trainer import Trainer

trainer = Trainer(load_config("config.yaml"))
Path("waiting").touch()
time.sleep(120)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs locks of files")
def test_a_run_has_its_folder_before_the_first_step(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = configured(tiny_config, tmp_path / "run")
    process = start(BUILT, config, tmp_path)
    wait_for(tmp_path / "waiting", process)
    before = (tmp_path / "run" / "config.yaml").stat()
    with pytest.raises(CheckpointError, match=r"another process is training in .*run; wait for its end"):
        Trainer(config, overwrite=True)
    assert (tmp_path / "run" / "config.yaml").stat() == before
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    Trainer(config).fit()


def test_a_run_that_began_while_another_one_loaded_its_data(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found an empty folder; the second one to begin must not replace the checkpoints of the first."""
    first, second = (configured(tiny_config, tmp_path / "run", epochs=epochs) for epochs in (1, 2))

    def load(*arguments: Any) -> Any:
        monkeypatch.undo()
        Trainer(first).fit()
        return training_data(*arguments)

    monkeypatch.setattr("vg.training.trainer.training_data", load)
    with pytest.raises(CheckpointError, match=r"run already contains a run \(checkpoints/step_000003\)"):
        Trainer(second)
    assert load_config(tmp_path / "run" / "config.yaml").train.epochs == 1
    assert (tmp_path / "run" / "best" / "validation.json").exists()
    assert not (tmp_path / "run" / "train.lock").exists()


SIGNALS = ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"]


@pytest.mark.skipif(os.name != "posix", reason="needs process groups")
@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_to_the_process_group(tiny_config: MakeConfig, tmp_path: Path, name: str) -> None:
    """Terminals, Slurm, systemd and containers signal the data workers too, whose data the main process still needs."""
    preemption = {"preemption_signal": name} if name.startswith("SIGUSR") else {}
    config = configured(tiny_config, tmp_path / "stopped", {"workers": 2}, **preemption)
    process = start(WAITING, config, tmp_path)
    wait_for(tmp_path / "waiting", process)
    os.killpg(process.pid, getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert f"{name} received: saving after this step" in errors
    assert "stopped at step 4, saved in" in errors
    assert "repeat the command with --resume to continue" in errors
    assert "Traceback" not in errors
    if name == SIGNALS[0]:
        Trainer(config, resume=True).fit()
        Trainer(configured(tiny_config, tmp_path / "uninterrupted", {"workers": 2})).fit()
        assert_same_runs(tmp_path / "uninterrupted", tmp_path / "stopped")


@pytest.mark.skipif(os.name != "posix", reason="needs process groups")
def test_other_signals_have_their_usual_effect(tiny_config: MakeConfig, tmp_path: Path) -> None:
    process = start(WAITING, configured(tiny_config, tmp_path, {"workers": 1}, preemption_signal="SIGUSR2"), tmp_path)
    wait_for(tmp_path / "waiting", process)
    os.killpg(process.pid, signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGUSR1, errors


@pytest.mark.skipif(os.name != "posix", reason="needs process groups")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("count", [2, 3])
def test_further_signals_while_saving(tiny_config: MakeConfig, tmp_path: Path, name: str, count: int) -> None:
    """A second signal, of the user or of a scheduler, does not interrupt the save; a third one ends at once."""
    config = configured(tiny_config, tmp_path / "stopped", {"workers": 1})
    process = start(SLOW_SAVE, config, tmp_path)
    wait_for(tmp_path / "waiting", process)
    os.killpg(process.pid, getattr(signal, name))
    wait_for(tmp_path / "saving", process)
    for _ in range(count - 1):
        os.killpg(process.pid, getattr(signal, name))
        time.sleep(0.3)
    if count == 2:
        (tmp_path / "go").touch()
    _, errors = process.communicate(timeout=60)
    assert f"{name} received again: still saving" in errors
    if count == 2:
        assert process.returncode == 1, errors
        assert "stopped at step 4, saved in" in errors
        assert "Traceback" not in errors
        assert Trainer(config, resume=True).progress.step == 4
    else:
        assert process.returncode in (-getattr(signal, name), 1), errors
        assert "saved in" not in errors


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs sigwaitinfo and /proc")
def test_only_the_main_process_ends_its_data_workers(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """A worker that hangs is ended with SIGTERM when the main process ends; the program must not wait for it."""
    script = """
import os, subprocess, time
from pathlib import Path
from torch.utils.data import DataLoader
from vg.workers import start_worker

class Hanging:
    def __len__(self): return 2
    def __getitem__(self, index):
        Path(f"worker_{os.getpid()}").touch()
        time.sleep(1000)

def run():
    workers = DataLoader(Hanging(), num_workers=1, worker_init_fn=start_worker)._get_iterator()
    while not list(Path(".").glob("worker_*")):
        time.sleep(0.01)
    worker, = workers._workers
    for name in ("TERM", "INT", "HUP", "USR1", "USR2"):
        subprocess.run(["sh", "-c", f"kill -{name} {worker.pid}"], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(5)
    assert not worker.is_alive()

run()
"""
    process = start(script, configured(tiny_config, tmp_path), tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


@pytest.mark.skipif(os.name != "posix", reason="needs a terminal")
def test_a_closed_terminal_saves(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """Standard error cannot be written to any more, neither by the progress bar nor by messages."""
    config = configured(tiny_config, tmp_path / "stopped", {"workers": 1})
    terminal, slave = os.openpty()
    script = "import fcntl, termios; fcntl.ioctl(2, termios.TIOCSCTTY, 0)\n" + WAITING
    process = start(script, config, tmp_path, stderr=slave)
    os.close(slave)
    wait_for(tmp_path / "waiting", process)
    os.close(terminal)
    process.wait(timeout=60)
    assert Trainer(config, resume=True).progress.step == 4


@pytest.mark.skipif(os.name != "posix", reason="needs nohup")
def test_nohup_is_respected(tiny_config: MakeConfig) -> None:
    stop = StopSignal(Trainer(tiny_config()).accelerator)
    inherited = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop.listening():
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested()
    finally:
        signal.signal(signal.SIGHUP, inherited)


KILLED = """
import os, signal
from vg import checkpoint
from vg.config import load_config
from vg.training.trainer import Trainer

write = checkpoint.write_training_state

def killed(folder, state):
    write(folder, state)
    if folder.name == "step_000004.partial":
        os.truncate(folder / "training.pt", 1000)
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.write_training_state = killed
Trainer(load_config("config.yaml")).fit()
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("family", ["rec", "grounding_dino"])
def test_killed_while_writing_a_checkpoint(tiny_config: MakeConfig, tmp_path: Path, family: str) -> None:
    """An incomplete checkpoint is ignored: the run continues from the previous one."""

    def make(name: str) -> RunConfig:
        config = configured(tiny_config, tmp_path / name, save_every=2)
        if family == "grounding_dino":
            config.data.train.view = config.data.eval.view = "detection"  # type: ignore[union-attr]
            config.model = tiny_grounding_dino(denoising=DenoisingConfig(num_queries=6, num_labels=8))
        return config

    config = make("killed")
    process = start(KILLED, config, tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    assert [path.name for path in sorted((tmp_path / "killed" / "checkpoints").iterdir())] == [
        "step_000002",
        "step_000004.partial",
    ]
    Trainer(make("uninterrupted")).fit()
    resumed = Trainer(config, resume=True)
    assert resumed.progress.step == 2
    resumed.fit()
    assert_same_runs(tmp_path / "uninterrupted", tmp_path / "killed")
    assert not list((tmp_path / "killed").rglob("*.partial"))


def test_the_third_signal_interrupts_at_once(tiny_config: MakeConfig, capfd: pytest.CaptureFixture[str]) -> None:
    stop = StopSignal(Trainer(tiny_config()).accelerator)
    with stop.listening():
        assert not stop.requested()
        interrupt()
        assert stop.requested()
        interrupt()
        assert capfd.readouterr().err.count("SIGINT received") == 2
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_folders_that_a_crash_left_as_old_are_restored(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = configured(tiny_config, tmp_path / "run")
    results = Trainer(config).fit()
    for name in ("best", "checkpoints/step_000006"):
        (tmp_path / "run" / name).rename(tmp_path / "run" / f"{name}.old")
        (tmp_path / "run" / f"{name}.partial").mkdir()
    (tmp_path / "run" / "notes.old").write_text("of the user")
    resumed = Trainer(config, resume=True)
    assert resumed.progress.step == 6
    assert resumed.fit() == results
    left = [path.name for path in (tmp_path / "run").rglob("*") if path.suffix in (".old", ".partial")]
    assert left == ["notes.old"]
