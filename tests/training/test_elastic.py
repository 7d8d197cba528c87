"""Training on a changing number of processes, which may be killed: torchrun restarts them, and the run continues."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import run_script
from tests.models.grounding_dino.tiny import tiny_config as tiny_grounding_dino
from tests.models.rec.test_model import TINY_RESNET
from tests.training.test_batch_splits import EPS
from tests.training.test_resume import assert_same_runs, configured, interrupt, stop_in_step
from vg.cli import main
from vg.config import RunConfig, dump_config
from vg.errors import CheckpointError
from vg.models.grounding_dino.config import DenoisingConfig
from vg.models.saved import read_weights
from vg.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]

# KILLS: for each attempt, the rank that is killed, and the method and the step in which that happens.
SCRIPT = """
import os, signal, sys
import vg.cli
from vg import checkpoint
from vg.training.trainer import Trainer

rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
trainers = []

def kill(moment):
    if KILLS[attempt:][:1] == [(rank, moment, trainers[0].progress.step)]:
        os.kill(os.getpid(), signal.SIGKILL)

fit, step, evaluate, write = Trainer.fit, Trainer.step, Trainer.evaluate, checkpoint.write_training_state
Trainer.fit = lambda self: [trainers.append(self), fit(self)]
Trainer.step = lambda self, batches: [kill("step"), step(self, batches)][1]
Trainer.evaluate = lambda self: [kill("evaluation"), evaluate(self)]
checkpoint.write_training_state = lambda *arguments: [write(*arguments), kill("save")]  # before it is renamed
vg.cli.use_fast_products = lambda: False  # as in the process of the tests
vg.cli.main(["train", *sys.argv[1:]])
"""


def launch(
    config: RunConfig, folder: Path, *arguments: str, kills: list[tuple[int, str, int]] | None = None, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """Train in two processes, of which some are killed."""
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "train.py").write_text(SCRIPT.replace("KILLS", repr(kills or [])))
    return run_script(folder, f"--max-restarts={restarts}", "train.py", "config.yaml", *arguments, timeout=300)


def make_config(make: MakeConfig, output: Path, family: str, accumulate: int, **train: Any) -> RunConfig:
    """Six steps of which an epoch has three, with dropout, augmentation and, in Grounding DINO, denoising."""
    config = configured(make, output, {"batch_size": 2}, accumulate=accumulate, **train)
    if family == "batch_norm":
        config.model.vision.architecture = TINY_RESNET  # type: ignore[union-attr]
    if family == "grounding_dino":
        config.data.train.view = config.data.eval.view = "detection"  # type: ignore[union-attr]
        config.model = tiny_grounding_dino(denoising=DenoisingConfig(num_queries=6, num_labels=8), dropout=0.1)
    return config


@pytest.mark.parametrize(
    ("family", "accumulate", "is_exact"),
    [("rec", 2, True), ("grounding_dino", 2, True), ("batch_norm", 2, True), ("rec", 4, False)],
)
def test_resuming_with_another_number_of_processes(
    tiny_config: MakeConfig, tmp_path: Path, family: str, accumulate: int, is_exact: bool
) -> None:
    """A run of one process continues with two: the sum of two gradients has the same bits, that of four is rounded."""
    for name in ("straight", "stopped"):
        config = make_config(tiny_config, tmp_path / name, family, accumulate)
        trainer = Trainer(config)
        for group in trainer.optimizer.param_groups:
            group["eps"] = EPS  # is saved
        if name == "stopped":
            stop_in_step(trainer, 2, interrupt)
            with pytest.raises(SystemExit):
                trainer.fit()
        else:
            trainer.fit()
    config.train.accumulate = accumulate // 2
    result = launch(config, tmp_path, "--resume")
    assert result.returncode == 0, result.stderr
    if is_exact:
        assert_same_runs(tmp_path / "straight", tmp_path / "stopped")
    weights = [read_weights(next((tmp_path / run / "checkpoints").glob("*6"))) for run in ("straight", "stopped")]
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_three_kills_and_restarts_equal_the_quiet_run(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """Killed before the first checkpoint, while one is written, and in an evaluation; an older run is in the folder."""
    train = {"save_every": 2, "log_every": 4}
    Trainer(make_config(tiny_config, tmp_path / "quiet", "rec", accumulate=2, **train)).fit()
    config = make_config(tiny_config, tmp_path / "killed", "rec", accumulate=1, **train)
    config.train.max_steps = 1
    Trainer(config).fit()
    config.train.max_steps = None
    kills = [(1, "step", 1), (0, "save", 4), (1, "evaluation", 6)]
    result = launch(config, tmp_path, "--overwrite", restarts=3, kills=kills)
    assert result.returncode == 0, result.stderr
    assert [line[-1] for line in re.findall("failed .exitcode: -9. local_rank: .", result.stderr)] == ["1", "0", "1"]
    assert re.findall("continues after step .", result.stdout) == ["continues after step 2", "continues after step 6"]
    assert_same_runs(tmp_path / "quiet", tmp_path / "killed")


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_dead_process_ends_the_others_and_is_named(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tiny_config, tmp_path / "run", "rec", accumulate=1)
    result = launch(config, tmp_path, kills=[(1, "step", 1)])
    assert result.returncode == 1
    report = result.stderr[result.stderr.index("Root Cause (first observed failure)") :]
    assert "rank      : 1 (local_rank: 1)" in report
    assert "SIGKILL" in report


def test_a_closed_connection_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: Any) -> None:
        raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:2977. This is typically caused by ...")

    monkeypatch.setattr("vg.cli.ops.run", fail)
    with pytest.raises(SystemExit, match="error: another process of this run ended, which the launcher names"):
        main(["ops"])


def test_only_a_restart_continues_by_itself(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launch is what counts, not the folder: it may contain a run from before, also one of torchrun."""

    def launched(name: str, restarts: int) -> None:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / name / f"attempt_{restarts}" / "0" / "error.json"))

    config = configured(tiny_config, tmp_path / "run", max_steps=3, save_every=1)
    launched("first", 0)
    trainer = Trainer(config)
    assert (tmp_path / "run" / "launch.json").exists()
    launched("first", 1)
    assert Trainer(config).progress.step == 0, "no checkpoint yet"
    trainer.fit()
    launched("first", 2)
    assert Trainer(config).progress.step == 3
    with pytest.raises(CheckpointError, match="already contains a run"):
        Trainer(config)  # a second run of the same processes
    launched("first", 3)
    assert Trainer(config, overwrite=True).progress.step == 3
    assert Trainer(config, overwrite=True).progress.step == 0
    trainer.save()

    for name in ("second", None):
        launched(name, 1) if name else monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
        with pytest.raises(CheckpointError, match="already contains a run"):
            Trainer(config)
        assert Trainer(config, resume=True).progress.step == 3
    launched("third", 0)
    assert Trainer(config, overwrite=True).progress.step == 0
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    Trainer(config, overwrite=True)
    assert not (tmp_path / "run" / "launch.json").exists()
