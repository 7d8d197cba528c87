"""Trouble of data workers (too few open files, a kill) ends a program with one message, instead of a wait for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vg.config import RunConfig, dump_config

MakeConfig = Callable[..., RunConfig]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs limits and signals")

LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
"""
MAIN = """
import sys
from vg.cli import main
main(sys.argv[1:])
"""
SCARCE = """
import resource, torch
from vg import workers

workers.OPEN_FILES = workers.OPEN_FILES_PER_WORKER = 0
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
list(workers.new_loader([[torch.ones(1) for _ in range(100)]] * 8, 1, batch_size=None))
"""
KILLED = (
    """
import os, signal
from vg.data.dataset import SourceDataset

SourceDataset.__getitem__ = lambda self, index: os.kill(os.getpid(), signal.SIGKILL)
"""
    + MAIN
)


def run(script: str, folder: Path, *arguments: str) -> str:
    """Run a script that must fail within a minute; return its standard error."""
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1, result.stderr
    return result.stderr


def test_too_few_open_files(tiny_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(tiny_config(data={"workers": 2})))
    errors = run(LIMITED + MAIN, tmp_path, "train", "config.yaml")
    assert "error: data.workers=2 needs about 160 open files, but the limit is 40: run `ulimit -n 4096`" in errors
    assert "Traceback" not in errors


def test_all_loaders_are_made_here() -> None:
    """`vg train`, `vg eval` and `vg cache` share the checks."""
    package = Path(__file__).parents[1] / "vg"
    assert [path.name for path in package.rglob("*.py") if "DataLoader(" in path.read_text()] == ["workers.py"]


def test_the_soft_limit_of_open_files_is_raised(tmp_path: Path) -> None:
    script = SCARCE.replace("= 0", "= 200").replace("(60, 60)", "(60, 500)")
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1], check=True, timeout=60)


def test_a_batch_that_cannot_be_sent(tmp_path: Path) -> None:
    errors = run(SCARCE, tmp_path).splitlines()  # a thread of the worker may print errors of its own after it
    (message,) = (line for line in errors if "DataError: a data worker cannot send a batch: " in line)
    assert "Too many open files" in message
    assert message.endswith("set data.workers=0")


@pytest.mark.parametrize("workers", [0, 1])
def test_too_little_memory(tiny_config: MakeConfig, tmp_path: Path, workers: int) -> None:
    config = tiny_config(data={"workers": workers})
    config.model.image_size = 1_000_000  # type: ignore[union-attr]
    (tmp_path / "config.yaml").write_text(dump_config(config))
    errors = run(MAIN, tmp_path, "train", "config.yaml")
    assert "use a smaller data.batch_size" in errors
    assert "Traceback" not in errors


def test_a_killed_worker(tiny_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(tiny_config(data={"workers": 1})))
    errors = run(KILLED, tmp_path, "train", "config.yaml")
    assert "is killed by signal: Killed: often because memory" in errors or "exited unexpectedly: often" in errors
    assert "Traceback" not in errors
