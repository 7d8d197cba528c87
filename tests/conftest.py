"""Shared by all tests: one thread, no network access, and a configuration that trains in a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from vg.config import RunConfig, parse_config
from vg.data.source import Provenance
from vg.evaluation.results import DatasetResult, EvaluationResult
from vg.models.rec.config import RecConfig
from vg.models.settings import TINY_BERT

if TYPE_CHECKING:
    from vg.training.trainer import Trainer

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "true"  # results of a GPU are not equal bit by bit
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start: more threads than cores are slow
torch.set_num_threads(1)

TINY = asdict(RecConfig.tiny())
VISION = TINY["vision"]["architecture"]
TEXT = TINY_BERT | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
HEAD = TINY["head"] | {"dropout": 0.1}
NO_DROPOUT = {"text": TINY["text"], "head": TINY["head"]}


@pytest.fixture(autouse=True, scope="session")  # before fixtures of the session, which run verbs
def products_of_torch() -> Iterator[None]:
    """Keep the arithmetic of this process, which results of one test and another share: verbs would change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vg.cli.use_fast_products", lambda: False)
        yield


@pytest.fixture
def tiny_config(tmp_path: Path) -> Callable[..., RunConfig]:
    """A function that returns a configuration whose run takes a second.

    Its arguments override values of sections: ``tiny_config(train={"ema": 0.9}, data={"workers": 2})``.
    """

    def make(**sections: dict[str, Any]) -> RunConfig:
        values: dict[str, dict[str, Any]] = {
            "model": TINY | {"text": TINY["text"] | {"architecture": TEXT}, "head": HEAD},
            "data": {
                "train": {"name": "shapes", "split": "train", "image_size": 64, "size": 20},
                "eval": {"name": "shapes", "split": "val", "image_size": 64, "size": 5},
                "batch_size": 4,
                "eval_batch_size": 5,
                "workers": 0,
            },
            "optim": {"lr": 1e-3},
            "train": {"epochs": 2, "output": str(tmp_path / "run"), "log_every": 2, "trackers": []},
        }
        assert sections.keys() <= values.keys(), sections.keys()
        return parse_config({name: values[name] | sections.get(name, {}) for name in values})

    return make


def run_script(
    folder: Path, *command: str, processes: int = 2, forked: bool = True, timeout: float = 200
) -> subprocess.CompletedProcess[str]:
    """Run a Python script in a folder, in several processes on the CPU; options of torchrun come before the script.

    Args:
        forked: several processes start with vg imported, in half of the time, but exit without Python's exit handlers;
            on Linux only, because forking is not safe on other systems.
    """
    # Not `accelerate launch --cpu --num_processes 2`, which starts only one process.
    torchrun = "tests.forking_torchrun" if forked and sys.platform == "linux" else "torch.distributed.run"
    launcher = ["-m", torchrun, "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    if not torch.accelerator.is_available():
        environment.pop("ACCELERATE_USE_CPU", None)  # several processes use the CPU without it
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def history(config: RunConfig) -> list[dict[str, Any]]:
    """The rows of a run's history."""
    path = Path(config.train.output) / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def scripted(trainer: Trainer, scores: list[float]) -> Trainer:
    """Make the evaluations of a trainer return these scores, one after another."""
    values = iter(scores)
    trainer.evaluator.run = lambda model: scripted_result(miou=next(values))  # type: ignore[method-assign]
    return trainer


def scripted_result(**metrics: float) -> EvaluationResult:
    """An evaluation of one dataset; its first metric selects the best checkpoint."""
    dataset = DatasetResult("", Provenance("script", "val"), "scripted", metrics, {})
    return EvaluationResult((dataset,), next(iter(metrics)))
