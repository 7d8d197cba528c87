"""Two processes train like one with twice the batch size, evaluate every sample once, and stop at the same step."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import NO_DROPOUT, history, run_script
from vg.config import RunConfig, dump_config
from vg.distributed import LONGEST_WAIT, StopSignal, new_accelerator, seed_batch
from vg.errors import ConfigError
from vg.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]

SCRIPT = """
import os, signal, sys, torch
from vg.config import load_config
from vg.distributed import LONGEST_WAIT, shut_down
from vg.training.trainer import Trainer

class Interrupted(Trainer):
    def step(self, batches):
        backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        assert backend.options._timeout == LONGEST_WAIT  # of NCCL, it would be ten minutes
        if self.progress.step == 3 and self.accelerator.process_index == 1:
            signal.raise_signal(signal.SIGTERM)  # only to one process
        return super().step(batches)

assert int(os.environ["WORLD_SIZE"]) == 2
if "--resume" in sys.argv:
    Trainer(load_config("config.yaml"), resume=True).fit()
else:
    try:
        Interrupted(load_config("config.yaml")).fit()
    except SystemExit as stop:
        print(stop)
shut_down()
"""


def launch(folder: Path, *arguments: str, stream: str = "stdout", status: int = 0, forked: bool = True) -> str:
    """Run the script in two processes and return their output."""
    result = run_script(folder, "train.py", *arguments, forked=forked)
    assert result.returncode == status, result.stderr
    return str(getattr(result, stream))


def configured(make: MakeConfig, output: Path, batch_size: int, **data: Any) -> RunConfig:
    """28 training samples: 3 steps of 8 per epoch, the rest is dropped; 7 evaluation samples, not evenly divisible."""
    return make(
        model=NO_DROPOUT,
        data={
            "train": {"name": "shapes", "split": "train", "image_size": 64, "size": 28},
            "eval": {"name": "shapes", "split": "val", "image_size": 64, "size": 7},
            "batch_size": batch_size,
            "eval_batch_size": 2,
            "augment": {"flip": 0.5},
        },
        train={"output": str(output), "log_every": 1, "ema": 0.9, "interpolate": [0.0, 0.5]},
    )


def test_two_processes_equal_one_with_twice_the_batch(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """The two processes are stopped by a signal to one of them, and resumed."""
    two_processes = configured(tiny_config, tmp_path / "two", batch_size=4)
    (tmp_path / "config.yaml").write_text(dump_config(two_processes))
    (tmp_path / "train.py").write_text(SCRIPT)
    assert launch(tmp_path).count("stopped at step 4") == 2
    launch(tmp_path, "--resume")
    one_process = configured(tiny_config, tmp_path / "one", batch_size=8)
    Trainer(one_process).fit()

    one, two = history(one_process), history(two_processes)
    assert [row["step"] for row in one] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert one[-1]["num_expressions"] == 7
    for expected, row in zip(one, two, strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-5)
    swept = [json.loads((tmp_path / run / "interpolated" / "interpolation.json").read_text()) for run in ("one", "two")]
    for expected, row in zip(*(found["results"] for found in swept), strict=True):
        assert row["num_expressions"] == 7
        assert row["miou"] == pytest.approx(expected["miou"], rel=1e-5)


def test_processes_that_are_not_joined_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with torchrun on a machine whose only device is that of a laptop."""
    monkeypatch.setattr("vg.distributed.Accelerator", lambda **options: SimpleNamespace(num_processes=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    new_accelerator()  # of a container, whose processes are not started by torchrun
    with monkeypatch.context() as patch:  # mpirun
        patch.setattr("vg.distributed.Accelerator", lambda **options: SimpleNamespace(num_processes=2))
        new_accelerator()
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match="2 processes were started, but Accelerate does not join them"):
        new_accelerator()


def test_processes_stop_within_the_interval(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """A signal in step 4 is handled at step 5, because several processes agree every five steps here."""
    config = configured(tiny_config, tmp_path / "two", batch_size=4)
    config.train.log_every = 5
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (tmp_path / "train.py").write_text(SCRIPT)
    assert launch(tmp_path).count("stopped at step 5") == 2

    # Both processes pass over a damaged checkpoint.
    checkpoints = tmp_path / "two" / "checkpoints"
    (checkpoints / "step_000005" / "training.pt").write_bytes(b"")
    assert "step_000003 instead" in launch(tmp_path, "--resume", stream="stderr")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_000003", "step_000005.damaged", "step_000006"]


UNWRITABLE = """
import errno, os, sys
from vg.cli import main
from vg.training import report, run_folder

def fail(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

if os.environ["RANK"] == "0":
    {failing} = fail
try:
    main(["train", "config.yaml"])
except SystemExit as stop:
    print(stop)
    raise
"""


@pytest.mark.parametrize("failing", ["run_folder.RunFolder._check_exists", "report.write_bytes"])
def test_all_processes_end_if_the_main_process_cannot_write(
    tiny_config: MakeConfig, tmp_path: Path, failing: str
) -> None:
    """The others would wait for it in the next collective."""
    config = configured(tiny_config, tmp_path / "two", batch_size=4)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (tmp_path / "train.py").write_text(UNWRITABLE.format(failing=failing))
    assert launch(tmp_path, status=1, forked=False).count("No space left on device") == 2


LEFTOVERS = """
import atexit, os
from pathlib import Path
from vg.cli import main

def list_threads():
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    Path(f"threads_{os.environ['RANK']}").write_text(" ".join(names))

atexit.register(list_threads)
main(["train", "config.yaml"])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_no_thread_of_gloo_is_left_at_exit(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """Such a thread may abort the interpreter at exit; see the import in vg/distributed.py."""
    config = configured(tiny_config, tmp_path / "two", batch_size=32)
    config.train.max_steps = 1
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (tmp_path / "train.py").write_text(LEFTOVERS)
    errors = launch(tmp_path, stream="stderr", forked=False)
    for rank in range(2):
        assert "gloo" not in (tmp_path / f"threads_{rank}").read_text()
    assert "28 training samples are less than one batch (data.batch_size=32) for each of 2 processes" in errors


def test_one_process_checks_for_signals_without_a_collective(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tiny_config(train={"log_every": 50}))
    monkeypatch.setattr(trainer.accelerator, "reduce", None)
    assert trainer.stop.interval == 1
    assert not trainer.stop.requested()
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    assert StopSignal(trainer.accelerator, 10).interval == 10


def test_several_processes_check_for_signals_on_the_host(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, flags = Trainer(tiny_config()), []
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    monkeypatch.setattr(type(trainer.accelerator), "device", torch.device("meta"))
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend, timeout: (backend, timeout))
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda flag, *options: flags.append((flag.device.type, options))
    )
    assert not trainer.stop.requested()
    assert flags == [("cpu", (torch.distributed.ReduceOp.MAX, ("gloo", LONGEST_WAIT)))]


def test_random_numbers_depend_on_seed_step_and_batch() -> None:
    def draw(*position: int) -> tuple[float, float, float]:
        import random

        seed_batch(*position)
        return random.random(), float(np.random.rand()), torch.rand(()).item()  # noqa: NPY002

    positions = list(itertools.product((0, 1, 2**62), (0, 1), (0, 1, 7)))
    drawn = [draw(*position) for position in positions]
    assert all(len(set(values)) == len(positions) for values in zip(*drawn, strict=True))
    assert [draw(*position) for position in reversed(positions)] == drawn[::-1]


MINUTES = """
import time
from pathlib import Path
from vg.config import load_config
from vg.distributed import shut_down
from vg.training.trainer import Trainer

class Slow(Trainer):
    def step(self, batches):
        time.sleep(0.05 * (1 + self.accelerator.process_index))
        return super().step(batches)

trainer = Slow(load_config("config.yaml"))
trainer.fit()
Path(f"steps_{trainer.accelerator.process_index}").write_text(f"{trainer.progress.step} of {trainer.num_steps}")
shut_down()
"""


def test_processes_agree_on_the_steps_of_a_given_time(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = configured(tiny_config, tmp_path / "run", batch_size=4)
    config.train.minutes = 0.1
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (tmp_path / "train.py").write_text(MINUTES)
    launch(tmp_path)
    (steps,) = {(tmp_path / f"steps_{process}").read_text() for process in range(2)}  # lines of output may be mixed
    done, planned = steps.split(" of ")
    assert done == planned
